"""For the tests of the scan: the definition, written down once more and as plainly as it goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.scan import Tolerance

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Counts(NamedTuple):
    """What should be counted of one tensor."""

    integers: list[int]
    sums: list[float]
    peak: float


def as_values(words: np.ndarray, dtype: str) -> np.ndarray:
    """Stored words as the floats in which differences are formed: float32 for 16 bits, else 64."""
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN is one value more
        if dtype == "float16":
            return words.view(np.float16).astype(np.float32)
        return words.view(np.float32 if dtype == "float32" else np.float64).astype(np.float64)


def count_by_definition(
    base: bytes, tuned: bytes, dtype: str, tolerances: Sequence[Tolerance]
) -> Counts:
    """Count entry by entry of the design: nothing clever, nothing shared with the package."""
    word = UNSIGNED[2 if dtype in ("bfloat16", "float16") else int(dtype[-2:]) // 8]
    before_bits, after_bits = np.frombuffer(base, word), np.frombuffer(tuned, word)
    before, after = as_values(before_bits, dtype), as_values(after_bits, dtype)
    changed = before_bits != after_bits
    before_finite, after_finite = np.isfinite(before), np.isfinite(after)
    finite = before_finite & after_finite
    with np.errstate(all="ignore"):
        distance = np.abs(after - before)
        larger = np.maximum(np.abs(before), np.abs(after))
        beyond = [
            np.where(
                finite,
                distance > (t.atol if t.rtol is None else before.dtype.type(t.rtol) * larger),
                changed,
            )
            for t in tolerances
        ]
        exact = (after.astype(np.float64) - before.astype(np.float64))[finite]
        sides = before[before_finite].astype(np.float64), after[after_finite].astype(np.float64)
        sums = [float(np.square(part).sum()) for part in (exact, *sides)]
    masks = [
        changed,
        changed & (before == 0) & (after == 0),
        ~before_finite,
        ~after_finite,
        *beyond,
    ]
    peak = float(np.abs(exact).max(initial=0.0))
    return Counts([int(np.count_nonzero(mask)) for mask in masks], sums, peak)


@pytest.fixture(scope="session")
def by_definition() -> Callable[..., Counts]:
    """`count_by_definition`."""
    return count_by_definition


@pytest.fixture(scope="session")
def random_words() -> Callable[..., torch.Tensor]:
    """Raw bit patterns as a tensor of any dtype, with a second one that differs in some places."""

    def make(
        dtype: torch.dtype, shape: tuple[int, ...], *, seed: int, differing: float = 0.3
    ) -> tuple[torch.Tensor, torch.Tensor]:
        random = np.random.default_rng(seed)
        nbytes = math.prod(shape) * dtype.itemsize
        base = random.integers(0, 2 if dtype == torch.bool else 256, nbytes, np.uint8)
        other = random.integers(0, 2 if dtype == torch.bool else 256, nbytes, np.uint8)
        tuned = np.where(random.random(nbytes) < differing, other, base)
        return tuple(
            torch.from_numpy(side.copy()).view(dtype).reshape(shape) for side in (base, tuned)
        )

    return make
