"""Files that are written whole or not at all: a run that is killed leaves the old one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MODE = 0o644
"""As an editor creates files; temporary ones are for nobody else."""


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` in UTF-8, with `\n` for line ends; what was there stays until then.

    The text lies on the disk under another name in the same directory before it takes the name.

    Args:
        path: the file; its directory must be there.
        text: without lone surrogates.

    Raises:
        OSError: the directory or the file cannot be written.

    >>> from pathlib import Path
    >>> write_text(Path("verdict.txt"), "passed\n")
    >>> Path("verdict.txt").read_text()
    'passed\n'
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """The same of bytes as they are."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _MODE)  # noqa: PTH101 - what mkstemp gives is no Path
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        raise
