"""Pairs of a tiny model and what became of it, in memory."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.pairs.kinds import VOCABULARY
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.strategies.arguments import (
    check_flag,
    check_kinds,
    check_strategy,
    drawn_name,
    sampled,
)
from pytest_subnet.strategies.kernels import ready_kernels
from pytest_subnet.strategies.moving import (
    KINDS,
    Kind,
    everywhere,
    low_rank,
    rounded,
    scattered,
)
from pytest_subnet.strategies.state_dicts import STORED, state_dicts
from pytest_subnet.strategies.words import SEEDS, choose_words
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_subnet.pairs.model_pair import ModelPair
    from pytest_subnet.strategies.words import WordChoice, Words

_BASES = state_dicts()
_GROWN = st.integers(0, 3)
_SELECTIONS = st.integers(0, 63)
_FEW = (slice(1), slice(-1, None), slice(1, None))
"""What the first selections of tensors are: the first tensor, the last, all but the first."""
_TOLD = 3  # so many entries that moved are told one by one


@st.composite
def model_pairs(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    bases: st.SearchStrategy[Mapping[str, torch.Tensor]] | None = None,
    kinds: st.SearchStrategy[Kind] | tuple[Kind, ...] = KINDS,
    allow_identical: bool = True,
    allow_grown_vocab: bool = True,
) -> ModelPair:
    """A strategy for pairs of two models in memory, aligned, the second an update of the first.

    The update is of one of the kinds that `updates` draws, over the whole model or some of its
    tensors; a low-rank one is of every matrix there, and is rounded to the dtype. Heads that are
    tied in the base are tied in the tuned model. A pair of which the vocabulary grew is opened with
    `vocab="common"`. Pairs shrink towards one tensor of one entry that moves from 0 to 1; what
    moved is told by the pair's `repr`.

    The first draw of a process also loads what measures pairs, in about a second, or compiles it:
    else the first example would be over Hypothesis's deadline.

    Args:
        bases: what the base may be, mappings from names to tensors, as `model.state_dict()`; None:
            `state_dicts()`. Tensors that are not bfloat16, float16, float32 or float64 stay as they
            are.
        kinds: which of the four kinds of updates to draw, as a strategy or a tuple.
        allow_identical: whether there may be pairs in which nothing moved.
        allow_grown_vocab: whether embedding and head of the tuned model may have more rows.

    Raises:
        InvalidArgument: `bases` is no strategy or drew what is no mapping of tensors, `kinds` has
            none or unknown ones, an `allow_` is no bool, or there must be an update and the base
            has no entry that can move.

    >>> from hypothesis import given
    >>> from pytest_subnet import update_sparsity
    >>> @given(model_pairs())
    ... def test_sparsity_and_density_are_all(pair):
    ...     found = update_sparsity(pair)
    ...     assert found.updated + found.sparsity * found.numel == found.numel
    >>> test_sparsity_and_density_are_all()
    """
    check_strategy("bases", bases)
    check_kinds(kinds, KINDS)
    check_flag("allow_identical", allow_identical)
    check_flag("allow_grown_vocab", allow_grown_vocab)
    kind = cast("Kind", drawn_name("kinds", draw(sampled(kinds)), KINDS))
    base = _drawn_base(draw(_BASES if bases is None else bases))
    groups = _groups(base)
    # Of all at the first draw: after that a draw that takes long fails the test.
    ready_kernels({*STORED, *groups})
    if not groups and not allow_identical:
        raise InvalidArgument(
            "bases drew a model without an entry that can move; use allow_identical=True"
        )
    main = choose_words(next(iter(groups), "bfloat16"))
    # All kinds draw the same, so that each can shrink to one that is simpler.
    seed = draw(SEEDS)
    ranks = draw(main.few if allow_identical else main.one_or_more)
    grown = draw(_GROWN) if allow_grown_vocab else 0
    moving = _selected(draw(_SELECTIONS), [name for names in groups.values() for name in names])
    tuned: dict[int, torch.Tensor] = {}
    told: list[str] = []
    count = 0
    for dtype, names in groups.items():
        choice = choose_words(dtype)
        tensors = [base[name] for name in names]
        before = np.concatenate([choice.storage.words(tensor) for tensor in tensors])
        after = before.copy()
        if ranks:
            parts = zip(names, tensors, _split(after, tensors), strict=True)
            chosen = [(tensor, part) for name, tensor, part in parts if name in moving]
            if chosen:
                _move(kind, choice, chosen, choice.words(ranks), seed)
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


def _selected(selection: int, names: Sequence[str]) -> set[str]:
    """Which tensors move, at least one.

    The least selections are all that a small model needs. The others go by name, so that a tensor
    still moves when others have shrunk away.
    """
    if selection < len(_FEW):
        return set(names[_FEW[selection]] or names)
    still = selection % 4  # of 8
    moving = {name for name in names if zlib.crc32(f"{selection} {name}".encode()) % 8 >= still}
    return moving or set(names)


def _move(
    kind: Kind,
    choice: WordChoice,
    chosen: Sequence[tuple[torch.Tensor, Words]],
    moved: Sequence[int],
    seed: int,
) -> None:
    """Update the words of some tensors in place.

    Args:
        kind: of the update.
        choice: what their words are drawn from.
        chosen: tensors, and their words to write to.
        moved: what entries become that move one by one; as many directions has a low-rank update.
        seed: 0 leaves nothing to chance.
    """
    random = np.random.default_rng(seed) if seed else None
    if kind == "sparse":
        for tensor, words in chosen:
            words[:] = scattered(choice, words, tuple(tensor.shape), moved, random)
        return
    before = np.concatenate([words for _, words in chosen])
    after = _moved(kind, choice, before, [tensor for tensor, _ in chosen], len(moved), seed)
    if np.array_equal(before, after):  # rounding swallowed all of it: one entry moves
        return _move("sparse", choice, chosen[:1], moved[:1], seed)
    for (_, words), new in zip(chosen, _split(after, [each for each, _ in chosen]), strict=True):
        words[:] = new


def _moved(
    kind: Kind,
    choice: WordChoice,
    base: Words,
    tensors: Sequence[torch.Tensor],
    most_rank: int,
    seed: int,
) -> Words:
    """The words of some tensors after an update that is not sparse, all of them in one."""
    storage = choice.storage
    if kind == "dense":
        return everywhere(base, storage, seed)
    if kind == "rounded":
        return storage.words(rounded(storage.tensor(base, base.shape), storage, seed)[0])
    random = np.random.default_rng(seed) if seed else None
    parts = [
        storage.words(_plus_low_rank(tensor, most_rank, random) if tensor.ndim == 2 else tensor)
        for tensor in tensors
    ]
    return np.concatenate(parts)


def _plus_low_rank(
    base: torch.Tensor, most_rank: int, random: np.random.Generator | None
) -> torch.Tensor:
    """The matrix and one of low rank, of about a tenth of its size."""
    import torch

    rows, columns = base.shape
    rank = min(rows, columns, most_rank)
    exact = base.double()
    scale = float(exact.abs().max()) / 64 or 1 / 64
    change = torch.from_numpy(low_rank(rows, columns, rank, random)) * scale
    most = torch.finfo(base.dtype).max
    return (exact + change).clamp(-most, most).to(base.dtype)


def _split(words: Words, tensors: Sequence[torch.Tensor]) -> list[Words]:
    """The words of each tensor, where they are; there may be more words."""
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    return np.split(words, ends)[:-1]


def _parts(
    choice: WordChoice, tensors: Sequence[torch.Tensor], words: Words
) -> dict[int, torch.Tensor]:
    """What became of each tensor, in memory of its own, by the identity of the one it was."""
    return {
        id(tensor): choice.storage.tensor(part.copy(), tuple(tensor.shape))
        for tensor, part in zip(tensors, _split(words, tensors), strict=True)
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
