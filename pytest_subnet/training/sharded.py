"""What recording an update takes where several processes train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.memory import TensorsCheckpoint, from_module, unwrapped
from pytest_subnet.checkpoints.processes import joined_processes
from pytest_subnet.checkpoints.spread import SpreadCheckpoint, is_spread, open_spread
from pytest_subnet.errors import CheckpointError
from pytest_subnet.scan.pooling import drifted
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

Held = TensorsCheckpoint | SpreadCheckpoint
"""A model as one process holds it, or as several hold it together."""

_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def open_held(model: torch.nn.Module, when: str) -> Held:
    """The weights of `model` now; with the other processes where there are others."""
    processes = joined_processes()
    if processes.count == 1 and not any(map(is_spread, model.parameters())):
        return from_module(model)
    return open_spread(model, processes, _place(model, when))


def in_this_process(source: Held) -> TensorsCheckpoint:
    """What this process holds of a model."""
    return source.local if isinstance(source, SpreadCheckpoint) else source


def tell_others(model: torch.nn.Module, source: Held, when: str, error: BaseException) -> None:
    """Have the others not wait for this process, where `error` ended the block."""
    if isinstance(source, SpreadCheckpoint) and not isinstance(error, _INTERRUPTS):
        source.processes.tell(_place(model, when), error)


def replaced(
    source: Held, make: Callable[[TensorsCheckpoint], TensorsCheckpoint], doing: str
) -> Held:
    """`source`, with what `make` makes of the tensors that this process holds."""
    if not isinstance(source, SpreadCheckpoint):
        return make(source)
    made: list[TensorsCheckpoint] = []
    source.processes.gather(f"{doing} {source.label}", lambda: made.append(make(source.local)))
    return source.with_local(made[0])


def check_held_alike(before: Held, after: Held) -> None:
    """Raise unless each process holds the same parts as before."""
    if not isinstance(before, SpreadCheckpoint) or not isinstance(after, SpreadCheckpoint):
        return
    for name, parts in before.held.items():
        others = after.held.get(name)
        if others is None or others[0].shape != parts[0].shape or list(others) == list(parts):
            continue
        raise CheckpointError(
            f"{safe(name)} of {safe(after.label)} is spread over the ranks otherwise than before "
            "the block; shard the model before it is recorded"
        )


def check_copies(after: Held, fingerprints: Callable[[], Mapping[str, str]], label: str) -> None:
    """Raise unless weights that several processes hold have the same bits in all of them.

    Buffers may differ: batch statistics are each rank's own until the next forward pass.
    """
    if not isinstance(after, SpreadCheckpoint) or after.processes.count == 1:
        return
    answers = after.processes.gather(
        f"comparing the copies of {label}", lambda: dict(fingerprints())
    )
    for name in after.names():
        if name in after.buffers:
            continue
        for ranks in after.holders(name).values():
            for rank in ranks[1:]:
                if answers[rank][name] != answers[ranks[0]][name]:
                    raise drifted(name, label, ranks[0], rank)


def _place(model: torch.nn.Module, when: str) -> str:
    return f"{when} of the block that records {type(unwrapped(model)).__name__}"
