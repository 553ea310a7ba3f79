"""How messages speak of damaged files: escaped, and never longer than a line or two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

_LONGEST = 200


def short(value: object) -> str:
    """`value` escaped, and cut where a damaged file made it endless.

    >>> short("a.weight"), len(short("x" * 1_000_000))
    ('a.weight', 201)
    """
    text = str(value)
    return safe(text) if len(text) <= _LONGEST else f"{safe(text[:_LONGEST])}…"


def broken(path: Path | str, what: str) -> NoReturn:
    """Raise the error for a file that is not what its format says."""
    raise CheckpointError(
        f"{safe(path)} is truncated or corrupt: {what}; save or download it again"
    )


def looked_in(path: str) -> str:
    """Where a relative path was looked for; nothing of one that says so itself.

    >>> looked_in("/runs/step-400")
    ''
    """
    if os.path.isabs(os.path.expanduser(path)):  # noqa: PTH111, PTH117 - pathlib's may raise
        return ""
    return f" (looked in {safe(Path.cwd())})"
