"""What the pairs of a session looked like, gathered over all workers as plain data."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import pytest

from pytest_subnet.reports.measured import finite, tensor_name, text
from pytest_subnet.text import plural, redacted, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.reports.run import Side

Row: TypeAlias = tuple[
    int | None, str, str, int, int, int, str, str, float | None, float | None, float | None
]
"""Of one tensor: layer, kind, dtype, entries, entries with other bits, entries beyond 1e-5, name,
shape, largest change, norm of the change, norm of the base; None for what is no number."""


class PairTable(TypedDict):
    """What was scanned of one pair; plain types, for xdist.

    Attributes:
        key: tells the pair from every other, in every worker.
        pair: `base -> tuned`; safe to print.
        base: the checkpoint before.
        tuned: the checkpoint after.
        notes: what a reader of the numbers must know.
        total: tensors in the pair, buffers and integer tensors apart.
        rows: by the tensor's number in the pair.
        read: how many tensors were read, by every worker.
        taken: how many were not, because the scan cache had their counts.
    """

    key: str
    pair: str
    base: Side
    tuned: Side
    notes: list[str]
    total: int
    rows: dict[int, Row]
    read: int
    taken: int


class SessionReport:
    """The pairs of this process, and what workers sent of theirs."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._pairs: list[tuple[str, ModelPair]] = []
        self._received: list[PairTable] = []

    def watch(self, pair: ModelPair) -> None:
        """Show `pair` at the end of the run."""
        self._pairs.append((_key(pair), pair))

    def receive(self, tables: Iterable[PairTable]) -> None:
        """Take what a worker scanned."""
        self._received.extend(tables)

    def tables(self) -> list[PairTable]:
        """One table a pair that was scanned; what two workers both scanned is there once."""
        merged: dict[str, PairTable] = {}
        for table in (*(_table(key, pair) for key, pair in self._pairs), *self._received):
            known = merged.setdefault(table["key"], _without_rows(table))
            known["rows"].update(table["rows"])
            for mine, theirs in (
                (known["base"], table["base"]),
                (known["tuned"], table["tuned"]),
            ):
                mine["fingerprint"] = mine["fingerprint"] or theirs["fingerprint"]
            known["read"] += table["read"]
            known["taken"] += table["taken"]
        found = [table for table in merged.values() if table["rows"]]
        return sorted(found, key=lambda table: (table["pair"], table["key"]))


def _without_rows(table: PairTable) -> PairTable:
    base, tuned = table["base"].copy(), table["tuned"].copy()
    return {**table, "base": base, "tuned": tuned, "rows": {}, "read": 0, "taken": 0}


def _key(pair: ModelPair) -> str:
    """What makes the pair what it is: the files as they are, and how they were aligned."""
    parts = (
        pair.label,
        pair.base.identity(),
        pair.tuned.identity(),
        pair.notes,
        sorted(pair.renamed.items()),
        len(pair.tensors),
    )
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _table(key: str, pair: ModelPair) -> PairTable:
    import numpy as np

    from pytest_subnet.scan.counters import BASE_SQUARES, DELTA_SQUARES
    from pytest_subnet.scan.gathering import ledger
    from pytest_subnet.scan.tolerance import PAPER, SAME_BITS

    known = ledger(pair)
    scanned = known.scanned.tolist()
    rows: dict[int, Row] = {}
    if scanned:
        changed, beyond = known.updated(SAME_BITS).tolist(), known.updated(PAPER).tolist()
        peaks, norms = known.peaks.tolist(), np.sqrt(known.sums).tolist()
        for row in scanned:
            tensor = pair.tensors[row]
            if tensor.is_weight:
                rows[row] = (
                    tensor.layer,
                    tensor_name(tensor.kind),
                    short_dtype(tensor.dtype),
                    tensor.numel,
                    changed[row],
                    beyond[row],
                    tensor_name(tensor.name),
                    "×".join(map(str, tensor.shape)),
                    finite(peaks[row]),
                    finite(norms[row][DELTA_SQUARES]),
                    finite(norms[row][BASE_SQUARES]),
                )
    return {
        "key": key,
        "pair": redacted(pair.label),
        "base": _side(pair.base),
        "tuned": _side(pair.tuned),
        "notes": [text(note) for note in (*pair.notes, *_left_out(pair))],
        "total": sum(tensor.is_weight for tensor in pair.tensors),
        "rows": rows,
        "read": known.read,
        "taken": known.taken,
    }


def _side(checkpoint: Checkpoint) -> Side:
    # A fingerprint takes a reading of the whole: it is shown where someone asked for it before.
    label = safe(redacted(checkpoint.label))
    return {"label": label, "fingerprint": checkpoint.known_fingerprint}


def _left_out(pair: ModelPair) -> list[str]:
    if not pair.problems:
        return []
    return [f"{plural(len(pair.problems), 'tensor')} not compared: no partner, or another shape"]


class WorkerTables:
    """Receives the tables of xdist's workers; without xdist nobody calls it."""

    def __init__(self, report: SessionReport) -> None:
        """Hand them to `report`."""
        self._report = report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """A worker has ended; one that crashed leaves nothing."""
        output = getattr(node, "workeroutput", None) or {}
        self._report.receive(output.get("subnet", []))


report_key = pytest.StashKey[SessionReport]()
