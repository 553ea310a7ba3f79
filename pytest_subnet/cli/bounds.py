"""What a pair shows, as tables of a policy: which assertions, with which bounds, and why."""

from __future__ import annotations

import fnmatch
import glob
from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_subnet.cli.policies import Table
from pytest_subnet.findings.common.wording import bound_above, bound_below, limit_above
from pytest_subnet.findings.movement.finding import update_movement
from pytest_subnet.findings.sparsity.finding import update_sparsity
from pytest_subnet.text import percent, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pytest_subnet.cli.policies import Value
    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.findings.movement.finding import UpdateMovement
    from pytest_subnet.findings.sparsity.finding import UpdateSparsity
    from pytest_subnet.pairs import ModelPair

_MARGIN = 0.25
"""How much more or less may move: seeds differ by less, learning rates by more."""
_ROOM = 0.02
"""The least that matrices may differ beyond what they do, as a share of their entries."""
_NEIGHBOURS = 3


def tables_of(pair: ModelPair) -> Iterator[Table]:
    """The tables of a policy around what `pair` shows, in the order in which a reader asks.

    They are not tried: whether one of them holds on the pair is for the caller to see.
    """
    everything = update_movement(pair)
    still = {each.name for each in everything.per_tensor if not each.updated}
    trained = _kinds(everything.per_tensor, lambda each: each.moved)
    yield Table(
        "assert_same_structure", {}, ["Every tensor has a partner of its own shape and dtype."]
    )
    yield Table(
        "assert_same_interface", {}, ["Config, tokenizer and chat template are those of the base."]
    )
    yield Table("assert_finite", {}, ["Neither side holds NaN or Inf."])
    yield Table("assert_tied", {}, ["What the base ties is tied in the tuned model."])
    yield from _frozen(everything.per_tensor, still)
    if trained:
        yield Table(
            "assert_updated",
            {"include": "*", "kinds": trained},
            [
                "Every tensor of these kinds moved. One that stands still was not trained, or its "
                "steps were smaller than its dtype can store."
            ],
        )
    for atol in (None, 1e-5):
        yield from _sparsity(update_sparsity(pair, atol=atol), atol)
    if trained:
        yield from _evenness(update_sparsity(pair, kinds=trained), trained)
    yield from _distance(everything)


def _frozen(tensors: Sequence[Movement], still: set[str]) -> Iterator[Table]:
    """What did not move: whole kinds, and of the others whole blocks."""
    kinds = _kinds(tensors, lambda each: each.name in still)
    doubt = "Leave it out if they are trained: rounding can swallow small steps."
    if kinds:
        keywords: dict[str, Value] = {"include": "*", "kinds": kinds}
        yield Table("assert_frozen", keywords, [f"No bit of these kinds changed. {doubt}"])
    blocks = _blocks([each for each in tensors if each.kind not in kinds], still)
    if blocks:
        reason = f"No bit of these blocks changed. {doubt}"
        yield Table("assert_frozen", {"include": blocks}, [reason])


def _kinds(tensors: Iterable[Movement], holds: Callable[[Movement], bool]) -> list[str]:
    """The kinds of which `holds` is true of every tensor."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for each in tensors:
        by_kind[each.kind].append(holds(each))
    return sorted(kind for kind, answers in by_kind.items() if all(answers))


def _blocks(tensors: Sequence[Movement], still: set[str]) -> list[str]:
    """Globs of the blocks of which nothing moved."""
    globs = dict.fromkeys(
        _glob(each) for each in tensors if each.layer is not None and each.name in still
    )
    moved = [each.name for each in tensors if each.name not in still]
    return [one for one in globs if not fnmatch.filter(moved, one)]


def _glob(tensor: Movement) -> str:
    """What matches all of the block that `tensor` is in: `model.layers.3.*`."""
    parts = tensor.name.split(".")
    block = next(at for at, part in enumerate(parts) if part.isdecimal())
    return f"{glob.escape('.'.join(parts[: block + 1]))}.*"


def _sparsity(result: UpdateSparsity, atol: float | None) -> Iterator[Table]:
    """How much moved, a quarter more or less."""
    if not result.updated:
        return
    keywords: dict[str, Value] = {}
    at_least = bound_below(max(1 - (1 + _MARGIN) * result.density, 0))
    at_most = bound_above(1 - (1 - _MARGIN) * result.density)
    if at_least is not None:
        keywords["at_least"] = float(at_least)
    if at_most is not None:
        keywords["at_most"] = float(at_most)
    if atol is not None:
        keywords["atol"] = atol
    kept = "kept their bits" if atol is None else f"stayed within {atol:g} (the paper's tolerance)"
    yield Table(
        "assert_update_sparsity",
        keywords,
        [
            f"{percent(result.sparsity)} of {plural(result.numel, 'entry')} {kept}, "
            f"{result.updated:,} did not ({result.dtype}). The bounds leave room for a quarter "
            "more and a quarter less of these.",
            *_rounding(result),
            "Published nearby; none is a target:",
            *_neighbours(result),
        ],
    )


def _rounding(result: UpdateSparsity) -> list[str]:
    if result.expected_sparsity is None:
        return []
    share = percent(result.expected_sparsity)
    return [f"Rounding alone would leave about {share} unchanged (estimate)."]


def _neighbours(result: UpdateSparsity) -> list[str]:
    compared = result.compare_published(count=_NEIGHBOURS)
    return [
        f"  {percent(row.sparsity)}  {row.algorithm}, {row.tuned or f'from {row.base}'} "
        f"({row.source}, {row.table}, {row.tolerance or 'tolerance not said'}, "
        f"{short_dtype(row.dtype) or 'dtype not said'})"
        for row in compared.nearest
    ]


def _evenness(result: UpdateSparsity, kinds: list[str]) -> Iterator[Table]:
    """How far the matrices that are trained differ."""
    if result.spread is None:
        return
    bound = bound_above(min(max((1 + _MARGIN) * result.spread, result.spread + _ROOM), 1))
    if bound is not None:
        yield Table(
            "assert_even_sparsity",
            {"max_spread": float(bound), "kinds": kinds},
            [
                f"The furthest of {plural(len(result.matrices), 'matrix')} is "
                f"{100 * result.spread:.2f} points from the sparsity of all of them. A part that "
                "is frozen by accident, or trained at another rate, is further off."
            ],
        )


def _distance(result: UpdateMovement) -> Iterator[Table]:
    """How far entries and tensors moved, and twice as far."""
    for value, relative, what in (
        (result.max_change, False, f"No entry moved by more than {result.max_change:.3g}"),
        (
            result.max_relative_change,
            True,
            f"No tensor moved by more than {percent(result.max_relative_change)} of its norm",
        ),
    ):
        limit = limit_above(2 * value)
        if limit is not None and value > 0:
            keywords: dict[str, Value] = {"at_most": float(limit)}
            if relative:
                keywords["relative"] = True
            yield Table("assert_max_change", keywords, [f"{what}; twice as far is allowed."])


def head_of(pair: ModelPair) -> list[str]:
    """The comment at the top of the policy."""
    return [
        f"What {pair.label} shows, as bounds for the next run: written by pytest-subnet suggest, "
        "to be read before it is used. Bounds say what this one run did; tighten those that "
        "matter, and leave out those that do not. Paths are as seen from the directory of "
        "this file.",
        "Delete the line of tuned before this gates another run: a job that forgets "
        "--subnet-tuned then fails, instead of judging this run again.",
        *(f"Note: {safe(note)}" for note in pair.notes),
    ]
