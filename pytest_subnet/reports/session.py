"""What the pairs of a session looked like, gathered over all workers as plain data."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.reports.scanned import left_out, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.reports.scanned import PairTable


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
        own = [table_of(pair, left_out(pair.problems), key) for key, pair in self._pairs]
        for table in (*own, *self._received):
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
