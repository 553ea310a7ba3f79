"""Random masks with as many entries in each matrix as another, drawn 64 entries at a time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.masks.bits import packed_bytes, popcount

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGITS = 8
"""Binary digits to which the share of entries is drawn before single ones are changed."""
_SPARSE = 1 / 64
"""Below this share entries are drawn one by one, which then takes less."""


def drawn(numel: int, count: int, seed: tuple[int, int], name: str) -> NDArray[np.uint64]:
    """The bits of `count` of `numel` entries, each such set equally likely, padded with zeros.

    Args:
        numel: of the tensor.
        count: at most `numel`.
        seed: of the controls, and the number of this one.
        name: of the tensor, whose draw depends on no other.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    random = np.random.Generator(np.random.PCG64([*seed, int.from_bytes(digest, "little")]))
    if 2 * count <= numel:
        return _drawn(numel, count, random)
    return _without_padding(~_drawn(numel, numel - count, random), numel)


def _drawn(numel: int, count: int, random: np.random.Generator) -> NDArray[np.uint64]:
    """At most half of the entries.

    Every entry is drawn by itself with about the right probability, then as many are changed at
    random as it takes. No entry differs from another in that, so that no set is more likely.
    """
    words = np.zeros(packed_bytes(numel) // 8, np.uint64)
    if count > _SPARSE * numel:
        # Rather too few: of sparse bits, one to set is found sooner than one to clear.
        digits = int(count / numel * (1 << _DIGITS) - 0.5)
        words = _without_padding(_each_with(digits, words.size, random), numel)
    found = popcount(words)
    _change(words, numel, abs(count - found), random, is_set=found > count)
    return words


def _each_with(digits: int, size: int, random: np.random.Generator) -> NDArray[np.uint64]:
    """Words of which each bit is set with a probability of `digits` in 256.

    Digit by digit from the last: or with a random word halves the way to 1, and the way to 0.
    """
    words = np.zeros(size, np.uint64)
    for place in range(_DIGITS):
        if digits >> place & 1:
            words |= _random_words(size, random)
        elif digits & ((1 << place) - 1):  # else nothing is set yet
            words &= _random_words(size, random)
    return words


def _random_words(size: int, random: np.random.Generator) -> NDArray[np.uint64]:
    return random.bit_generator.random_raw(size)  # whole words, in a fifth of the time of others


def _change(
    words: NDArray[np.uint64],
    numel: int,
    missing: int,
    random: np.random.Generator,
    *,
    is_set: bool,
) -> None:
    """Flip `missing` of the bits that are set, or are not, each such choice equally likely."""
    there = popcount(words) if is_set else numel - popcount(words)
    while missing:
        tries = random.integers(0, numel, int(1.1 * missing * numel / there) + 16)
        bits = words[tries >> 6] >> (tries & 63).astype(np.uint64) & np.uint64(1)
        tries = tries[(bits == 1) == is_set]
        _, first = np.unique(tries, return_index=True)
        chosen = tries[np.sort(first)][:missing]
        np.bitwise_xor.at(words, chosen >> 6, np.uint64(1) << (chosen & 63).astype(np.uint64))
        missing, there = missing - chosen.size, there - chosen.size


def _without_padding(words: NDArray[np.uint64], numel: int) -> NDArray[np.uint64]:
    """The words with zeros behind the last entry."""
    used = numel % 64
    if used and words.size:
        words[-1] &= np.uint64((1 << used) - 1)
    return words
