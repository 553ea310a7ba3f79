"""Updates of one matrix, of which it is known what is true."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from hypothesis import strategies as st

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.strategies.arguments import (
    check_kinds,
    check_strategy,
    drawn_dtype,
    drawn_name,
    drawn_shape,
    sampled,
)
from pytest_subnet.strategies.moving import (
    KINDS,
    MOST_RANK,
    Kind,
    everywhere,
    low_rank,
    rounded,
    scattered,
)
from pytest_subnet.strategies.words import SEEDS, choose_words, spread

if TYPE_CHECKING:
    import torch

    from pytest_subnet.strategies.words import WordChoice, Words

_DTYPES = st.sampled_from(ARITHMETIC)
_SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
_GRID = 64  # integers below it, as parts of it, are exact in every dtype


@dataclass(frozen=True, eq=False)
class Update:
    """A matrix before and after, with what is true of the difference.

    Attributes:
        base: the matrix before, `[rows, columns]`, finite.
        tuned: the matrix after, of the same shape and dtype, finite, in memory of its own.
        kind: `"sparse"`, `"low-rank"`, `"dense"` or `"rounded"`.
        mask: bool, of the same shape: which entries have other bits.
        swallowed: bool, likewise: which entries were meant to move, by less than `tuned` can
            store. None are unless the kind is `"rounded"`.
        rank: the rank of tuned - base, exactly; None unless the kind is `"low-rank"`.
    """

    base: torch.Tensor
    tuned: torch.Tensor
    kind: Kind
    mask: torch.Tensor
    swallowed: torch.Tensor
    rank: int | None


@st.composite
def updates(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype | str] | None = None,
    shapes: st.SearchStrategy[tuple[int, int]] | None = None,
    kinds: st.SearchStrategy[Kind] | tuple[Kind, ...] = KINDS,
) -> Update:
    """A strategy for updates of one matrix, each an `Update` with its ground truth.

    A sparse update moves a few entries to any other values; a dense one moves all by a few units in
    the last place; a low-rank one adds a product of two thin matrices, exactly; a rounded one adds
    about half of what the dtype can tell apart, so that part of it is swallowed. Updates shrink
    towards sparse ones that move one entry of a matrix of one entry from 0 to 1.

    Args:
        dtypes: of which dtypes, as `torch.dtype` or by name; None: bfloat16, float16, float32 or
            float64, which are those whose differences are formed.
        shapes: of which shapes, `(rows, columns)`; None: up to 12 rows and columns.
        kinds: which of the four to draw, as a strategy or a tuple.

    Raises:
        InvalidArgument: an argument is no strategy, `kinds` has none or unknown ones, or a strategy
            drew what is no such dtype or no such shape.

    >>> from hypothesis import given, settings
    >>> from pytest_subnet import open_pair, update_sparsity
    >>> @settings(deadline=None)
    ... @given(updates())
    ... def test_sparsity_counts_the_mask(update):
    ...     pair = open_pair({"weight": update.base}, {"weight": update.tuned})
    ...     assert update_sparsity(pair).updated == update.mask.sum()
    >>> test_sparsity_counts_the_mask()
    """
    check_strategy("dtypes", dtypes)
    check_strategy("shapes", shapes)
    check_kinds(kinds, KINDS)
    kind = cast("Kind", drawn_name("kinds", draw(sampled(kinds)), KINDS))
    dtype = drawn_dtype(draw(_DTYPES if dtypes is None else dtypes), ARITHMETIC)
    shape = drawn_shape(draw(_SHAPES if shapes is None else shapes), dims=2)
    choice = choose_words(dtype)
    # All kinds draw the same, so that each can shrink to one that is simpler.
    words = spread(choice, choice.words(draw(choice.some)), math.prod(shape), draw(SEEDS))
    seed = draw(SEEDS)
    random = np.random.default_rng(seed) if seed else None
    moved = choice.words(draw(choice.one_or_more))
    if kind == "low-rank":  # of as many directions as a sparse one
        return _low_rank(choice, words, shape, random, min(len(moved), *shape, MOST_RANK))
    if kind == "rounded":
        base = choice.storage.tensor(words, shape)
        stored, swallowed = rounded(base, choice.storage, seed)
        return _known(choice, words, choice.storage.words(stored), shape, kind, swallowed)
    if kind == "dense":
        tuned = everywhere(words, choice.storage, seed)
    else:
        tuned = scattered(choice, words, shape, moved, random)
    return _known(choice, words, tuned, shape, kind)


def _known(
    choice: WordChoice,
    base: Words,
    tuned: Words,
    shape: tuple[int, ...],
    kind: Kind,
    swallowed: torch.Tensor | None = None,
) -> Update:
    """An update whose words are known; nothing was swallowed where it does not say so."""
    import torch

    mask = torch.from_numpy(base != tuned).reshape(shape)
    return Update(
        choice.storage.tensor(base, shape),
        choice.storage.tensor(tuned, shape),
        kind,
        mask=mask,
        swallowed=torch.zeros_like(mask) if swallowed is None else swallowed,
        rank=None,
    )


def _low_rank(
    choice: WordChoice,
    words: Words,
    shape: tuple[int, ...],
    random: np.random.Generator | None,
    rank: int,
) -> Update:
    """Base and update are integers over `_GRID`, so that the stored difference is exact."""
    import torch

    dtype = choice.storage.torch_dtype
    rows, columns = shape
    base = torch.from_numpy((words % _GRID).astype(np.float64)).reshape(shape)
    change = torch.from_numpy(low_rank(rows, columns, rank, random))
    return Update(
        (base / _GRID).to(dtype),
        ((base + change) / _GRID).to(dtype),
        "low-rank",
        mask=change != 0,
        swallowed=torch.zeros(shape, dtype=torch.bool),
        rank=rank,
    )
