"""The checkpoints of one run, in order, each aligned with the first."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair


class Trajectory:
    """Checkpoints of one run; made by `open_trajectory`.

    The first one is the start: what "changed" means is always said against it. A run directory
    rarely holds the model that training started from; `open_trajectory` shows how to put it first.

    Attributes:
        names: how messages call each checkpoint, all different; not escaped.
        checkpoints: at least two, in the order of the run.
        pairs: the first checkpoint with each of the others, aligned as `open_pair` does.
        memory: what the floors above have gathered for this trajectory, by their own keys.
        lock: held while something is gathered.
    """

    def __init__(
        self, names: Sequence[str], checkpoints: Sequence[Checkpoint], pairs: Sequence[ModelPair]
    ) -> None:
        """Take what belongs together as it is; `open_trajectory` makes one."""
        self.names = tuple(names)
        self.checkpoints = tuple(checkpoints)
        self.pairs = tuple(pairs)
        self.memory: dict[str, object] = {}
        self.lock = threading.RLock()

    @property
    def label(self) -> str:
        """First and last checkpoint and how many there are; safe to print."""
        between = "->" if len(self.names) == 2 else "…"
        count = plural(len(self.names), "checkpoint")
        return f"{safe(self.names[0])} {between} {safe(self.names[-1])}, {count}"

    def __repr__(self) -> str:
        """One line: which checkpoints."""
        return f"<Trajectory {self.label}>"
