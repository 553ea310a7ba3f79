"""The mask of a pair: the right bits and strata, from one reading, and never an old one."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_subnet import (
    CheckpointError,
    ModelPair,
    PairMismatchError,
    SelectionError,
    UpdateMask,
    open_checkpoint,
    open_pair,
    record_update,
    update_mask,
    update_sparsity,
)
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.scan import comparing, masking, units
from pytest_subnet.scan.torch_kernel import TorchMaskKernel

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"layers.0.q_proj.weight": (40, 33), "layers.0.norm.weight": (7,), "lm_head.weight": (9,)}
EXPONENT_BITS = {"bfloat16": (7, 512), "float16": (10, 64)}


class Counting(TensorsCheckpoint):
    """Weights in memory that count how often each is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors, label="counting")
        self.reads: Counter[str] = Counter()

    def view(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return super().view(name)


def weights(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=random) * 0.02).to(dtype)
        for name, shape in SHAPES.items()
    }


def moved(base: dict[str, torch.Tensor], share: float = 0.2, seed: int = 1) -> dict:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(each.shape, generator=random) < share, each * 1.5, each)
        for name, each in base.items()
    }


def strata_of(base: torch.Tensor, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits, size = EXPONENT_BITS[str(base.dtype).removeprefix("torch.")]
    words = base.reshape(-1).view(torch.int16).numpy().view(np.uint16).astype(int)
    stratum = 2 * (words >> bits & (size // 2 - 1)) + (words % (1 << bits) == 0)
    return (
        np.bincount(stratum, minlength=size),
        np.bincount(stratum[flags.reshape(-1)], minlength=size),
    )


def check(mask: UpdateMask, base: dict, tuned: dict, atol: float | None = None) -> None:
    assert set(mask.names()) == set(base)
    for name, before in base.items():
        difference = (tuned[name].float() - before.float()).abs()
        flags = (tuned[name] != before if atol is None else difference > atol).numpy()
        np.testing.assert_array_equal(mask[name], flags)
        info = mask.info(name)
        assert info.shape == tuple(before.shape)
        assert info.entries == flags.sum()
        if before.dtype not in (torch.bfloat16, torch.float16):
            assert mask.strata(name) is None
            continue
        expected = strata_of(before, flags)
        np.testing.assert_array_equal(mask.strata(name).population, expected[0])
        np.testing.assert_array_equal(mask.strata(name).members, expected[1])


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny tensors, so that units and buffers end everywhere."""
    monkeypatch.setattr(units, "UNIT_BYTES", 512)
    monkeypatch.setattr(comparing, "_SCRATCH_BYTES", 512)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("atol", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["file", "memory"])
def test_bits_and_strata_are_those_of_the_definition(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    source: str,
    atol: float | None,
    kernel: str,
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(masking, "choose_mask_kernel", TorchMaskKernel)
    base = weights(dtype)
    tuned = moved(base)
    pair = open_pair(base, tuned)
    if source == "file":
        save_file(base, tmp_path / "base.safetensors")
        save_file(tuned, tmp_path / "tuned.safetensors")
        pair = open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    mask = update_mask(pair, atol=atol)
    check(mask, base, tuned, atol)
    assert mask.count == sum(row.updated for row in update_sparsity(pair, atol=atol).per_tensor)
    assert (mask.origin.what, mask.origin.tolerance) == (
        pair.label,
        "same bits" if atol is None else "atol=0.001",
    )
    assert mask.origin.base == open_checkpoint(base).fingerprint()
    assert mask.origin.tuned == open_checkpoint(tuned).fingerprint()


def test_strata_of_a_cast_pair_are_those_of_what_is_compared() -> None:
    base = weights(torch.float32)
    tuned = moved(base)
    mask = update_mask(open_pair(base, tuned, as_dtype="bfloat16"))
    check(mask, *({n: t.bfloat16() for n, t in side.items()} for side in (base, tuned)))


@pytest.fixture
def counted() -> ModelPair:
    base = weights(torch.bfloat16)
    return open_pair(Counting(base), Counting(moved(base)))


def reads(pair: ModelPair) -> set[int]:
    assert pair.base.reads == pair.tuned.reads
    return set(pair.base.reads.values())


def test_a_mask_and_the_counts_come_from_one_reading(counted: ModelPair) -> None:
    mask = update_mask(counted)
    for tolerance in ({}, {"atol": 1e-5}):
        update_sparsity(counted, **tolerance)
    assert update_sparsity(counted).updated == mask.count
    assert update_mask(counted) is mask
    assert reads(counted) == {1}


def test_a_mask_of_a_pair_that_was_measured_reads_it_once_more(counted: ModelPair) -> None:
    before = update_sparsity(counted)
    assert reads(counted) == {1}
    update_mask(counted)
    assert reads(counted) == {2}
    assert update_sparsity(counted) == before
    assert reads(counted) == {2}


def test_two_tolerances_are_two_masks_and_other_patterns_another(counted: ModelPair) -> None:
    exact, wide = update_mask(counted), update_mask(counted, atol=1e-2)
    assert wide.count < exact.count
    assert not (wide - exact).count
    assert update_mask(counted, exclude="lm_head*").names() == [
        "layers.0.q_proj.weight",
        "layers.0.norm.weight",
    ]
    assert update_mask(counted, kinds="norm").names() == ["layers.0.norm.weight"]


def test_threads_that_ask_at_once_share_one_reading(counted: ModelPair) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(update_mask(counted))) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert reads(counted) == {1}


def test_fingerprints_read_each_side_once_and_only_when_asked_for(counted: ModelPair) -> None:
    taken = []
    for side in (counted.base, counted.tuned):
        original = side.fingerprint

        def fingerprint(name: str | None = None, original: object = original) -> str:
            taken.append(name)
            return original(name)

        side.fingerprint = fingerprint
    masks = update_mask(counted), update_mask(counted, atol=1e-3)
    assert not taken
    assert len({(mask.origin.base, mask.origin.tuned) for mask in masks}) == 1
    assert sorted(map(str, taken)) == sorted(2 * ["None", *SHAPES])


def test_a_live_side_is_never_served_from_memory() -> None:
    """A write through `.data` leaves no trace: what was remembered would be an old verdict."""
    model = torch.nn.Linear(8, 8).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pair = open_pair(before, model)
    assert update_mask(pair).count == 0
    model.weight.data.view(-1)[:5] += 1
    mask = update_mask(pair)
    assert mask.count == 5
    assert update_sparsity(pair).updated == 5
    after = open_checkpoint({n: t.clone() for n, t in model.state_dict().items()}).fingerprint()
    model.weight.data.add_(1)
    assert mask.origin.tuned == after, "of the weights that the mask was made from"
    assert update_mask(pair).origin.tuned != after


def test_an_update_that_was_recorded_has_a_mask_until_the_model_moves_on() -> None:
    model = torch.nn.Linear(8, 8).bfloat16()
    with record_update(model) as update, torch.no_grad():
        model.weight[0, :3] += 1
    mask = update_mask(update)
    assert mask["weight"][0].tolist() == [True] * 3 + [False] * 5
    model.weight.data += 1
    with pytest.raises(CheckpointError, match="has changed since the recorded block ended"):
        update_mask(update, atol=1e-3)


def test_a_file_written_over_is_an_error_before_and_after(tmp_path: Path) -> None:
    base = weights(torch.bfloat16)
    paths = [tmp_path / f"{side}.safetensors" for side in ("base", "tuned")]
    save_file(base, paths[0])
    save_file(moved(base), paths[1])
    pair = open_pair(*paths)
    mask = update_mask(pair)
    save_file(moved(base, seed=2), paths[1])
    with pytest.raises(CheckpointError, match="changed after"):
        update_mask(pair)
    with pytest.raises(CheckpointError, match="changed"):
        mask.save(tmp_path / "mask.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    assert mask.count, "bits that were found stay"


def test_buffers_are_left_out_and_nothing_else_is_an_error() -> None:
    base = {"a.weight": torch.ones(4), "position_ids": torch.arange(3)}
    pair = open_pair(base, {name: tensor + 1 for name, tensor in base.items()})
    assert update_mask(pair).names() == ["a.weight"]
    with pytest.raises(SelectionError, match=r"only buffers and integer tensors are selected"):
        update_mask(pair, include="position_ids")
    with pytest.raises(SelectionError, match="matches"):
        update_mask(pair, include="b.*")


def test_wrong_arguments() -> None:
    pair = open_pair({"a": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="give at most one"):
        update_mask(pair, atol=1e-5, rtol=1e-5)
    for wrong in (True, "1e-5", torch.tensor(1e-5)):
        with pytest.raises(TypeError, match=r"^[ar]tol=.* is not a number$"):
            update_mask(pair, atol=wrong)
        with pytest.raises(TypeError, match=r"^[ar]tol=.* is not a number$"):
            update_mask(pair, rtol=wrong)
    with pytest.raises(ValueError, match="is not a finite number of at least 0"):
        update_mask(pair, atol=10**400)
    other = open_pair({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(PairMismatchError, match="b"):
        update_mask(other)


def test_the_file_of_a_checkpoint_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    base = weights(torch.bfloat16)
    save_file(base, tmp_path / "base.safetensors")
    save_file(moved(base), tmp_path / "tuned.safetensors")
    mask = update_mask(open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"))
    check(mask, *(load_file(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")))
