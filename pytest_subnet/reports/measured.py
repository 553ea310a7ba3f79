"""A result as plain data: what travels with a test's report, also from the workers of xdist."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from pytest_subnet.text import printable, redacted, safe, short_dtype

if TYPE_CHECKING:
    from pytest_subnet.recording import Recordable
    from pytest_subnet.reports.run import Frame, Measured, Plain

_FIRST = ("name", "kind", "layer", "shape", "dtype")
_SAID_BY_OTHERS = frozenset({"density", "value_changes", "value_density", "nonfinite"})
"""Properties that follow from other columns, of which there may be 20,000 rows."""

_WORDS = {"expected_sparsity": "sparsity by rounding alone"}


def measured(result: Recordable, *, with_tensors: bool) -> Measured:
    """What a report shows of `result`.

    Args:
        result: of any finding.
        with_tensors: whether its numbers by tensor are wanted too.
    """
    numbers = {text(key): plain(value) for key, value in result.to_dict().items()}
    return {
        "finding": str(numbers.pop("finding", "")),
        "numbers": numbers,
        "tensors": by_tensor(getattr(result, "per_tensor", None)) if with_tensors else None,
    }


def by_tensor(rows: object) -> Frame | None:
    """The numbers of a result's `per_tensor`, a row a tensor; None where it has no such rows.

    Args:
        rows: named tuples or dataclasses, all of one class; of these the texts that name a tensor
            and all fields and properties that are numbers are taken.
    """
    if not isinstance(rows, tuple | list) or not rows or not hasattr(rows[0], "name"):
        return None
    found: dict[str, list[Plain]] = {}
    for column in _columns(rows[0]):
        if column in _FIRST:
            found[column] = [_name(column, getattr(row, column)) for row in rows]
        elif column not in _SAID_BY_OTHERS:
            cells = _numbers([_get(row, column) for row in rows])
            if cells is not None:
                found[column] = cells
    return {
        "columns": list(found),
        "rows": [list(row) for row in zip(*found.values(), strict=True)],
    }


def _columns(row: object) -> list[str]:
    """The fields of a row, then its properties; what names the tensor first."""
    cls = type(row)
    fields = list(getattr(cls, "_fields", ()))
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls)]
    properties = [
        name
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if isinstance(value, property)
    ]
    known = dict.fromkeys([*fields, *properties])
    return [
        *(name for name in _FIRST if name in known),
        *(name for name in known if name not in _FIRST),
    ]


def _name(column: str, value: object) -> str | int | None:
    if column == "shape" and isinstance(value, tuple):
        return "×".join(map(str, value))
    if isinstance(value, str):
        return short_dtype(value) if column == "dtype" else tensor_name(value)
    return value if isinstance(value, int) else None


def _numbers(cells: list[Any]) -> list[Plain] | None:
    """The cells of a column of numbers; None for a column of anything else, or of nothing."""
    kinds = {type(cell) for cell in cells} - {type(None)}
    if kinds == {int}:  # a column is looked at as a whole: there may be 20,000 rows
        return cells
    if not kinds or not kinds <= {int, float}:
        cells = [plain(cell) for cell in cells]
        if not {type(cell) for cell in cells} & {int, float}:
            return None
    return [finite(cell) if isinstance(cell, int | float) else None for cell in cells]


def _get(row: object, column: str) -> object:
    try:
        return getattr(row, column)
    except ArithmeticError:  # a share of nothing
        return None


def finite(value: Any) -> Any:
    """`value`, or None for NaN and Inf, which JSON does not have."""
    return value if value is None or math.isfinite(value) else None


def words_of(key: str) -> str:
    """The name of a number as words; of an estimate, what it is an estimate of."""
    return _WORDS.get(key, key.replace("_", " "))


def plain(value: object) -> object:
    """`value` as JSON has it: no NaN, no Inf, every text printable and without secrets."""
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return finite(float(value))
        case dict():
            return {text(key): plain(part) for key, part in value.items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case _ if type(value).__module__ == "numpy" and not getattr(value, "shape", True):
            return plain(value.item())  # type: ignore[attr-defined]
        case _:
            return text(value)


def text(value: object) -> str:
    """`value` on one line, printable and without secrets."""
    return printable(redacted(str(value)))


def lines(message: str) -> str:
    """A message as it is, line by line, printable and without secrets."""
    found = redacted(message.expandtabs()).split("\n")
    return "\n".join(printable(line) for line in found)


def tensor_name(name: str) -> str:
    """The name of a tensor as every report has it."""
    # Most names are what they seem, and there may be 20,000 of them.
    name = redacted(name)
    return name if len(name) <= 200 and name.isprintable() else safe(name)
