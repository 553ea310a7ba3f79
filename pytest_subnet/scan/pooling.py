"""Counting what several processes hold together: each its part, added up so that all know it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pytest_subnet.checkpoints.spread import SpreadCheckpoint
from pytest_subnet.errors import PairMismatchError, SubnetError
from pytest_subnet.pairs.model_pair import ModelPair
from pytest_subnet.scan.counters import Counters
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.scan.tolerance import Tolerance

    _Answer: TypeAlias = tuple[list[str], bytes, bytes, bytes]
    """What was asked for, and the integers, sums and peaks that were counted."""

    Scan: TypeAlias = Callable[[ModelPair, Sequence[int], Sequence[Tolerance]], Counters]


def is_spread(pair: ModelPair) -> bool:
    """Whether processes hold both sides of `pair` together."""
    return isinstance(pair.base, SpreadCheckpoint) and isinstance(pair.tuned, SpreadCheckpoint)


def scan_together(
    pair: ModelPair, rows: Sequence[int], tolerances: Sequence[Tolerance], scan: Scan
) -> Counters:
    """Count the tensors `rows`, the same in every process.

    Every process counts what it holds. A block that several hold counts as the first of them has
    it. Sums are added in the order of the ranks, so that they are the same everywhere too.

    Args:
        pair: both sides held by the same processes.
        rows: of `pair.tensors`.
        tolerances: as for `scan`.
        scan: counts what this process holds.

    Raises:
        PairMismatchError: processes that hold the same weights count other changes.
        SubnetError: another process could not count, or counts something else.
    """
    base, tuned = pair.base, pair.tuned
    if not isinstance(base, SpreadCheckpoint) or not isinstance(tuned, SpreadCheckpoint):
        raise TypeError("only a pair that processes hold together is counted together")
    local = _part_of(pair, base, tuned)
    held = [row for row in rows if local.tensors[row].numel]

    def count() -> _Answer:
        counted = scan(local, held, tolerances)
        arrays = counted.integers[rows], counted.sums[rows], counted.peaks[rows]
        integers, sums, peaks = (each.tobytes() for each in arrays)
        return asked, integers, sums, peaks

    asked = [*(pair.tensors[row].name for row in rows), *map(str, tolerances)]
    answers = base.processes.gather(f"counting {pair.label}", count)
    for rank, (other, *_) in enumerate(answers):
        if other != answers[0][0]:
            raise SubnetError(
                f"the processes do not measure the same: rank {rank} counts other tensors of "
                f"{pair.label} than rank 0, or under other tolerances; every rank must measure the "
                "same in the same order"
            )
    parts = [_counters(answer, len(rows), tolerances) for answer in answers]
    everything = Counters(len(pair.tensors), tolerances)
    firsts: list[list[int]] = [[] for _ in parts]
    for place, row in enumerate(rows):
        for ranks in base.holders(pair.tensors[row].base_name).values():
            firsts[ranks[0]].append(place)
            if pair.tensors[row].kind != "buffer":
                _check_copies(pair, row, ranks, [part.integers[place] for part in parts])
    index = np.asarray(rows, np.intp)
    for part, places in zip(parts, firsts, strict=True):
        everything.add(index[places], _at(part, places))
    return everything


def _part_of(pair: ModelPair, base: SpreadCheckpoint, tuned: SpreadCheckpoint) -> ModelPair:
    """What this process holds of `pair`, row by row; of some tensors nothing."""
    return ModelPair(
        base.local,
        tuned.local,
        tensors=[replace(each, shape=base.part(each.base_name).size) for each in pair.tensors],
        device=pair.device,
        engine=pair.engine,
    )


def _counters(answer: _Answer, rows: int, tolerances: Sequence[Tolerance]) -> Counters:
    _, integers, sums, peaks = answer
    counters = Counters(rows, tolerances)
    counters.integers = np.frombuffer(integers, np.int64).reshape(rows, -1)
    counters.sums = np.frombuffer(sums).reshape(rows, -1)
    counters.peaks = np.frombuffer(peaks)
    return counters


def _at(part: Counters, places: Sequence[int]) -> Counters:
    chosen = Counters(len(places), part.tolerances)
    chosen.integers, chosen.sums = part.integers[places], part.sums[places]
    chosen.peaks = part.peaks[places]
    return chosen


def _check_copies(
    pair: ModelPair, row: int, ranks: Sequence[int], counts: Sequence[np.ndarray]
) -> None:
    for rank in ranks[1:]:
        if not np.array_equal(counts[rank], counts[ranks[0]]):
            raise drifted(pair.tensors[row].name, pair.label, ranks[0], rank)


def drifted(name: str, label: str, first: int, rank: int) -> PairMismatchError:
    """The error for copies of one weight that should be equal and are not."""
    return PairMismatchError(
        f"{safe(name)} of {safe(label)} is not the same on rank {rank} as on rank {first}: the "
        "copies of the model have drifted apart, and no number is that of all of them; look for a "
        "step that one rank skipped, or for gradients that were not averaged"
    )
