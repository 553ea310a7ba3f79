"""Casts give the values that torch's casts give, and every NaN the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.scan.casts import cast

QUIET = {
    "bfloat16": 0x7FC0,
    "float16": 0x7E00,
    "float32": 0x7FC00000,
    "float64": 0x7FF8000000000000,
}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
OTHERS = [(source, target) for source in ARITHMETIC for target in ARITHMETIC if source != target]


def every_kind_of_bits(source: str) -> torch.Tensor:
    """All words of 16 bits; of wider dtypes random bits, and values between those of 16 bits."""
    dtype = getattr(torch, source)
    if dtype.itemsize == 2:
        return torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(dtype)
    random = np.random.default_rng(7)
    bits = random.integers(0, 256, dtype.itemsize << 16, np.uint8)
    scales = 2.0 ** random.integers(-30, 20, 1 << 16)
    ordinary = torch.from_numpy(random.standard_normal(1 << 16) * scales).to(dtype)
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16))
    # Halfway between two neighbours of 16 bits, exactly and by a hair: ties to even, rounded once.
    ties = [
        (low.double() + high.double()) / 2 * (1 + nudge)
        for target in (torch.bfloat16, torch.float16)
        for low, high in [(every[:-1].view(target), every[1:].view(target))]
        for nudge in (0.0, 1e-7, -1e-7, 1e-12, -1e-12)
    ]
    return torch.cat([torch.from_numpy(bits).view(dtype), ordinary, *(t.to(dtype) for t in ties)])


@pytest.mark.parametrize(("source", "target"), OTHERS)
def test_values_are_those_of_torch(source: str, target: str) -> None:
    words = every_kind_of_bits(source)
    expected = words.to(getattr(torch, target))
    result = cast(words.view(torch.uint8).numpy(), source, target)
    found = torch.from_numpy(result.copy()).view(expected.dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert torch.equal(found[number].view(integer), expected[number].view(integer))


@pytest.mark.parametrize(("source", "target"), OTHERS)
def test_every_nan_becomes_the_quiet_one(source: str, target: str) -> None:
    words = every_kind_of_bits(source)
    nans = words[words.isnan()].view(torch.uint8)
    assert len(nans)
    for buffer in (nans.numpy(), nans):
        result = torch.as_tensor(cast(buffer, source, target)).numpy()
        found = set(result.view(UNSIGNED[getattr(torch, target).itemsize]).tolist())
        assert found == {QUIET[target]}


@pytest.mark.parametrize(("source", "target"), OTHERS)
def test_tensors_are_cast_as_arrays_are(source: str, target: str) -> None:
    buffer = every_kind_of_bits(source).view(torch.uint8)
    result = cast(buffer, source, target)
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, torch.from_numpy(cast(buffer.numpy(), source, target).copy()))


def test_without_a_cast_the_buffer_is_the_same() -> None:
    buffer = np.zeros(4, np.uint8)
    assert cast(buffer, "float16", "float16") is buffer


def test_a_buffer_is_not_written_to() -> None:
    words = every_kind_of_bits("float32")
    before = words.view(torch.uint8).clone()
    for target in ("bfloat16", "float16", "float64"):
        cast(words.view(torch.uint8).numpy(), "float32", target)
        cast(words.view(torch.uint8), "float32", target)
    assert torch.equal(before, words.view(torch.uint8))
