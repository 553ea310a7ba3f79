"""Results as properties of the test report, where JUnit, JSON reports and xdist find them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.text import printable, redacted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_subnet.recording import Recordable

Plain: TypeAlias = bool | int | float | str


class PropertySink:
    """Appends each result's numbers to a test's `user_properties`.

    A property is called `subnet.<finding>.<number>`; the second result of one finding in a test is
    `subnet.<finding>#2.<number>`. Values are plain types and printable text: anything else would
    end an xdist run. Secrets are cut out: reports are handed around.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        """Append to `properties`."""
        self._properties = properties
        self._seen: Counter[str] = Counter()

    def __call__(self, result: Recordable) -> None:
        """As `recording.Sink`."""
        numbers = dict(result.to_dict())
        finding = str(numbers.pop("finding"))
        self._seen[finding] += 1
        count = self._seen[finding]
        prefix = f"subnet.{finding}" if count == 1 else f"subnet.{finding}#{count}"
        self._properties.extend(_flat(prefix, numbers))


def _flat(prefix: str, value: object) -> Iterator[tuple[str, Plain]]:
    match value:
        case dict():
            for key, part in value.items():
                yield from _flat(f"{prefix}.{_shown(key)}", part)
        case list() | tuple():
            if value:
                yield prefix, "; ".join(map(_shown, value))
        case bool():
            yield prefix, value
        case int():
            yield prefix, int(value)
        case float():
            yield prefix, float(value)  # numpy's float64 is a float too
        case None:
            return
        case _:
            yield prefix, _shown(value)


def _shown(value: object) -> str:
    return printable(redacted(str(value)))
