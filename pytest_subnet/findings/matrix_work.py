"""Measuring the matrices of a pair one by one: what every spectral finding goes through.

A finding says what it measures of one matrix; which matrices those are, who does the work, what is
known already and what a user sees meanwhile is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from pytest_subnet import progress
from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.update_matrices import Matrix, matrices_of
from pytest_subnet.pairs.selection import select
from pytest_subnet.text import first_few, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from pytest_subnet.pairs import ModelPair, Selection
    from pytest_subnet.pairs.selection import Patterns

RowT = TypeVar("RowT")
RowT_co = TypeVar("RowT_co", covariant=True)


class MatrixWork(Protocol[RowT_co]):
    """What is measured of a matrix; can be pickled, so that it can be done elsewhere."""

    @property
    def title(self) -> str:
        """What a progress bar calls it: `"rotating"`."""

    @property
    def key(self) -> Hashable:
        """Tells it from any other, with all that its numbers depend on but the matrix."""

    def measure(self, pair: ModelPair, matrix: Matrix) -> RowT_co:
        """Measure one matrix of `pair`."""


class Chosen(NamedTuple):
    """What was selected.

    Attributes:
        matrices: in the order of the pair.
        total: how many matrices the pair has.
        notes: casts, ties, convolutions left out, tensors that do not align.
    """

    matrices: tuple[Matrix, ...]
    total: int
    notes: tuple[str, ...]


def choose_matrices(
    pair: ModelPair,
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
    *,
    what: str,
) -> Chosen:
    """The matrices that patterns select.

    Args:
        pair: base and tuned.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        what: what only matrices have: `"a spectrum"`.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, or one without arithmetic.
        PairMismatchError: a selected tensor does not align.
    """
    selection = select(pair, include, exclude, kinds)
    found = [each for row in selection.rows for each in matrices_of(row, pair.tensors[row])]
    if not found:
        raise SelectionError(
            f"none of {plural(len(selection.rows) + len(selection.apart), 'selected tensor')} is a "
            f"weight of two dimensions or a stack of such, and only these have {what}"
        )
    rows = dict.fromkeys(each.row for each in found)
    refused = [pair.tensors[row] for row in rows if pair.tensors[row].dtype not in ARITHMETIC]
    if refused:
        names = first_few([f"{each.name} ({each.dtype})" for each in refused])
        raise SelectionError(
            f"no arithmetic is known for {plural(len(refused), 'selected matrix')}: {names}; leave "
            "them out with exclude="
        )
    total = sum(1 for row, each in enumerate(pair.tensors) for _ in matrices_of(row, each))
    return Chosen(tuple(found), total, _notes(pair, selection))


def _notes(pair: ModelPair, selection: Selection) -> tuple[str, ...]:
    notes = [*pair.notes, *(f"{safe(name)} is tied, counted once" for name in pair.tied)]
    tensors = [pair.tensors[row] for row in selection.rows]
    left_out = [
        each
        for row, each in zip(selection.rows, tensors, strict=True)
        if len(each.shape) > 2 and not any(matrices_of(row, each))
    ]
    if left_out:
        entries = sum(each.numel for each in left_out)
        share = percent(entries / sum(each.numel for each in tensors))
        notes.append(
            f"{plural(len(left_out), 'tensor')} left out (convolutions, no matrices), "
            f"{plural(entries, 'entry')}: {share} of the selected weights"
        )
    if pair.problems:  # all of them were excluded, or there would be no measure
        notes.append(f"{plural(len(pair.problems), 'tensor')} left out that cannot be compared")
    return tuple(notes)


def measure_matrices(
    pair: ModelPair, matrices: Sequence[Matrix], work: MatrixWork[RowT]
) -> tuple[RowT, ...]:
    """Measure `matrices` of `pair`, each once for all that ask for the same.

    Raises:
        CheckpointError: a side changed since the pair was opened, or cannot be read.
    """
    with pair.lock:
        known: dict[Matrix, RowT] = _known(pair, work.key)
        pair.check_unchanged()
        if pair.base.is_live or pair.tuned.is_live:  # what was measured may have been written to
            known.clear()
        missing = [each for each in matrices if each not in known]
        if missing:
            pair.check_second_names()
            nbytes = [each.nbytes(pair.tensors[each.row]) for each in missing]
            with progress.bar(sum(nbytes), work.title) as advance:
                for matrix, size in zip(missing, nbytes, strict=True):
                    known[matrix] = work.measure(pair, matrix)
                    advance(size)
            pair.check_unchanged()
        return tuple(known[each] for each in matrices)


def _known(pair: ModelPair, key: Hashable) -> dict[Matrix, RowT]:
    everything = pair.memory.setdefault("matrices", {})
    if not isinstance(everything, dict):
        raise TypeError(f"pair.memory['matrices'] is taken by {type(everything).__name__}")
    found: dict[Matrix, RowT] = everything.setdefault(key, {})
    return found
