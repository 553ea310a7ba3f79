"""Pairs of a tiny model and what became of it, in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.pairs.kinds import VOCABULARY
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.strategies.arguments import check_flag, check_kinds, check_strategy
from pytest_subnet.strategies.moving import (
    KINDS,
    MOST_RANK,
    Kind,
    Run,
    everywhere,
    low_rank,
    rounded,
    scattered,
)
from pytest_subnet.strategies.state_dicts import state_dicts
from pytest_subnet.strategies.words import SEEDS, STARTS, choose_words
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_subnet.pairs.model_pair import ModelPair
    from pytest_subnet.strategies.words import WordChoice, Words

_BASES = state_dicts()
_GROWN = st.integers(0, 3)
_TOLD = 3  # so many entries that moved are told one by one


@st.composite
def model_pairs(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    bases: st.SearchStrategy[Mapping[str, torch.Tensor]] | None = None,
    kinds: tuple[Kind, ...] = KINDS,
    allow_identical: bool = True,
    allow_grown_vocab: bool = True,
) -> ModelPair:
    """A strategy for pairs of two models in memory, aligned, the second an update of the first.

    The update is of one of the kinds that `updates` draws, over the whole model; a low-rank one is
    of every matrix, and is rounded to the dtype. Heads that are tied in the base are tied in the
    tuned model. A pair of which the vocabulary grew is opened with `vocab="common"`. Pairs shrink
    towards one tensor of one entry that moves from 0 to 1; what moved is told by the pair's `repr`.

    Args:
        bases: what the base may be, mappings from names to tensors, as `model.state_dict()`; None:
            `state_dicts()`. Tensors that are not bfloat16, float16, float32 or float64 stay as they
            are.
        kinds: which of the four kinds of updates to draw.
        allow_identical: whether there may be pairs in which nothing moved.
        allow_grown_vocab: whether embedding and head of the tuned model may have more rows.

    Raises:
        InvalidArgument: `bases` is no strategy or drew what is no mapping of tensors, `kinds` has
            none or unknown ones, an `allow_` is no bool, or there must be an update and the base
            has no entry that can move.

    >>> from hypothesis import given, settings
    >>> from pytest_subnet import update_sparsity
    >>> @settings(deadline=None)
    ... @given(model_pairs())
    ... def test_sparsity_and_density_are_all(pair):
    ...     found = update_sparsity(pair)
    ...     assert found.updated + found.sparsity * found.numel == found.numel
    >>> test_sparsity_and_density_are_all()
    """
    check_strategy("bases", bases)
    check_kinds(kinds, KINDS)
    check_flag("allow_identical", allow_identical)
    check_flag("allow_grown_vocab", allow_grown_vocab)
    kind: Kind = draw(st.sampled_from(kinds))
    base = _drawn_base(draw(_BASES if bases is None else bases))
    groups = _groups(base)
    if not groups and not allow_identical:
        raise InvalidArgument(
            "bases drew a model without an entry that can move; use allow_identical=True"
        )
    main = choose_words(next(iter(groups), "bfloat16"))
    # All kinds draw the same, so that each can shrink to one that is simpler.
    seed, start = draw(SEEDS), draw(STARTS)
    moved = main.words(draw(main.some if allow_identical else main.one_or_more))
    grown = draw(_GROWN) if allow_grown_vocab else 0
    tuned: dict[int, torch.Tensor] = {}
    told: list[str] = []
    count = 0
    for dtype, names in groups.items():
        choice = choose_words(dtype)
        tensors = [base[name] for name in names]
        before = np.concatenate([choice.storage.words(tensor) for tensor in tensors])
        after = _moved(kind, choice, before, tensors, seed) if moved else before.copy()
        if choice is main and moved:
            Run(start, moved).move(choice, before, after)
        at = np.flatnonzero(before != after)
        count += at.size
        if count <= _TOLD:
            told += _tell(base, names, choice, before, after, at)
        tuned |= _parts(choice, tensors, after)
    for tensor in base.values():
        if id(tensor) not in tuned:
            tuned[id(tensor)] = tensor.clone()
    result = {name: tuned[id(tensor)] for name, tensor in base.items()}
    entries = sum(base[name].numel() for names in groups.values() for name in names)
    return open_pair(
        TensorsCheckpoint(base, label="drawn model", is_live=True),
        TensorsCheckpoint(
            _grown(result, grown), label=_label(kind, count, entries, told), is_live=True
        ),
        vocab="common" if grown else "strict",
    )


def _drawn_base(base: object) -> dict[str, torch.Tensor]:
    """What `bases` drew, detached; a tensor under two names stays one."""
    import torch

    if not isinstance(base, Mapping) or not base:
        raise InvalidArgument(f"bases drew {safe(repr(base))}, which is no mapping of tensors")
    for name, tensor in base.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidArgument(
                f"bases drew {safe(repr(name))} with {safe(type(tensor).__name__)}, which is no "
                "tensor under a name"
            )
    return dict(base)


def _groups(base: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The names of what can move, by dtype; one name for what is there under several."""
    groups = defaultdict(list)
    seen = set()
    for name, tensor in base.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype in ARITHMETIC and tensor.numel() and id(tensor) not in seen:
            seen.add(id(tensor))
            groups[dtype].append(name)
    return groups


def _moved(
    kind: Kind, choice: WordChoice, base: Words, tensors: Sequence[torch.Tensor], seed: int
) -> Words:
    """The words of all tensors after an update."""
    storage = choice.storage
    if kind == "sparse":
        return scattered(base, seed, choice.simple)
    if kind == "dense":
        return everywhere(base, storage, seed)
    if kind == "rounded":
        return storage.words(rounded(storage.tensor(base, base.shape), storage, seed)[0])
    random = np.random.default_rng(seed) if seed else None
    parts = [
        storage.words(_plus_low_rank(tensor, random) if tensor.ndim == 2 else tensor)
        for tensor in tensors
    ]
    return np.concatenate(parts)


def _plus_low_rank(base: torch.Tensor, random: np.random.Generator | None) -> torch.Tensor:
    """The matrix and one of low rank, of about a tenth of its size."""
    import torch

    rows, columns = base.shape
    rank = 1 if random is None else int(random.integers(1, 1 + min(rows, columns, MOST_RANK)))
    exact = base.double()
    scale = float(exact.abs().max()) / 64 or 1 / 64
    change = torch.from_numpy(low_rank(rows, columns, rank, random)) * scale
    most = torch.finfo(base.dtype).max
    return (exact + change).clamp(-most, most).to(base.dtype)


def _parts(
    choice: WordChoice, tensors: Sequence[torch.Tensor], words: Words
) -> dict[int, torch.Tensor]:
    """What became of each tensor, in memory of its own, by the identity of the one it was."""
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(words, ends[:-1])
    return {
        id(tensor): choice.storage.tensor(part.copy(), tuple(tensor.shape))
        for tensor, part in zip(tensors, parts, strict=True)
    }


def _grown(tuned: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The model with more rows of zeros in what has a row for each token."""
    if not rows:
        return tuned
    new: dict[int, torch.Tensor] = {}
    for name, tensor in tuned.items():
        if name.endswith(VOCABULARY) and tensor.ndim == 2 and id(tensor) not in new:
            new[id(tensor)] = _with_rows(tensor, rows)
    return {name: new.get(id(tensor), tensor) for name, tensor in tuned.items()}


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    import torch

    return torch.cat([tensor, tensor.new_zeros(rows, tensor.shape[1])])


def _tell(
    base: Mapping[str, torch.Tensor],
    names: Sequence[str],
    choice: WordChoice,
    before: Words,
    after: Words,
    at: np.ndarray[tuple[int, ...], np.dtype[np.intp]],
) -> list[str]:
    """Each of a few entries that moved: where, and from what to what."""
    ends = np.cumsum([base[name].numel() for name in names])
    values = [choice.storage.tensor(words[at], at.shape).tolist() for words in (before, after)]
    told = []
    for place, old, new in zip(at, *values, strict=True):
        index = int(np.searchsorted(ends, place, side="right"))
        name, shape = names[index], tuple(base[names[index]].shape)
        inside = int(place) - int(ends[index]) + math.prod(shape)
        indices = ", ".join(str(each) for each in np.unravel_index(inside, shape))
        told.append(f"{name}[{indices}] {old!r} to {new!r}")
    return told


def _label(kind: Kind, count: int, entries: int, told: Sequence[str]) -> str:
    """What the tuned model is, for the reader of a counterexample."""
    if not count:
        return "the same values"
    moved = f"{count:,} of {plural(entries, 'entry')} moved"
    return f"{kind} update, {moved}" + (f": {'; '.join(told)}" if count <= _TOLD else "")
