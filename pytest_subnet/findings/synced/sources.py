"""The two copies, opened; what has no weights is refused by the side it was passed for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.findings.common.holders import model_inside
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source


def open_copies(trainer: Source, rollout: Source) -> tuple[Checkpoint, Checkpoint]:
    """Open what trains and what generates.

    Raises:
        TypeError: one of them is nothing that has weights.
        CheckpointError: one of them cannot be read.
    """
    return _opened("trainer", trainer), _opened("rollout", rollout)


def _opened(role: str, source: Source) -> Checkpoint:
    try:
        return open_checkpoint(source)
    except TypeError:
        held = model_inside(source, role)
        mend = held or (
            "; pass a module (trainer.model), a mapping from names to tensors, or a path, hub id "
            "or address of weights"
        )
        raise TypeError(
            f"{role} is {safe(type(source).__name__)}, which has no weights of its own{mend}"
        ) from None
