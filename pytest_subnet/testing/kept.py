"""A directory that is made once, whole, by whichever process comes first."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import xxhash

from pytest_subnet.turns import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable

_CONTENTS = "contents.json"
_PATIENCE = 300.0
"""So many seconds another process may take; then this one builds for itself."""


def make_once(directory: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill `directory`, unless it was filled before and is as it was then.

    `make` works in a directory that takes its final name in one rename, with a list of what is in
    it: whoever finds it finds all of it. Where something was written to since, it is made anew.
    Processes that share the place wait for the one that makes it.

    Raises:
        OSError: it is not there and cannot be written.
    """
    if _is_whole(directory):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.with_name(f"{directory.name}.lock")
    with (
        in_turn(lock, _PATIENCE),
        TemporaryDirectory(".draft", prefix=".", dir=directory.parent) as place,
    ):
        if _is_whole(directory):
            return
        draft = Path(place, "draft")
        draft.mkdir()
        make(draft)
        contents = json.dumps(_digests(draft), indent=1)
        (draft / _CONTENTS).write_text(contents, encoding="utf-8")
        with suppress(FileNotFoundError):
            directory.rename(Path(place, "stale"))
        draft.rename(directory)


def _is_whole(directory: Path) -> bool:
    try:
        written = json.loads((directory / _CONTENTS).read_text(encoding="utf-8"))
        return bool(written == _digests(directory))
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged
        return False


def _digests(directory: Path) -> dict[str, str]:
    """A digest of each file below `directory` but the list of them."""
    return {
        path.relative_to(directory).as_posix(): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path != directory / _CONTENTS
    }
