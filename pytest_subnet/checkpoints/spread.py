"""Weights that several processes hold together: parts of each tensor, or a copy in every one."""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo, run_of_rows
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.memory import from_module
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint
    from pytest_subnet.checkpoints.processes import Processes

_WHOLE_BYTES = 16 * 1024 * 1024
"""Up to here a tensor is asked for whole: one exchange for all that is read of it."""


class Part(NamedTuple):
    """The block of a tensor that one process holds.

    Attributes:
        shape: of the whole tensor.
        start: the first place of the block, along each dimension.
        size: how many places it covers, along each dimension; a 0 among them where it is empty.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries of the block."""
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.size == self.shape


def is_spread(tensor: object) -> bool:
    """Whether torch spreads `tensor` over processes."""
    # Where the module was never imported, nothing was made by it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(name: str, tensor: torch.Tensor) -> tuple[Part, torch.Tensor]:
    """Which part of `tensor` this process holds, and the part."""
    shape = tuple(getattr(tensor, "shape", ()))  # what is no tensor is refused by name later
    nowhere = (0,) * len(shape)
    if not is_spread(tensor):
        return Part(shape, nowhere, shape), tensor
    spread: Any = tensor
    if any(each.is_partial() for each in spread.placements):
        raise CheckpointError(
            f"{safe(name)} is a sum that is not added up yet; redistribute it to Shard or "
            "Replicate first"
        )
    local: torch.Tensor = spread.detach().to_local()
    if not local.numel():  # also in a process that has no place in the mesh
        return Part(shape, nowhere, nowhere), local
    (chunk,) = spread.__create_chunk_list__()  # what torch's own checkpoints ask
    return Part(shape, tuple(chunk.offsets), tuple(chunk.sizes)), local


def open_spread(module: torch.nn.Module, processes: Processes, place: str) -> SpreadCheckpoint:
    """The weights of a model that `processes` train, as `from_module` gives them of one alone.

    Args:
        module: what this process has of it.
        processes: all that have it; each must call this.
        place: in words, where they call it.

    Raises:
        CheckpointError: it cannot be compared, is not the same model everywhere, or a part of it
            is held by no process.
    """
    parts: dict[str, Part] = {}
    opened: list[TensorsCheckpoint] = []

    def take(name: str, tensor: torch.Tensor) -> torch.Tensor:
        parts[name], local = part_of(name, tensor)
        return local

    def find_out() -> tuple[list[tuple[Any, ...]], dict[str, str]]:
        _refuse_flat(module)
        local = from_module(module, take=take)
        opened.append(local)
        rows = [(name, local.info(name).dtype, *parts[name]) for name in local.names()]
        return rows, dict(local.ties)

    answers = processes.gather(place, find_out)
    (local,) = opened
    _check_same_tensors(local.label, [rows for rows, _ in answers])
    blocks = [{name: Part(*part) for name, _, *part in rows} for rows, _ in answers]
    ties = {name: first for _, each in answers for name, first in each.items()}
    held = {name: [each[name] for each in blocks] for name in blocks[0]}
    found = SpreadCheckpoint(local, held, ties, processes)
    _check_complete(found)
    return found


class SpreadCheckpoint(Checkpoint):
    """A model as all processes hold it: whole tensors by name, their data wherever it lies.

    Where not every process holds a tensor whole, reading it is for all of them together, in the
    same order. A block that several hold counts once: as the first of them has it.
    """

    def __init__(
        self,
        local: TensorsCheckpoint,
        held: Mapping[str, Sequence[Part]],
        ties: Mapping[str, str],
        processes: Processes,
    ) -> None:
        """Take what the processes agreed on; `open_spread` has them agree.

        Args:
            local: what this process holds; every name that the model has.
            held: by name, what each process holds of it, by rank.
            ties: as for `Checkpoint`; in every process the same.
            processes: those that hold the model.
        """
        self.local = local
        self.held = held
        # A process that holds nothing of a tensor cannot see by itself that two are one.
        self.ties = local.ties = dict(ties)
        self.processes = processes
        self.label = local.label
        self.config = local.config
        self.buffers = local.buffers
        self.shows_buffers, self.shows_ties = local.shows_buffers, local.shows_ties
        self.is_live = local.is_live
        self._thread = threading.get_ident()
        self._read: tuple[tuple[str, int, int], torch.Tensor] | None = None

    def with_local(self, local: TensorsCheckpoint) -> SpreadCheckpoint:
        """The same model, with another place from which this process takes what it holds."""
        return SpreadCheckpoint(local, self.held, self.ties, self.processes)

    def names(self) -> Sequence[str]:
        """All tensor names, in the order of the module."""
        return self.local.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the whole tensor."""
        own = self.local.info(name)
        shape = self.held[name][0].shape
        return TensorInfo(name, shape, own.dtype, math.prod(shape) * DTYPES[own.dtype].itemsize)

    def part(self, name: str) -> Part:
        """What this process holds of `name`."""
        self.info(name)
        return self.held[name][self.processes.rank]

    def holders(self, name: str) -> dict[Part, list[int]]:
        """The blocks of `name`, with the ranks that hold each; together they are the tensor."""
        self.info(name)
        found: dict[Part, list[int]] = {}
        for rank, part in enumerate(self.held[name]):
            if part.numel:
                found.setdefault(part, []).append(rank)
        return found

    def is_everywhere(self, name: str) -> bool:
        """Whether every process holds `name` whole."""
        self.info(name)
        return all(part.is_whole for part in self.held[name])

    def view(self, name: str) -> Buffer | None:
        """All bytes where they are; None where no process has them all."""
        return self.local.view(name) if self.is_everywhere(name) else None

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy bytes, from other processes if need be."""
        import torch

        if self.is_everywhere(name):
            self.local.read_into(name, start, buffer)
            return
        self.check_range(name, start, len(buffer))
        if not len(buffer):
            return
        info = self.info(name)
        rows = info.shape[0] if info.shape else 1
        row = info.nbytes // rows
        first, last = start // row, -(-(start + len(buffer)) // row)
        if info.nbytes <= _WHOLE_BYTES:
            first, last = 0, rows
        data = self._together(name, first, last).reshape(-1).view(torch.uint8)
        skip = start - first * row
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(data[skip : skip + len(buffer)])

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor `name`, or some of its rows, on the CPU where other processes hold it too."""
        if self.is_everywhere(name):
            return self.local.read(name, rows)
        start, count = run_of_rows(self.info(name), rows)
        found = self._together(name, start, start + count)
        return found.clone() if self.info(name).shape else found.reshape(()).clone()

    def identity(self) -> Hashable:
        """Where each tensor of this process is, and how often torch has written to it."""
        return self.local.identity()

    def _together(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of a tensor of which no process has all; kept until others are asked for."""
        import torch

        if threading.get_ident() != self._thread:
            raise CheckpointError(
                f"{safe(name)} of {safe(self.label)} is spread over "
                f"{plural(self.processes.count, 'rank')}, which can only read it "
                "together: it can be counted and its matrices can be read, but what threads read "
                "side by side, as masks, cannot be had; save the model and open the checkpoints"
            )
        key = name, first, last
        if self._read is not None and self._read[0] == key:
            return self._read[1]
        holders = self.holders(name)
        shape = self.held[name][0].shape or (1,)
        dtype = getattr(torch, self.info(name).dtype)

        def own_bytes() -> bytes:
            part = self.part(name)
            rows = _overlap(part, first, last)
            if not rows or holders[part][0] != self.processes.rank:
                return b""
            block = self.local.read(name).reshape(part.size or (1,))
            run = block[rows.start - _start(part) : rows.stop - _start(part)]
            return run.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

        place = f"reading rows {first:,} to {last:,} of {name} of {self.label}"
        answers = self.processes.gather(place, own_bytes)
        found = torch.empty((last - first, *shape[1:]), dtype=dtype)
        for part, ranks in holders.items():
            rows = _overlap(part, first, last)
            if not rows:
                continue
            block = torch.frombuffer(bytearray(answers[ranks[0]]), dtype=dtype)
            inner = zip(part.start[1:], part.size[1:], strict=True)
            target = (
                slice(rows.start - first, rows.stop - first),
                *(slice(start, start + size) for start, size in inner),
            )
            found[target] = block.reshape(len(rows), *part.size[1:])
        self._read = key, found
        return found


def _overlap(part: Part, first: int, last: int) -> range:
    """The rows between `first` and `last` that lie in `part`."""
    start = _start(part)
    count = (part.size[0] if part.size else 1) if part.numel else 0
    return range(max(start, first), min(start + count, last))


def _start(part: Part) -> int:
    return part.start[0] if part.start else 0


def _check_same_tensors(label: str, answers: Sequence[Sequence[Sequence[object]]]) -> None:
    """Raise unless all processes speak of the same tensors."""
    first = [each[:3] for each in answers[0]]
    for rank, rows in enumerate(answers):
        other = [each[:3] for each in rows]
        if other != first:
            known, found = {each[0]: each for each in first}, {each[0]: each for each in other}
            names = dict.fromkeys((*known, *found))
            differ = [str(name) for name in names if known.get(name) != found.get(name)]
            what = first_few(differ) if differ else "their order"
            raise CheckpointError(
                f"{safe(label)} is another model on rank {rank} than on rank 0: {what}; every rank "
                "must record the same model (stages of a pipeline cannot be recorded as one)"
            )


def _check_complete(found: SpreadCheckpoint) -> None:
    """Raise unless the blocks that the processes hold are the whole model."""
    for name in found.names():
        whole = found.info(name).numel
        there = sum(part.numel for part in found.holders(name))
        if there != whole:
            raise CheckpointError(
                f"{safe(name)} of {safe(found.label)} has {plural(whole, 'entry')}, and the "
                f"{plural(found.processes.count, 'rank')} of the default process group hold "
                f"{there:,} of them; record it where every rank that holds the model takes part"
            )


def _refuse_flat(module: torch.nn.Module) -> None:
    # Of FSDP 1: parameters are pieces of one flat tensor, and their shapes are gone.
    torch_fsdp = sys.modules.get("torch.distributed.fsdp")
    if torch_fsdp is not None and any(
        isinstance(each, torch_fsdp.FullyShardedDataParallel) for each in module.modules()
    ):
        raise CheckpointError(
            f"{type(module).__name__} is wrapped in FullyShardedDataParallel (FSDP 1), which keeps "
            "no parameter as it is; shard it with torch.distributed.fsdp.fully_shard (FSDP 2), or "
            "save it and open the checkpoints"
        )
