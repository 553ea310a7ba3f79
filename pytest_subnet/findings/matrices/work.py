"""Measuring the matrices of a pair one by one: what every spectral finding goes through.

A finding says what it measures of one matrix; which matrices those are, what is known already and
what a user sees meanwhile is decided here. Who does the work: `matrix_engines.py`.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pytest_subnet import progress
from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.matrices.engines import batches_of, shared_out
from pytest_subnet.findings.matrices.rows import KeptRows
from pytest_subnet.findings.matrices.updates import Matrix, matrices_of
from pytest_subnet.pairs.causal_lm import free_bytes
from pytest_subnet.pairs.selection import select
from pytest_subnet.scan.gathering import ledger
from pytest_subnet.text import first_few, percent, plural, safe, size

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from pytest_subnet.findings.matrices.engines import MatrixWork
    from pytest_subnet.pairs import ModelPair, Selection
    from pytest_subnet.pairs.selection import Patterns

RowT = TypeVar("RowT")

_WORTH_SAYING = 60.0
"""Seconds that a run takes at least, for a line to say so."""

_FIRST_ELSEWHERE = 0.1
"""Share of the work after which that is known of many workers: each has done some."""

_KEPT_EVERY = 60.0
"""Seconds after which what was measured is kept: a run may be killed."""

_clock = time.monotonic


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
    pair: ModelPair,
    matrices: Sequence[Matrix],
    work: MatrixWork[RowT],
    *,
    answers: Callable[[RowT, Matrix], bool] | None = None,
) -> tuple[RowT, ...]:
    """Measure `matrices` of `pair`, each once for all that ask for the same.

    What was measured before is not measured again, in this process or, of files, in another that
    keeps what it counts in the same directory. Of a side that is live it is: torch does not tell of
    every write.

    Args:
        pair: base and tuned.
        matrices: which, each once.
        work: what is measured of them.
        answers: whether a row that is known of a matrix is all that is asked; None for always.

    Raises:
        CheckpointError: a side changed since the pair was opened, or cannot be read.
    """
    with pair.lock:
        pair.check_unchanged()
        known: dict[Matrix, RowT] = _known(pair, work.key)
        if pair.base.is_live or pair.tuned.is_live:
            known.clear()
        missing = _unanswered(matrices, known, answers)
        if missing:
            kept = KeptRows(pair, work.key)
            missing = _recall(pair, kept, known, missing, answers)
        if missing:
            with ledger(pair).cache.turn(".matrices"):  # another process may measure them just now
                missing = _recall(pair, kept, known, missing, answers)
                if missing:
                    _measure(pair, kept, known, missing, work)
        return tuple(known[each] for each in matrices)


def _known(pair: ModelPair, key: Hashable) -> dict[Matrix, RowT]:
    everything = pair.memory.setdefault("matrices", {})
    if not isinstance(everything, dict):
        raise TypeError(f"pair.memory['matrices'] is taken by {type(everything).__name__}")
    found: dict[Matrix, RowT] = everything.setdefault(key, {})
    return found


def _unanswered(
    matrices: Sequence[Matrix],
    known: dict[Matrix, RowT],
    answers: Callable[[RowT, Matrix], bool] | None,
) -> list[Matrix]:
    return [
        each
        for each in matrices
        if each not in known or (answers is not None and not answers(known[each], each))
    ]


def _recall(
    pair: ModelPair,
    kept: KeptRows,
    known: dict[Matrix, RowT],
    missing: Sequence[Matrix],
    answers: Callable[[RowT, Matrix], bool] | None,
) -> list[Matrix]:
    """Take what another process measured of what is `missing`; gives what it did not."""
    found = kept.recall(missing)
    still = _unanswered(missing, found, answers)
    taken = set(missing).difference(still)
    known.update((each, found[each]) for each in taken)
    ledger(pair).taken += len({each.row for each in taken})
    return still


def _measure(
    pair: ModelPair,
    kept: KeptRows,
    known: dict[Matrix, RowT],
    missing: Sequence[Matrix],
    work: MatrixWork[RowT],
) -> None:
    """Measure what is `missing`; what was measured before an error or an interrupt is kept too."""
    _check_room(pair, missing)
    pair.check_second_names()
    fresh: dict[Matrix, RowT] = {}

    def keep() -> None:
        pair.check_unchanged()
        known.update(fresh)
        kept.remember(fresh)

    since = _clock()
    try:
        for matrix, row in _results(pair, missing, work):
            fresh[matrix] = row
            if _clock() - since >= _KEPT_EVERY:
                keep()
                since = _clock()
    finally:
        keep()
        ledger(pair).read += len({each.row for each in fresh})


def _check_room(pair: ModelPair, matrices: Sequence[Matrix]) -> None:
    """Raise for a matrix that does not fit where it would be measured."""
    if pair.engine == "ray" or pair.device not in (None, "cpu"):
        return  # not here, or where torch says so itself
    free = free_bytes("cpu")
    largest = max(matrices, key=lambda each: _room(pair, each))
    needed = _room(pair, largest)
    if free is not None and needed > free:
        name = safe(largest.name(pair.tensors[largest.row]))
        rows, columns = largest.shape
        raise SelectionError(
            f"{name} of {rows:,} x {columns:,} needs about {size(needed)} of memory, and "
            f"{size(free)} are free; leave it out with exclude=, or measure where there is more"
        )


def _room(pair: ModelPair, matrix: Matrix) -> int:
    """About what a matrix takes: two of it in single precision, two Gram matrices in double."""
    width = 8 if pair.tensors[matrix.row].dtype == "float64" else 4
    return 2 * (width * matrix.numel + 8 * min(matrix.shape) ** 2)


def _results(
    pair: ModelPair, matrices: Sequence[Matrix], work: MatrixWork[RowT]
) -> Iterator[tuple[Matrix, RowT]]:
    """The rows as they come, under a bar, and a line above it where that takes its time."""
    batches = batches_of(pair, matrices, work)
    nbytes = [sum(each.nbytes(pair.tensors[each.row]) for each in b) for b in batches]
    forecast = _Forecast(work.title, matrices, _FIRST_ELSEWHERE if pair.engine == "ray" else 0.0)
    engine, shared = shared_out(pair, matrices, work)
    with (
        progress.bar(sum(nbytes), work.title) as advance,
        closing(engine.map(shared, batches)) as done,
    ):
        for position, rows in done:
            yield from zip(batches[position], rows, strict=True)
            advance(nbytes[position])
            forecast.done(batches[position])


class _Forecast:
    """Says how long it will take, once that is known, if that is more than a minute."""

    def __init__(self, title: str, matrices: Sequence[Matrix], least: float) -> None:
        """Start the clock; `least` is the share of the work after which the rest is known."""
        self._line = f"{title}, {plural(len(matrices), 'matrix')}: about"
        self._total = sum(map(_cost, matrices))
        self._done, self._least = 0, least * self._total
        self._start = _clock()
        self._is_known = False

    def done(self, batch: Sequence[Matrix]) -> None:
        """Some matrices have been measured."""
        self._done += sum(map(_cost, batch))
        if self._is_known or self._done < self._least:
            return
        self._is_known = True
        seconds = (_clock() - self._start) * self._total / self._done
        if seconds > _WORTH_SAYING:
            hours, minutes = divmod(round(seconds / 60), 60)
            progress.say(f"{self._line} {f'{hours} h ' if hours else ''}{minutes} min")


def _cost(matrix: Matrix) -> int:
    """About what a matrix takes, in any unit: its Gram matrix, and the eigenvalues of that."""
    short, long = sorted(matrix.shape)
    return short * short * (long + 4 * short)
