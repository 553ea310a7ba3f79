"""One process after another, where several would do the same work or write the same file."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def in_turn(lock: Path, patience: float) -> Iterator[bool]:
    """Wait until no other process of this machine is in a block with the same lock.

    The system ends the turn of a process that is killed. Where files cannot be locked there is no
    waiting.

    Args:
        lock: a file that is made, with its directory, and stays.
        patience: seconds.

    Yields:
        False when another process still had its turn after that time.
    """
    from filelock import FileLock

    came = True
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=patience))
        except TimeoutError:
            came = False
        # filelock warns, which may be an error here, where all it could do is a lesser lock.
        except (OSError, NotImplementedError, Warning):
            pass
        yield came
