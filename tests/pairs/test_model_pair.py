"""What a pair is: aligned tensors, problems, a memory, and sides that stay as they were."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, ModelPair, open_checkpoint, open_pair
from pytest_subnet.pairs import TensorPair
from pytest_subnet.scan import SAME_BITS
from pytest_subnet.scan.gathering import gather

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "model.layers.3.mlp.up_proj.weight"


def model(*, fill: float = 0.0) -> dict[str, torch.Tensor]:
    return {NAME: torch.full((2, 3), fill), "inv_freq": torch.ones(2), "n": torch.zeros(1).long()}


def test_a_tensor_pair_says_what_is_compared_and_how() -> None:
    tensor = open_pair(model(), {f"module.{n}": t for n, t in model().items()}).tensors[0]
    assert tensor == TensorPair(
        name=NAME,
        base_name=NAME,
        tuned_name=f"module.{NAME}",
        shape=(2, 3),
        dtype="float32",
        base_dtype="float32",
        tuned_dtype="float32",
        layer=3,
        kind="up_proj",
        is_weight=True,
    )
    assert tensor.numel == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.name = "other"


def test_tensors_come_in_the_order_of_the_base() -> None:
    tuned = dict(reversed(model().items()))
    assert [tensor.name for tensor in open_pair(model(), tuned).tensors] == list(model())


def test_buffers_and_integers_are_no_weights() -> None:
    pair = open_pair(model(), model())
    assert [(t.kind, t.is_weight) for t in pair.tensors] == [
        ("up_proj", True),
        ("buffer", False),
        ("n", False),
    ]


def test_a_buffer_of_either_module_is_one_by_whatever_name() -> None:
    module = torch.nn.Module()
    module.register_buffer("temperature", torch.ones(2))
    module.weight = torch.nn.Parameter(torch.zeros(2))
    weights = {f"model.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    for sides in ((module, weights), (weights, module)):
        kinds = {t.name.rpartition(".")[2]: t.kind for t in open_pair(*sides).tensors}
        assert kinds["temperature"] == "buffer"
        assert kinds["weight"] != "buffer"


def test_anything_that_can_be_opened_can_be_paired(save: Callable[..., Path]) -> None:
    path = save("tuned", model(fill=1.0))
    for tuned in (path, str(path), path / "model.safetensors", open_checkpoint(path), model()):
        assert len(open_pair(model(), tuned).tensors) == 3


def test_a_pair_shows_itself_in_one_line() -> None:
    pair = open_pair(model(), {NAME: torch.zeros(2, 3)})
    assert repr(pair) == ("<ModelPair dict of tensors -> dict of tensors: 1 tensor, 2 problems>")


def test_a_pair_can_be_made_of_an_alignment() -> None:
    base, tuned = open_checkpoint(model()), open_checkpoint(model(fill=1.0))
    tensors = open_pair(base, tuned).tensors
    pair = ModelPair(base, tuned, tensors=tensors[:1])
    assert (pair.tensors, pair.problems, pair.tied, pair.memory) == (tensors[:1], (), {}, {})


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_file_that_was_written_to_is_noticed(save: Callable[..., Path], side: str) -> None:
    paths = {name: save(name, model()) for name in ("base", "tuned")}
    pair = open_pair(paths["base"], paths["tuned"])
    pair.check_unchanged()
    file = paths[side] / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=f"{side} changed after the pair was opened; wait"):
        pair.check_unchanged()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_was_replaced_before_it_was_paired_is_noticed(
    tmp_path: Path, suffix: str, side: int
) -> None:
    def write(path: Path, **further: torch.Tensor) -> None:
        tensors = {**further, **model()}
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)

    paths = [tmp_path / f"{name}.{suffix}" for name in ("base", "tuned")]
    for path in paths:
        write(path)
    base, tuned = (open_checkpoint(path) for path in paths)
    tensors = open_pair(base, tuned).tensors
    write(paths[side], added=torch.ones(50))
    with pytest.raises(CheckpointError) as caught:
        open_pair(base, tuned)
    assert str(caught.value) == (
        f"{paths[side]} changed after it was opened; wait until it is written, then open it again"
    )
    with pytest.raises(CheckpointError, match="changed after the pair was opened"):
        gather(ModelPair(base, tuned, tensors=tensors), [0], SAME_BITS)


def test_a_module_that_was_trained_is_noticed() -> None:
    module = torch.nn.Linear(2, 2)
    pair = open_pair({n: t.clone() for n, t in module.state_dict().items()}, module)
    pair.check_unchanged()
    with torch.no_grad():
        module.weight += 1
    with pytest.raises(CheckpointError, match="Linear changed after the pair was opened"):
        pair.check_unchanged()
