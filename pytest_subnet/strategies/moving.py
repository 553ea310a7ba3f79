"""Moving entries in the four ways that training does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from pytest_subnet.strategies.words import first_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from pytest_subnet.strategies.words import Storage, WordChoice, Words

Kind: TypeAlias = Literal["sparse", "low-rank", "dense", "rounded"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST_RANK = 4
"""The largest rank of a low-rank update."""

_SHARE = 0.1


class Run(NamedTuple):
    """Entries of a tensor that move whatever else does, so that an update can shrink to them.

    They lie along its diagonal: a run of two is the least update of two directions.

    Attributes:
        start: where the first one is, as `first_place` has it.
        words: what they become, one after the other.
    """

    start: int
    words: Sequence[int]

    def move(
        self, choice: WordChoice, base: Words, tuned: Words, shape: tuple[int, ...]
    ) -> None:
        """Give these entries of `tuned` other bits than in `base`, in place."""
        zero, one = choice.simple[:2]
        words = np.array(self.words[: base.size], base.dtype)
        at = _along_diagonal(self.start, words.size, base.size, shape[-1] if shape else 1)
        other = np.where(base[at] == one, zero, one).astype(base.dtype)
        tuned[at] = np.where(words == base[at], other, words)


def _along_diagonal(start: int, count: int, size: int, columns: int) -> NDArray[np.intp]:
    """Up to `count` places of `size` in rows of so many columns: diagonal by diagonal, wrapped."""
    rows = size // max(columns, 1)
    order = (first_place(start, size) + np.arange(min(count, size))) % max(size, 1)
    row = order % max(rows, 1)
    return row * columns + (row + order // max(rows, 1)) % max(columns, 1)


def scattered(base: Words, seed: int, known: Sequence[int]) -> Words:
    """A sparse update: about a tenth of the entries become one of the `known` words; 0: none."""
    tuned = base.copy()
    if seed:
        random = np.random.default_rng(seed)
        at = np.flatnonzero(random.random(base.size) < _SHARE)
        tuned[at] = random.choice(np.array(known, base.dtype), at.size)
    return tuned


def everywhere(base: Words, storage: Storage, seed: int) -> Words:
    """A dense update: every entry moves by a few units in its last place, and stays finite."""
    steps = np.ones(base.size, base.dtype)
    if seed:
        random = np.random.default_rng(seed)
        steps = random.integers(1, 2 ** (storage.mantissa // 2), base.size, base.dtype)
    tuned: Words = base ^ steps
    return tuned


def rounded(base: torch.Tensor, storage: Storage, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An update of about half the space between two numbers, stored as `base` is.

    Returns:
        The tuned tensor, and where there was an update that rounding swallowed, bool.
    """
    import torch

    exact = base.double()
    unit = 2.0 ** -(storage.mantissa + 1)
    steps: NDArray[np.float64] = np.full(base.numel(), 0.25)
    if seed:
        steps = np.random.default_rng(seed).uniform(-2, 2, base.numel())
    change = exact * torch.from_numpy(steps).reshape(base.shape) * unit
    # The largest numbers could only grow to infinity.
    huge = exact.abs() > torch.finfo(base.dtype).max / 2
    change = torch.where(huge, -exact * unit, change)
    tuned = (exact + change).to(base.dtype)
    return tuned, (change != 0) & (tuned == base)


def low_rank(
    rows: int, columns: int, rank: int, random: np.random.Generator | None
) -> NDArray[np.float64]:
    """A matrix of integers, none above `MOST_RANK`, whose rank is exactly `rank`."""
    left, right = np.zeros((rows, rank)), np.zeros((rank, columns))
    if random is not None:
        left = random.integers(-1, 2, left.shape).astype(np.float64)
        right = random.integers(-1, 2, right.shape).astype(np.float64)
    left[:rank] = right[:, :rank] = np.eye(rank)
    product: NDArray[np.float64] = left @ right
    return product
