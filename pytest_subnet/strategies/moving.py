"""Moving entries in the four ways that training does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from pytest_subnet.strategies.words import Storage, WordChoice, Words

Kind: TypeAlias = Literal["sparse", "low-rank", "dense", "rounded"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST_RANK = 4
"""The largest rank of a low-rank update."""


def scattered(
    choice: WordChoice,
    base: Words,
    shape: tuple[int, ...],
    words: Sequence[int],
    random: np.random.Generator | None,
) -> Words:
    """A sparse update of one tensor: as many entries as there are words become these.

    They lie anywhere, or without a generator along the diagonal: two are the least update of two
    directions. What is that word already becomes one, or zero.
    """
    zero, one = choice.simple[:2]
    new = np.array(words[: base.size], base.dtype)
    if random is None:
        at = _along_diagonal(new.size, base.size, shape[-1] if shape else 1)
    else:
        at = random.permutation(base.size)[: new.size]
    other = np.where(base[at] == one, zero, one).astype(base.dtype)
    tuned = base.copy()
    tuned[at] = np.where(new == base[at], other, new)
    return tuned


def _along_diagonal(count: int, size: int, columns: int) -> NDArray[np.intp]:
    """The first `count` places of `size` in rows of so many columns, one diagonal by another."""
    order, rows = np.arange(count), max(size // max(columns, 1), 1)
    row = order % rows
    return row * columns + (row + order // rows) % max(columns, 1)


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
