"""What the pairs of a session looked like, gathered over all workers as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import pytest

if TYPE_CHECKING:
    from pytest_subnet.pairs import ModelPair

Row = tuple[int | None, str, int, int, int]
"""Layer, kind, entries, entries with other bits, entries beyond 1e-5."""


class PairTable(TypedDict):
    """What was scanned of one pair.

    Attributes:
        pair: `base -> tuned`.
        total: tensors in the pair, buffers and integer tensors apart.
        rows: by the tensor's number in the pair.
    """

    pair: str
    total: int
    rows: dict[int, Row]


class SessionReport:
    """The pairs of this process, and what workers sent of theirs."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._pairs: list[ModelPair] = []
        self._received: list[PairTable] = []

    def watch(self, pair: ModelPair) -> None:
        """Show `pair` at the end of the run."""
        self._pairs.append(pair)

    def receive(self, tables: list[PairTable]) -> None:
        """Take what a worker scanned."""
        self._received.extend(tables)

    def tables(self) -> list[PairTable]:
        """One table a pair; what two workers both scanned is there once."""
        merged: dict[str, PairTable] = {}
        for table in (*map(_table, self._pairs), *self._received):
            known = merged.setdefault(table["pair"], {**table, "rows": {}})
            known["rows"].update(table["rows"])
        return [table for table in merged.values() if table["rows"]]


def _table(pair: ModelPair) -> PairTable:
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
                rows[row] = (tensor.layer, tensor.kind, tensor.numel, changed[row], beyond[row])
    total = sum(tensor.is_weight for tensor in pair.tensors)
    return {"pair": pair.label, "total": total, "rows": rows}


class WorkerTables:
    """Receives the tables of xdist's workers; registered only where xdist is there."""

    def __init__(self, report: SessionReport) -> None:
        """Hand them to `report`."""
        self._report = report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """A worker has ended; one that crashed leaves nothing."""
        output = getattr(node, "workeroutput", None) or {}
        self._report.receive(output.get("subnet", []))


report_key = pytest.StashKey[SessionReport]()
