"""What storing in 16 bits does to an unstructured update: closed forms on the gaps between values.

An update d ~ N(0, s²) of a stored weight shows when it leaves the weight's rounding cell, half a
gap to either side. A gap is a power of two: 2^(e - bias - mantissa bits) above a weight of exponent
e, and half of that below a weight whose mantissa is zero. How often each gap occurs is all that the
density and the energy of the stored update depend on; see docs/findings/precision.md.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.scan.found import STRATA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class _Format(NamedTuple):
    exponent_bits: int

    @property
    def mantissa_bits(self) -> int:
        return 15 - self.exponent_bits

    @property
    def lowest_gap(self) -> int:
        """log2 of the gap between subnormal values."""
        return 2 - (1 << (self.exponent_bits - 1)) - self.mantissa_bits


# Two strata an exponent: log2 of half of them.
_FORMATS = {dtype: _Format(strata.bit_length() - 2) for dtype, strata in STRATA.items()}

LOWEST_GAP = min(each.lowest_gap for each in _FORMATS.values())
"""log2 of the first gap that is counted."""

GAPS = 256
"""How many gaps are counted; enough for bfloat16."""

_STEPS = 64
"""Grid points to a factor of two in s. The table is interpolated: its error is below 1e-4."""

_FAR = 6.0
"""Beyond it erfc is below 1e-16."""


def gaps_around(words: NDArray[np.uint16], lengths: Sequence[int], dtype: str) -> NDArray[np.int64]:
    """How often each gap occurs, counted once above and once below every finite weight.

    Args:
        words: 16-bit floats as they are stored, one run after the other.
        lengths: of the runs.
        dtype: one of `STRATA`.

    Returns:
        Int64 `[runs, GAPS]`: position i is the gap 2^(LOWEST_GAP + i).
    """
    form = _FORMATS[dtype]
    lowest = form.lowest_gap - LOWEST_GAP
    first, everything, powers = exponents_of(words, lengths, dtype)
    counts = np.zeros((len(lengths), GAPS), np.int64)
    for column, exponent in enumerate(range(first, first + everything.shape[1])):
        if exponent == (1 << form.exponent_bits) - 1:  # that of NaN and Inf
            continue
        # Subnormals lie as far apart as the smallest normals, and as far below the first of these.
        above, below = (lowest + max(each, 1) - 1 for each in (exponent, exponent - 1))
        counts[:, above] += 2 * everything[:, column] - powers[:, column]
        counts[:, below] += powers[:, column]
    return counts


def exponents_of(
    words: NDArray[np.uint16], lengths: Sequence[int], dtype: str
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """How many weights have each exponent, run by run.

    Returns:
        The lowest exponent that occurs, as it is stored; int64 `[runs, exponents]` from that on, of
        all weights; and the same of those whose mantissa is zero.
    """
    runs, form = len(lengths), _FORMATS[dtype]
    is_power = (words & ((1 << form.mantissa_bits) - 1)) == 0
    exponents = (words & 0x7FFF) >> form.mantissa_bits
    first = int(exponents.min(initial=(1 << form.exponent_bits) - 1))
    span = int(exponents.max(initial=first)) - first + 1
    keys = exponents.astype(np.int64) - first
    if runs > 1:
        keys += np.repeat(np.arange(runs) * span, lengths)
    # One histogram of all and one of the few powers: half the time of one of both.
    everything, powers = (
        np.bincount(each, minlength=runs * span).reshape(runs, span)
        for each in (keys, keys[is_power])
    )
    return first, everything, powers


def _relative_energy(r: float) -> float:
    """E[(stored difference / gap)²] for s = r gap.

    A difference of k gaps is stored when |d| is within half a gap of k gaps, so that it is
    Σ_k k² P(k - ½ < |d|/gap < k + ½) = Σ_{k≥1} (2k - 1) erfc((k - ½) / (√2 r)), which for wide
    steps is that of rounding noise on top: r² + 1/12 (at r = 2 to 16 digits).
    """
    if r > 2:
        return r * r + 1 / 12
    return sum((2 * k - 1) * math.erfc((k - 0.5) / (math.sqrt(2) * r)) for k in range(1, 25))


@cache
def _table() -> NDArray[np.float64]:
    """0, then `_relative_energy` at 2^(i / _STEPS - 6), up to 2^200; below, nothing is stored."""
    return np.array(
        [0.0, *(_relative_energy(2 ** (i / _STEPS - 6)) for i in range(206 * _STEPS + 1))]
    )


@cache
def _erfc_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points between which erfc is linear to 1e-7."""
    at = np.linspace(0, _FAR, 8193)
    return at, np.array([math.erfc(each) for each in at])


def _erfc(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of numbers that are not negative; 0 of NaN."""
    return np.interp(np.nan_to_num(values, nan=_FAR), *_erfc_table(), right=0.0)


def solve_step_sizes(
    counts: NDArray[np.int64], energies: NDArray[np.float64], of: NDArray[np.intp]
) -> NDArray[np.float64]:
    """The s at which unstructured updates would have left the energies that were observed.

    The stored energy rises with s, so that its grid of 64 points to a factor of two is searched by
    bisection, for all tensors at once.

    Args:
        counts: int64 `[samples, GAPS]`, as `gaps_around` gives them.
        energies: float64 `[tensors]`, mean of (stored difference)² over the weights; above zero.
        of: intp `[tensors]`, which sample is of each.

    Returns:
        float64 `[tensors]`, in weight units; NaN where there is no weight.
    """
    used = np.flatnonzero(counts.any(axis=0))
    shares = counts[:, used] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    squares = (shares * np.exp2(2.0 * (LOWEST_GAP + used)))[of]
    shifts = (LOWEST_GAP + used - 6) * _STEPS - 1  # to the place in the table

    def energy(at: NDArray[np.int64]) -> NDArray[np.float64]:
        relative = _table().take(at[:, None] - shifts, mode="clip")
        result: NDArray[np.float64] = np.einsum("ij,ij->i", squares, relative)
        return result

    low = np.full(len(energies), (LOWEST_GAP - 6) * _STEPS, np.int64)
    high = np.full(len(energies), 128 * _STEPS, np.int64)
    while (high - low).max(initial=0) > 1:
        middle = (low + high) // 2
        below = energy(middle) < energies
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        least, most = np.log(energy(low)), np.log(energy(high))
        part = np.nan_to_num((np.log(energies) - least) / (most - least), nan=1.0).clip(0, 1)
    return np.where(counts.sum(axis=1)[of] > 0, np.exp2((low + part) / _STEPS), np.nan)


def densities(
    counts: NDArray[np.int64],
    step_sizes: NDArray[np.float64],
    of: NDArray[np.intp],
    atol: float = 0.0,
) -> NDArray[np.float64]:
    """The share of weights that unstructured updates d ~ N(0, s²) leave changed by more than atol.

    Args:
        counts: int64 `[samples, GAPS]`, as `gaps_around` gives them.
        step_sizes: float64 `[tensors]`, the s of each.
        of: intp `[tensors]`, which sample is of each.
        atol: stored differences up to it count as unchanged.

    Returns:
        float64 `[tensors]`; NaN where there is no weight.
    """
    used = np.flatnonzero(counts.any(axis=0))
    gaps = np.exp2(1.0 * (LOWEST_GAP + used))
    least = (np.floor(atol / gaps) + 0.5) * gaps  # rounded up to the first difference that counts
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shown = _erfc(least / (math.sqrt(2) * step_sizes[:, None]))
        shares = counts[:, used] / counts.sum(axis=1, keepdims=True)
    result: NDArray[np.float64] = (shares[of] * shown).sum(axis=1)
    return np.where(counts.sum(axis=1)[of] > 0, result, np.nan)


def visible(counts: NDArray[np.float64], step_size: float, *, float32_master: bool) -> float:
    """The share of (weight, direction) in which a step of this size shows.

    On the grid it shows when it is longer than half the gap; from float32 masters, which lie
    anywhere in the cell, with probability step / gap.

    Args:
        counts: `[GAPS]`, as `gaps_around` gives them; those of several tensors may be added with
            weights.
        step_size: |step|, in weight units.
        float32_master: whether the step is added to a float32 copy of the weights.
    """
    gaps = np.exp2(1.0 * (LOWEST_GAP + np.arange(GAPS)))
    shown = np.minimum(1, step_size / gaps) if float32_master else step_size > gaps / 2
    return float((counts * shown).sum() / counts.sum())
