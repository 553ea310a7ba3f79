"""What was measured of matrices, kept where the counts of their pair are, for later runs."""

from __future__ import annotations

import hashlib
import importlib
import json
import types
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from pytest_subnet.scan.gathering import ledger
from pytest_subnet.scan.kept_files import KeptFiles

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs import ModelPair

ROWS_VERSION = 1
"""To be raised when a finding measures another thing: nothing that was kept is found then."""

_MAX_BYTES = 64 * 1024**2
_PLAIN = (str, int, bool, type(None))
_FLOOR = "pytest_subnet.findings."


class KeptRows:
    """The rows that one sort of work gave of the matrices of one pair.

    Rows are found by what the pair is, as its counts are, by the config of its base, which says how
    fused matrices are made up, and by the key of the work. Only rows of plain values are kept, and
    nothing is of a pair that keeps no counts.
    """

    def __init__(self, pair: ModelPair, key: Hashable) -> None:
        """Look at nothing yet."""
        self._pair = pair
        self._files: KeptFiles | None = None
        place, spelt = ledger(pair).cache.place, _spelt(key)
        if place is None or spelt is None:
            return
        directory, pair_is = place
        self._files = KeptFiles(directory / "matrices", _MAX_BYTES)
        config = sorted((name, repr(value)) for name, value in pair.base.config.items())
        parts = repr((pair_is, spelt, config, ROWS_VERSION))
        self._name = f"{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}.json"

    def recall(self, matrices: Iterable[Matrix]) -> dict[Matrix, Any]:
        """The rows of those of `matrices` of which one is kept."""
        entries = self._entries()
        found = {each: self._decoded(each, entries.get(_place(each))) for each in matrices}
        return {each: row for each, row in found.items() if row is not None}

    def remember(self, rows: Mapping[Matrix, Any]) -> None:
        """Keep rows, beside those that are kept already."""
        if self._files is not None and rows:
            encoded = {_place(each): _encoded(row) for each, row in rows.items()}
            if all(encoded.values()):
                entries = self._entries() | encoded
                self._files.store(self._name, json.dumps(entries).encode())

    def _entries(self) -> dict[str, Any]:
        data = None if self._files is None else self._files.load(self._name)
        if data is None:
            return {}
        try:
            entries = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def _decoded(self, matrix: Matrix, entry: object) -> Any:
        """The row that an entry is of; None where it is not what a finding gives of `matrix`."""
        match entry:
            case {"of": str() as named, "row": list() as values}:
                return self._row(matrix, named, values)
            case {"of": str() as named, "rows": [_, *_] as parts}:
                found = tuple(self._row(matrix, named, values) for values in parts)
                return None if None in found else found
        return None

    def _row(self, matrix: Matrix, named: str, values: object) -> Any:
        made = _type_called(named)
        values = _as_tuples(values)
        if made is None or not isinstance(values, tuple) or len(values) != len(made._fields):
            return None
        row = made(*values)
        name = matrix.name(self._pair.tensors[matrix.row])
        return row if _is_plain(row) and row.name.startswith(name) else None


def _spelt(key: object) -> object:
    """A key as plain values, which mean the same in every process; None where it is not made so."""
    match key:
        case None | bool() | int() | float() | str():
            return (key,)
        case tuple():
            parts = tuple(_spelt(each) for each in key)
        case _ if is_dataclass(key) and type(key).__module__.startswith("pytest_subnet."):
            values = (_spelt(getattr(key, each.name)) for each in fields(key))
            parts = (type(key).__qualname__, *values)
        case _:
            return None
    return None if None in parts else parts


def _place(matrix: Matrix) -> str:
    return str(matrix.row) if matrix.at is None else f"{matrix.row}[{matrix.at}]"


def _encoded(row: Any) -> dict[str, object] | None:
    if hasattr(row, "_fields"):
        return {"of": _name_of(row), "row": row} if _is_plain(row) else None
    return {"of": _name_of(row[0]), "rows": row} if all(map(_is_plain, row)) else None


def _name_of(row: object) -> str:
    return f"{type(row).__module__.removeprefix(_FLOOR)}:{type(row).__qualname__}"


def _type_called(name: str) -> Any:
    """A row of one of the findings; None where there is none of that name."""
    module, _, called = name.partition(":")
    if not all(each.isidentifier() for each in (*module.split("."), called)):
        return None
    try:
        found = getattr(importlib.import_module(_FLOOR + module), called, None)
    except ImportError:
        return None
    is_row = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
    return found if is_row else None


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _is_plain(row: Any) -> bool:
    """Whether each field is of the type that it is declared to be, and JSON has such."""
    try:
        hints = get_type_hints(type(row))
    except NameError:  # one that is imported for type checkers alone
        return False
    return all(_fits(value, hints[field]) for field, value in row._asdict().items())


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(each, parts[0]) for each in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return hint in _PLAIN and type(value) is hint
