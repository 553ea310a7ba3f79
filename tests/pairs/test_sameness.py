"""Base and tuned one thing under two names: an error at opening."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import PairMismatchError, open_checkpoint, open_pair

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(3)}


@pytest.fixture(params=["safetensors", "bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"model.{request.param}"
    if request.param == "bin":
        torch.save(WEIGHTS, path)
    else:
        save_file(WEIGHTS, path)
    return path


def refused(base: object, tuned: object) -> bool:
    with pytest.raises(PairMismatchError, match="base and tuned are the same: "):
        open_pair(base, tuned)
    return True


def test_the_same_path(checkpoint: Path) -> None:
    assert refused(checkpoint, str(checkpoint))


def test_a_file_and_the_directory_that_holds_it(checkpoint: Path) -> None:
    assert refused(checkpoint, checkpoint.parent)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_the_file(checkpoint: Path, link: object, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    link(checkpoint, other / checkpoint.name)
    assert refused(checkpoint, other)


def test_a_link_to_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint.parent, target_is_directory=True)
    assert refused(checkpoint.parent, tmp_path / "link")


def test_linked_shards_beside_a_copied_index(tmp_path: Path) -> None:
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        index = '{"weight_map": {"a.weight": "1.safetensors", "b.weight": "1.safetensors"}}'
        (directory / "model.safetensors.index.json").write_text(index)
    save_file(WEIGHTS, tmp_path / "a" / "1.safetensors")
    (tmp_path / "b" / "1.safetensors").hardlink_to(tmp_path / "a" / "1.safetensors")
    assert refused(tmp_path / "a", tmp_path / "b")


def test_a_copy_is_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / checkpoint.name).write_bytes(checkpoint.read_bytes())
    assert len(open_pair(checkpoint, other).tensors) == 2


def test_the_same_object() -> None:
    opened = open_checkpoint(WEIGHTS)
    assert refused(opened, opened)
    assert refused(WEIGHTS, WEIGHTS)
    module = torch.nn.Linear(2, 2)
    assert refused(module, module)


def test_a_state_dict_that_was_kept_without_a_copy() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.state_dict()
    assert refused(before, module)
    assert refused({f"module.{name}": tensor for name, tensor in before.items()}, module)
    assert refused(dict(list(before.items())[:1]), module)


def test_a_state_dict_of_transposed_views_that_was_kept_without_a_copy() -> None:
    shared = torch.ones(2, 3)
    assert refused({"w": shared.T, "x": shared[0]}, {"w": shared.T, "x": shared[0].view(3)})


def test_a_copy_of_a_module_is_another_checkpoint() -> None:
    module = torch.nn.Linear(2, 2)
    assert len(open_pair(copy.deepcopy(module), module).tensors) == 2


def test_some_shared_tensors_are_allowed() -> None:
    frozen = torch.ones(3)
    base = {"frozen": frozen, "trained": torch.zeros(3)}
    pair = open_pair(base, {"frozen": frozen, "trained": torch.ones(3)})
    assert [tensor.name for tensor in pair.tensors] == ["frozen", "trained"]


def test_memory_that_does_not_pair_says_nothing() -> None:
    shared = torch.ones(3)
    pair = open_pair({"one": shared}, {"other": shared})
    assert (pair.tensors, len(pair.problems)) == ((), 2)


def test_the_message_says_what_may_have_happened() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(PairMismatchError) as caught:
        open_pair(module.state_dict(), module)
    assert str(caught.value) == (
        "base and tuned are the same: OrderedDict of tensors and Linear; comparing a thing with "
        "itself says nothing. Was the path given twice, or a model kept without a copy "
        "(copy.deepcopy it, or clone each tensor of its state_dict)?"
    )
