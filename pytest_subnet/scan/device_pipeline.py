"""Comparing on a GPU: what is in its memory where it lies, what is in files piece by piece.

Every worker reads into pinned memory of its own, copies on a stream of its own, and compares there:
while one piece travels, other workers read theirs. What is in flight is bounded, whatever the
number of workers; where the GPU has no room for a piece, smaller ones are tried.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.errors import SubnetError
from pytest_subnet.scan.comparing import Compare, bounds_of
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.engines import cores
from pytest_subnet.scan.kernels import device_kernel, has_triton
from pytest_subnet.scan.units import UNIT_BYTES, halves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.base import Extent
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.contracts import Kernel, MaskKernel
    from pytest_subnet.scan.found import Found
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.scan.units import ScanUnit

IN_FLIGHT_BYTES = 512 * 1024 * 1024
"""Pinned memory of all workers together, and as much on the GPU."""

IN_PLACE_BYTES = 4 * 1024 * 1024 * 1024
"""A side's share of a unit that is compared where it lies: one launch for many tensors."""

_LEAST_BYTES = 1024 * 1024


def gpu_of(pair: ModelPair) -> str | None:
    """The GPU in whose memory all of `pair` lies; None where it does not, or not all on one."""
    devices = {_device_of(side) for side in (pair.base, pair.tuned)}
    found = devices.pop() if len(devices) == 1 else None
    return found if pair.device is None or found == indexed(pair.device) else None


def _device_of(checkpoint: Checkpoint) -> str | None:
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint

    if not isinstance(checkpoint, TensorsCheckpoint):
        return None
    devices = {checkpoint.tensor(name).device for name in checkpoint.names()}
    found = str(devices.pop()) if len(devices) == 1 else "cpu"
    return found if found.startswith("cuda") else None


def is_gpu(device: str | None) -> bool:
    """Whether `device` is one that weights in files must be brought to."""
    return device is not None and device.startswith("cuda")


def indexed(device: str) -> str:
    """`cuda` is the current one of the thread that asks: workers have another."""
    if device != "cuda":
        return device
    import torch

    # Without one, whoever chooses a kernel for it says so.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else device


def wait_for_caller(pair: ModelPair) -> None:
    """Wait until what the calling thread gave the GPU to do is done: workers do not wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.current_stream(gpu_of(pair)).synchronize()


def comparing(
    kernel: Kernel,
    tolerances: tuple[Tolerance, ...],
    base: Checkpoint | None,
    tuned: Checkpoint | None,
    device: str | None,
) -> Compare | CompareOnGpu:
    """The `Work` for a device: on a GPU by Triton, where there is one."""
    if device is None or device == "cpu" or not has_triton():
        return Compare(kernel, tolerances, base, tuned, device)
    gpu = indexed(device)
    return CompareOnGpu(device_kernel(gpu), tolerances, base, tuned, gpu)


@dataclass(frozen=True)
class CompareOnGpu:
    """`Work` that counts what differs in a unit, on a GPU with Triton.

    Attributes:
        kernel: for what needs a cast, or is not in files as it is compared.
        tolerances: as in `Compare`.
        base: as in `Compare`.
        tuned: as in `Compare`.
        device: the GPU.
    """

    kernel: Kernel
    tolerances: tuple[Tolerance, ...]
    base: Checkpoint | None
    tuned: Checkpoint | None
    device: str

    @contextmanager
    def open(self) -> Iterator[Callable[[ScanUnit], Counters]]:
        """As `Work.open`."""
        from pytest_subnet.scan.triton_kernel import can_count

        otherwise = Compare(self.kernel, self.tolerances, self.base, self.tuned, self.device)
        lanes: list[Lane] = []
        with FileReader() as reader, otherwise.open() as compare_otherwise:

            def compare(unit: ScanUnit) -> Counters:
                as_stored = unit.dtype == unit.base_dtype == unit.tuned_dtype
                if not as_stored or not can_count(unit.dtype):
                    return compare_otherwise(unit)
                counters = Counters(len(unit.segments), self.tolerances)
                if unit.base is None and unit.tuned is None:
                    in_place = self._compare_in_place(unit, counters)
                    return counters if in_place else compare_otherwise(unit)
                if unit.base is None or unit.tuned is None:
                    return compare_otherwise(unit)
                if not lanes:
                    lanes.append(lane_on(self.device))
                lanes[0].compare(unit, reader, counters)
                return counters

            yield lambda unit: _in_pieces(compare, unit, self.tolerances, self.device)

    def _compare_in_place(self, unit: ScanUnit, counters: Counters) -> bool:
        """Compare what lies in the memory of the GPU; False where it does not."""
        import torch

        from pytest_subnet.scan.triton_kernel import Runs, start

        if self.base is None or self.tuned is None:
            return False
        device = torch.device(self.device)
        addresses = np.zeros((2, len(unit.segments)), np.int64)
        held: list[torch.Tensor] = []
        for number, segment in enumerate(unit.segments):
            places = (
                _place(self.base, segment.base_name, held),
                _place(self.tuned, segment.tuned_name, held),
            )
            for side, place in enumerate(places):
                if place is None or place[0] != device:
                    return False
                addresses[side, number] = place[1]
        itemsize = DTYPES[unit.dtype].itemsize
        addresses += np.array([segment.start for segment in unit.segments]) * itemsize
        if (addresses % itemsize).any():
            return False
        counts = np.diff(bounds_of(unit))
        start(Runs(addresses[0], addresses[1], counts), unit.dtype, self.tolerances, device).add_to(
            counters
        )
        return True


def _place(
    checkpoint: Checkpoint, name: str, held: list[torch.Tensor]
) -> tuple[torch.device, int] | None:
    """Where the bytes of a tensor lie on a device; what had to be made for that is held."""
    import torch

    place = checkpoint.address(name)
    if place is None:
        view = checkpoint.view(name)
        if isinstance(view, torch.Tensor):
            held.append(view)
            place = view.device, view.data_ptr()
    return place


def _in_pieces(
    compare: Callable[[ScanUnit], Counters],
    unit: ScanUnit,
    tolerances: tuple[Tolerance, ...],
    device: str,
) -> Counters:
    """What `compare` counts in `unit`; in two halves where the GPU has no room for the whole.

    Raises:
        SubnetError: there is not even room for a small part of it.
    """
    import torch

    try:
        return compare(unit)
    except torch.OutOfMemoryError as error:
        parts = halves(unit) if unit.nbytes > 2 * _LEAST_BYTES else None
        if parts is None:
            raise _no_room(device, f"{unit.nbytes:,} bytes of the pair") from error
    counters = Counters(len(unit.segments), tolerances)
    first, second = parts
    whole = len(unit.segments)
    rows = np.arange(len(first.segments)), np.arange(whole - len(second.segments), whole)
    for part, at in zip(parts, rows, strict=True):
        counters.add(at, _in_pieces(compare, part, tolerances, device))
    return counters


def _no_room(device: str, what: str) -> SubnetError:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return SubnetError(
        f"no room to compare on {device}: {what} do not fit; "
        f"{free:,} of its {total:,} bytes are free; free some (torch.cuda.empty_cache()) or "
        'compare on the CPU with device="cpu" (--subnet-device cpu)'
    )


class Lane:
    """A worker's pinned memory, its memory on the GPU and its stream."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """Take memory for pieces of `nbytes` bytes a side, here and on `device`."""
        import torch

        on_gpu = device.type == "cuda"
        self._device = device
        self._nbytes = nbytes
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):  # memory that no other stream still reads from
            self._there = torch.empty((2, nbytes), dtype=torch.uint8, device=device)
        self._here = torch.empty((2, nbytes), dtype=torch.uint8, device="cpu", pin_memory=on_gpu)

    def compare(self, unit: ScanUnit, reader: FileReader, counters: Counters) -> None:
        """Read, copy and compare a unit that is in files."""
        import torch

        from pytest_subnet.scan.triton_kernel import runs_of, start

        itemsize = DTYPES[unit.dtype].itemsize
        bounds = bounds_of(unit)
        total = int(bounds[-1])
        capacity = self._nbytes // itemsize
        for first in range(0, total, capacity):
            end = min(first + capacity, total)
            with torch.cuda.stream(self._stream):
                sides = self._bring(unit, reader, first * itemsize, (end - first) * itemsize)
                runs = runs_of(*sides, unit.dtype, np.clip(bounds, first, end) - first)
                started = start(runs, unit.dtype, counters.tolerances, self._device)
            started.add_to(counters)  # waits: then both buffers are free again

    def mark(
        self,
        unit: ScanUnit,
        reader: FileReader,
        kernel: MaskKernel,
        counters: Counters,
        found: Found,
    ) -> bool:
        """Read, copy, compare and mark such a unit; False where it is larger than a piece."""
        import torch

        nbytes = unit.count * DTYPES[unit.dtype].itemsize
        if nbytes > self._nbytes:
            return False
        with torch.cuda.stream(self._stream):
            base, tuned = self._bring(unit, reader, 0, nbytes)
            kernel(base, tuned, unit.dtype, bounds_of(unit), counters, found)  # waits, likewise
        return True

    def _bring(
        self, unit: ScanUnit, reader: FileReader, start: int, nbytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of both sides, read, and on their way to the GPU."""
        assert unit.base is not None
        assert unit.tuned is not None
        for side, extents in enumerate((unit.base, unit.tuned)):
            here = self._here[side, :nbytes]
            _read(reader, extents, start, here.numpy().data)
            self._there[side, :nbytes].copy_(here, non_blocking=True)
        return self._there[0, :nbytes], self._there[1, :nbytes]


def _read(reader: FileReader, extents: Sequence[Extent], skip: int, into: memoryview) -> None:
    """Fill `into` from byte `skip` of some extents on."""
    done = 0
    for path, offset, nbytes in extents:
        if skip >= nbytes:
            skip -= nbytes
            continue
        count = min(nbytes - skip, len(into) - done)
        if count:
            reader.read_into(path, offset + skip, into[done : done + count])
        done += count
        skip = 0


def piece_bytes() -> int:
    """How much of a side a worker has under way at most."""
    share = IN_FLIGHT_BYTES // (2 * cores()) // _LEAST_BYTES * _LEAST_BYTES
    return max(min(UNIT_BYTES, share), _LEAST_BYTES)


def lane_on(device: str) -> Lane:
    """A lane with pieces as large as there is room for.

    Raises:
        SubnetError: there is not even room for the smallest pieces.
    """
    import torch

    nbytes = piece_bytes()
    while True:
        try:
            return Lane(torch.device(indexed(device)), nbytes)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; for pinned memory it is not
            if "out of memory" not in str(error):
                raise
            if nbytes > _LEAST_BYTES:
                nbytes //= 2
                continue
            raise _no_room(device, f"2 pieces of {nbytes:,} bytes") from error
