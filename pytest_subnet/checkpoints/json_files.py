"""JSON that must mean one thing: no name twice, no surprise for whoever reads it after us."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import stamp, unreadable
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from pathlib import Path


class DuplicateNameError(ValueError):
    """A JSON object has one name twice; readers differ in which one counts."""


def parse_unique(raw: bytes) -> object:
    """The JSON value in `raw`.

    Raises:
        DuplicateNameError: with the name that an object in it has twice.
        ValueError: it is not JSON in UTF-8.
        RecursionError: it is nested too deeply.
    """
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # JSON's minus zero is no integer to other readers


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateNameError(name)
            seen.add(name)
    return result


def is_text(name: str) -> bool:
    """Whether `name` is Unicode that can be written; JSON can spell half a character."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path, *, unique: bool = False) -> dict[str, object]:
    """The JSON object in the file `path`; `CheckpointError` when it is anything else.

    Args:
        path: the file.
        unique: refuse an object that has one name twice; otherwise the last one counts.
    """
    stamp(path)  # to open a pipe would wait for ever
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        value = parse_unique(raw) if unique else json.loads(raw.decode("utf-8"))
    except DuplicateNameError as error:
        raise CheckpointError(
            f"{safe(path)} lists {short(error)} twice; which one counts cannot be known, "
            "save it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{safe(path)} is not JSON ({short(error)}); save it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{safe(path)} holds no JSON object; save it again")
    return value
