"""Before and after of a model in memory, around a block that trains it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.pairs.model_pair import ModelPair
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.scan.gathering import declare, gather
from pytest_subnet.scan.tolerance import SAME_BITS, Tolerance
from pytest_subnet.text import plural, safe, size
from pytest_subnet.training.sharded import (
    Held,
    check_copies,
    check_held_alike,
    in_this_process,
    open_held,
    replaced,
    tell_others,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from types import TracebackType

    import torch

    from pytest_subnet.checkpoints.base import Buffer

KeepOn: TypeAlias = Literal["cpu", "device"]

_log = logging.getLogger("pytest_subnet")


class RecordedUpdate(ModelPair):
    """The pair before → after; it can be measured once the block has ended.

    Attributes:
        kept_bytes: what the copy of the weights before costs.
        kept_on: where that copy is: `"cpu"` or `"device"`.
    """

    def __init__(self, kept_bytes: int, kept_on: KeepOn) -> None:
        """Not measurable yet."""
        self.kept_bytes = kept_bytes
        self.kept_on = kept_on
        self._state = (
            "is still being recorded: measure it after the `with` block, when the block has ended"
        )

    def finish(self, before: Held, after: Held) -> None:
        """Align and count now, and freeze: the model may move on."""
        check_held_alike(before, after)
        aligned = open_pair(before, after)
        declare(aligned, self.__dict__.pop("tolerances", ()))
        gather(aligned, range(len(aligned.tensors)), SAME_BITS)
        frozen = replaced(after, _Frozen, "freezing")
        check_copies(frozen, lambda: _prints(frozen), aligned.label)
        self.__dict__.update(aligned.__dict__, tuned=frozen)
        self._identities = before.identity(), frozen.identity()
        self._state = ""

    def give_up(self, error: BaseException, when: str) -> None:
        """There is no update, because of `error`."""
        self._state = f"was not recorded: {when} raised {type(error).__name__}"

    def __getattr__(self, name: str) -> object:
        """Only reached for what is not there before the block has ended."""
        if name.startswith("__") or not self.__dict__.get("_state"):
            raise AttributeError(name)
        raise SubnetError(f"this update {self._state}")

    def __repr__(self) -> str:
        """One line, at any time."""
        kept = f"{size(self.kept_bytes)} kept on {self.kept_on}"
        if self._state:
            return f"<RecordedUpdate {self._state.partition(':')[0]}, {kept}>"
        return f"<RecordedUpdate {self.label}: {plural(len(self.tensors), 'tensor')}, {kept}>"


class Recording(AbstractContextManager[RecordedUpdate]):
    """What `record_update` gives: the block to enter, and nothing that can be measured."""

    def __init__(
        self, model: torch.nn.Module, keep_on: KeepOn, tolerances: tuple[Tolerance, ...]
    ) -> None:
        """Nothing is copied before the block is entered."""
        self._arguments = model, keep_on, tolerances
        self._blocks: list[AbstractContextManager[RecordedUpdate]] = []

    def __enter__(self) -> RecordedUpdate:
        """Copy the weights before; every block that is entered is an update of its own."""
        self._blocks.append(_recorded(*self._arguments))
        return self._blocks[-1].__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Compare them with the weights after."""
        return self._blocks.pop().__exit__(kind, error, traceback)

    def __getattr__(self, name: str) -> object:
        """Only reached for what an update has and this has not."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise SubnetError(
            "nothing was recorded: use `with record_update(model) as update:` around the training "
            "step, and measure `update` after the block"
        )


def record_update(
    model: torch.nn.Module, *, keep_on: KeepOn = "cpu", tolerances: Iterable[Tolerance] = ()
) -> Recording:
    """Record what a block of code does to the weights of `model`.

    The weights before are copied, once, and compared with the model's own when the block ends: its
    cost is one copy of the model (logged before it is made, and in `.kept_bytes`). Parameters may
    be replaced in the block; `torch.compile` and `DistributedDataParallel` are looked through.
    Where torch's process group has several ranks, all of them must record and measure, in the same
    order: each keeps and compares what it holds, shards (`DTensor`) or a copy, and all get the
    counts of the whole model.

    Args:
        model: a module; its parameters and persistent buffers are recorded.
        keep_on: where to keep the copy: `"cpu"`, or `"device"`, beside each tensor, which is faster
            to compare for a model on a GPU.
        tolerances: to count besides same bits and 1e-5.

    Returns:
        A context manager that gives the pair before → after, for every measure and assertion. The
        counts are frozen when the block ends; what needs the weights again later is refused once
        the model has moved on.

    Raises:
        SubnetError: the copy does not fit on the device; another rank failed or did not come; or,
            from any measure, the block has not ended or raised.
        PairMismatchError: copies of the model on several ranks have drifted apart.
        CheckpointError: the model has weights that cannot be compared.
        TypeError: `model` is no module, or a tolerance is no `Tolerance`.
        ValueError: an unknown `keep_on`.

    >>> with record_update(model) as update:
    ...     train_one_step(model)
    >>> assert_updated(update, "*").moved
    2
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"record_update takes an nn.Module, got {_kind(model)}; {_meant(model)}")
    if keep_on not in get_args(KeepOn):
        raise ValueError(f"keep_on={safe(repr(keep_on))} is not one of 'cpu', 'device'")
    return Recording(model, keep_on, _checked(tolerances))


def _checked(tolerances: object) -> tuple[Tolerance, ...]:
    if not isinstance(tolerances, Iterable):
        raise TypeError(f"tolerances takes a list of Tolerance, got {_kind(tolerances)}")
    found = tuple(tolerances)
    for each in found:
        if not isinstance(each, Tolerance):
            raise TypeError(f"tolerances takes objects of Tolerance, got {_kind(each)} among them")
    return found


def _meant(model: object) -> str:
    if isinstance(model, str | os.PathLike):
        return "checkpoints on disk are compared by open_pair(base, tuned)"
    return "pass the model itself"


def _kind(value: object) -> str:
    return "None" if value is None else safe(type(value).__name__)


@contextmanager
def _recorded(
    model: torch.nn.Module, keep_on: KeepOn, tolerances: tuple[Tolerance, ...]
) -> Iterator[RecordedUpdate]:
    source = open_held(model, "the start")
    update = RecordedUpdate(_unique_bytes(in_this_process(source)), keep_on)
    update.__dict__["tolerances"] = tolerances
    _log.info("recording an update of %s: %s on %s", source.label, size(update.kept_bytes), keep_on)
    before = replaced(source, lambda held: _copy(held, keep_on, update.kept_bytes), "copying")
    try:
        yield update
    except BaseException as error:
        update.give_up(error, "the block")
        tell_others(model, source, "the end", error)
        raise
    try:
        after = open_held(model, "the end")
        after.label = in_this_process(after).label = f"{source.label} after"
        update.finish(before, after)
    except BaseException as error:
        update.give_up(error, "comparing before and after")
        raise


def _unique_bytes(source: TensorsCheckpoint) -> int:
    return sum(source.info(name).nbytes for name in source.names() if name not in source.ties)


def _copy(source: TensorsCheckpoint, keep_on: KeepOn, nbytes: int) -> TensorsCheckpoint:
    copies = {}
    for name in source.names():
        if name not in source.ties:
            tensor = source.tensor(name).detach()
            target = tensor.device if keep_on == "device" else "cpu"
            if keep_on == "device":
                _check_room(tensor.device, nbytes)
            copies[name] = tensor.to(target, copy=True)
            nbytes -= source.info(name).nbytes
    for name, first in source.ties.items():
        copies[name] = copies[first]
    return TensorsCheckpoint(
        copies,
        label=f"{source.label} before",
        config=source.config,
        buffers=source.buffers,
        shows_ties=True,
    )


def _check_room(device: torch.device, needed: int) -> None:
    import torch

    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise SubnetError(
            f"the copy of the weights before needs {size(needed)} more on {device}, which has "
            f'{size(free)} free; keep it on the CPU with keep_on="cpu"'
        )


def _prints(frozen: Held) -> dict[str, str]:
    local = in_this_process(frozen)
    return {name: local.fingerprint(name) for name in local.names()}


class _Frozen(TensorsCheckpoint):
    """A model as it was at one moment: its tensors are given out only while they are as then.

    An in-place write through `.data` leaves no trace but the content, so content is what is
    checked: once in each scan, which asks for the identity before it reads.
    """

    def __init__(self, live: TensorsCheckpoint) -> None:
        self.__dict__.update(live.__dict__, is_live=False)
        self._prints = {name: live.fingerprint(name) for name in live.names()}
        self._live = live
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def identity(self) -> Hashable:
        with self._lock:
            self._checked.clear()
        return id(self)

    def view(self, name: str) -> Buffer | None:
        self._check_once(name)
        return super().view(name)

    def address(self, name: str) -> tuple[torch.device, int] | None:
        self._check_once(name)
        return super().address(name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self._check_once(name)
        super().read_into(name, start, buffer)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        self._check(name)
        return super().read(name, rows).clone()

    def fingerprint(self, name: str | None = None) -> str:
        return super().fingerprint() if name is None else self._prints[name]

    def _check_once(self, name: str) -> None:
        with self._lock:
            if name not in self._checked:
                self._check(name)
                self._checked.add(name)

    def _check(self, name: str) -> None:
        self.info(name)
        if self._live.fingerprint(name) != self._prints[name]:
            raise CheckpointError(
                f"{safe(name)} of {safe(self.label)} has changed since the recorded block ended; "
                "measure what needs the weights again (another tolerance, a matrix) before the "
                "model is trained on, or keep a checkpoint of it"
            )
