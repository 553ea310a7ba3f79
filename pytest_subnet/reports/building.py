"""A `Run` from what a session gathered, or from the pairs alone."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.reports.measured import text
from pytest_subnet.reports.run import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.reports.run import Frame, Pair, Run, Test
    from pytest_subnet.reports.scanned import PairTable, Row

_PACKAGES = (
    *("pytest-subnet", "pytest", "pytest-xdist", "torch", "transformers", "safetensors"),
    *("huggingface_hub", "numpy", "numba", "scipy", "peft", "compressed-tensors", "ray"),
)
_COLUMNS = [
    *("name", "kind", "layer", "dtype", "shape", "entries", "updated", "beyond"),
    *("max_change", "change_norm", "base_norm"),
]
_PUBLISHED = ["source", "model", "algorithm", "tolerance", "dtype", "sparsity", "comparable"]


def run_of(
    tables: Sequence[PairTable],
    *,
    tests: Sequence[Test] = (),
    passed: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Run:
    """What every report shows.

    Args:
        tables: the pairs that were scanned, as `SessionReport.tables()` has them.
        tests: in the order in which they ran; none where there were none.
        passed: whether everything that ran passed, and something did.
        settings: device, engine and whatever else was asked for, beside versions and platform.
    """
    return {
        "version": VERSION,
        "passed": passed,
        "counts": dict(Counter(test["outcome"] for test in tests)),
        "tests": list(tests),
        "pairs": [_pair(table) for table in tables],
        "environment": _environment(settings or {}),
    }


def _pair(table: PairTable) -> Pair:
    rows = [row for _, row in sorted(table["rows"].items())]
    return {
        "pair": table["pair"],
        "base": table["base"],
        "tuned": table["tuned"],
        "notes": table["notes"],
        "total": table["total"],
        "entries": sum(row[3] for row in rows),
        "updated": sum(row[4] for row in rows),
        "beyond": sum(row[5] for row in rows),
        "tensors": {"columns": _COLUMNS, "rows": [_cells(row) for row in rows]},
        "published": _published(rows),
    }


def _cells(row: Row) -> list[str | int | float | None]:
    layer, kind, dtype, entries, updated, beyond, name, shape, *sizes = row
    return [name, kind, layer, dtype, shape, entries, updated, beyond, *sizes]


def _published(rows: Sequence[Row]) -> Frame:
    """The published sparsities nearest to that of the pair, under the tolerance most of them use.

    Of several dtypes the one counts that most entries have.
    """
    from pytest_subnet.published import compare_published
    from pytest_subnet.scan.tolerance import PAPER

    entries: Counter[str] = Counter()
    for row in rows:
        entries[row[2]] += row[3]
    total = entries.total()
    if not total:
        return {"columns": _PUBLISHED, "rows": []}
    compared = compare_published(
        1 - sum(row[5] for row in rows) / total,
        tolerance=PAPER,
        dtype=entries.most_common(1)[0][0],
    )
    return {
        "columns": _PUBLISHED,
        "rows": [
            [
                f"{row.source}, {row.table}",
                row.tuned or (f"from {row.base}" if row.base else None),
                row.algorithm,
                None if row.tolerance is None else str(row.tolerance),
                row.dtype or None,
                row.sparsity,
                row in compared.comparable,
            ]
            for row in compared.nearest
        ],
    }


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Versions without importing anything, and no name of this machine."""
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found.update(settings)
    return {key: text(value) for key, value in found.items()}
