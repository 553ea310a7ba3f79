"""What the pairs of a session looked like, gathered over all workers as plain data."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import pytest

from pytest_subnet.text import plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_subnet.pairs import ModelPair


Row: TypeAlias = tuple[int | None, str, str, int, int, int]
"""Of one tensor: layer, kind, dtype, entries, entries with other bits, entries beyond 1e-5."""


class PairTable(TypedDict):
    """What was scanned of one pair; plain types, for xdist.

    Attributes:
        key: tells the pair from every other, in every worker.
        pair: `base -> tuned`; safe to print.
        notes: what a reader of the numbers must know.
        total: tensors in the pair, buffers and integer tensors apart.
        rows: by the tensor's number in the pair.
        read: how many tensors were read, by every worker.
        taken: how many were not, because the scan cache had their counts.
    """

    key: str
    pair: str
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
            known = merged.setdefault(table["key"], {**table, "rows": {}, "read": 0, "taken": 0})
            known["rows"].update(table["rows"])
            known["read"] += table["read"]
            known["taken"] += table["taken"]
        found = [table for table in merged.values() if table["rows"]]
        return sorted(found, key=lambda table: (table["pair"], table["key"]))


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
    from pytest_subnet.scan.gathering import ledger
    from pytest_subnet.scan.tolerance import PAPER, SAME_BITS

    known = ledger(pair)
    scanned = known.scanned.tolist()
    rows: dict[int, Row] = {}
    if scanned:
        changed, beyond = known.updated(SAME_BITS).tolist(), known.updated(PAPER).tolist()
        for row in scanned:
            tensor = pair.tensors[row]
            if tensor.is_weight:
                rows[row] = (
                    tensor.layer,
                    safe(tensor.kind),
                    short_dtype(tensor.dtype),
                    tensor.numel,
                    changed[row],
                    beyond[row],
                )
    return {
        "key": key,
        "pair": pair.label,
        "notes": [*pair.notes, *_left_out(pair)],
        "total": sum(tensor.is_weight for tensor in pair.tensors),
        "rows": rows,
        "read": known.read,
        "taken": known.taken,
    }


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
