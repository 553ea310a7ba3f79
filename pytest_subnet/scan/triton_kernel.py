"""The GPU kernel: all counters, and the bits of a mask, in one read of each side.

What is on a GPU is compared where it is. A launch covers any number of segments: they are cut into
chunks, and the programs (`triton_programs`) find theirs in a table of addresses.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.scan import bits_kernel
from pytest_subnet.scan import triton_programs as programs
from pytest_subnet.scan.counters import FIRST_TOLERANCE, Counters
from pytest_subnet.scan.torch_kernel import TorchKernel, TorchMaskKernel, on_one_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.found import Found
    from pytest_subnet.scan.tolerance import Tolerance

COMPILED = ("bfloat16", "float16", "float32")
"""The dtypes whose differences are formed here; float64 is left to torch."""

_LANES, _ROWS = 128, 4
_VECTOR = {1: 16, 2: 8, 4: 4, 8: 2}
"""Entries in a load of 16 bytes, by their size."""

_CHUNK_TILES = 256
_PROGRAMS = 4096
"""Chunks of up to a million entries; smaller ones as long as they are few."""

_FUSED = {"enable_fp_fusion": True}
"""Said to be so: Triton 3.9 warns where it is left open. No integer depends on it."""

_BROKEN = {
    "float8_e4m3fn": (0x7F, 0x7F),
    "float8_e4m3fnuz": (0xFF, 0x80),
    "float8_e5m2": (0x7C, 0x7C),
    "float8_e5m2fnuz": (0xFF, 0x80),
    "float8_e8m0fnu": (0xFF, 0xFF),
}
"""Of 8-bit formats: a byte is NaN or Inf when what is kept of it is this."""

_WHOLE_NUMBERS = {
    name for name, each in DTYPES.items() if not each.floating and not name.startswith("complex")
}

_launching = threading.Lock()  # two threads would compile the same program


class Runs(NamedTuple):
    """Where both sides of some segments lie on the device, int64 `[segments]` each.

    Attributes:
        base: addresses.
        tuned: addresses.
        counts: entries.
    """

    base: NDArray[np.int64]
    tuned: NDArray[np.int64]
    counts: NDArray[np.int64]


class TritonKernel:
    """A `Kernel` for CUDA tensors; what is not on a device yet is brought to it."""

    def __init__(self, device: str | None = None) -> None:
        """Compare on `device`; None stays where the buffers are."""
        self.device = device

    def __call__(
        self, base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
    ) -> None:
        """As `Kernel`, also for dtypes that are compared by bits."""
        if not bounds[-1]:
            return
        if not can_count(dtype):
            other = TorchKernel(self.device) if dtype == "float64" else bits_kernel.compare
            other(base, tuned, dtype, bounds, counters)
            return
        left, right = _placed(base, tuned, dtype, self.device)
        start(runs_of(left, right, dtype, bounds), dtype, counters.tolerances, left.device).add_to(
            counters
        )


class TritonMaskKernel:
    """A `MaskKernel` for CUDA tensors."""

    def __init__(self, device: str | None = None) -> None:
        """As `TritonKernel`."""
        self.device = device

    def __call__(
        self,
        base: Buffer,
        tuned: Buffer,
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> None:
        """As `MaskKernel`."""
        if dtype not in COMPILED:
            TorchMaskKernel(self.device)(base, tuned, dtype, bounds, counters, found)
            return
        if not bounds[-1]:
            return
        left, right = _placed(base, tuned, dtype, self.device)
        bits = torch.zeros(8 * found.words.size, dtype=torch.uint8, device=left.device)
        runs = runs_of(left, right, dtype, bounds)
        started = start(runs, dtype, counters.tolerances, left.device, _Marking(bits, found))
        if found.population.size:
            _count_strata(left, bits, dtype, bounds, found)
        started.add_to(counters)
        found.words.view(np.uint8)[:] = bits.cpu().numpy()


def can_count(dtype: str) -> bool:
    """Whether there is a program for a dtype; float64 and complex numbers have none."""
    return dtype in COMPILED or dtype in _BROKEN or dtype in _WHOLE_NUMBERS


def runs_of(base: torch.Tensor, tuned: torch.Tensor, dtype: str, bounds: NDArray[np.int64]) -> Runs:
    """The segments of two buffers on one device."""
    offsets = bounds[:-1] * DTYPES[dtype].itemsize
    return Runs(base.data_ptr() + offsets, tuned.data_ptr() + offsets, np.diff(bounds))


class _Marking(NamedTuple):
    """Where bits go, on the device, and what is asked of them."""

    bits: torch.Tensor
    found: Found


def start(
    runs: Runs,
    dtype: str,
    tolerances: Sequence[Tolerance],
    device: torch.device,
    marking: _Marking | None = None,
) -> Started:
    """Have the device count segments; the tensors must stay as they are until it is done."""
    asked = list(tolerances)
    mark = ""
    if marking is not None:
        wanted = marking.found.tolerance
        mark = "bits" if wanted.same_bits else "beyond"
        if not wanted.same_bits:  # a program marks beyond its first tolerance
            asked = [wanted, *(each for each in asked if each != wanted)]
    chunks = _cut(runs, dtype, marking)
    groups = [
        asked[first : first + programs.LIMITS]
        for first in range(0, max(len(asked), 1), programs.LIMITS)
    ]
    launched = [
        _launch(chunks, dtype, group, device, "" if number else mark)
        for number, group in enumerate(groups)
    ]
    return Started(chunks.segments, asked, launched)


class Started:
    """Counting that is under way."""

    def __init__(
        self,
        segments: NDArray[np.int64],
        asked: Sequence[Tolerance],
        launched: Sequence[tuple[torch.Tensor, torch.cuda.Event | None]],
    ) -> None:
        self._segments = segments
        self._asked = asked
        self._launched = launched

    def add_to(self, counters: Counters) -> None:
        """Wait, and add what was found to the rows of the segments."""
        order = np.argsort(self._segments, kind="stable")
        segments = self._segments[order]
        firsts = np.flatnonzero(np.r_[True, segments[1:] != segments[:-1]])
        rows = segments[firsts]
        for number, (out, done) in enumerate(self._launched):
            if done is not None:
                done.synchronize()
            columns = out.numpy()[:, order]
            integers = np.add.reduceat(columns[: programs.INTEGERS], firsts, axis=1).T
            floats = columns[programs.SUMS : programs.HOLDS].view(np.float64)
            first = number * programs.LIMITS
            for k, tolerance in enumerate(self._asked[first : first + programs.LIMITS]):
                if tolerance in counters.tolerances:
                    column = FIRST_TOLERANCE + counters.tolerances.index(tolerance)
                    counters.integers[rows, column] += integers[:, FIRST_TOLERANCE + k]
            if number == 0:
                counters.integers[rows, :FIRST_TOLERANCE] += integers[:, :FIRST_TOLERANCE]
                counters.sums[rows] += np.add.reduceat(floats[:3], firsts, axis=1).T
                peaks = np.maximum.reduceat(floats[3], firsts)
                counters.peaks[rows] = np.maximum(counters.peaks[rows], peaks)


class _Chunks(NamedTuple):
    """What programs are given.

    Attributes:
        segments: int64 `[chunks]`, the segment of each; ascending in each of the two kinds.
        places: int64 `[4, chunks]`: addresses of base, tuned and bits, and entries.
        ordinary: how many of them, the first ones, are whole tiles at addresses divisible by 16.
    """

    segments: NDArray[np.int64]
    places: NDArray[np.int64]
    ordinary: int


def _cut(runs: Runs, dtype: str, marking: _Marking | None) -> _Chunks:
    itemsize = DTYPES[dtype].itemsize
    tile = _ROWS * _LANES * _VECTOR[itemsize]
    aligned = (runs.base % 16 == 0) & (runs.tuned % 16 == 0)
    whole = np.where(aligned, runs.counts // tile * tile, 0)
    tiles = int(np.clip(runs.counts.sum() // (tile * _PROGRAMS), 4, _CHUNK_TILES))
    nothing = np.zeros_like(whole)
    parts = [_pieces(nothing, whole, tiles * tile), _pieces(whole, runs.counts, tiles * tile)]
    segments, starts, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    places = np.zeros((4, segments.size), np.int64)
    places[0] = runs.base[segments] + starts * itemsize
    places[1] = runs.tuned[segments] + starts * itemsize
    if marking is not None:
        first_byte = marking.bits.data_ptr() + 8 * marking.found.starts[:-1]
        places[2] = first_byte[segments] + starts // 8
    places[3] = counts
    return _Chunks(segments, places, parts[0][0].size)


def _pieces(
    first: NDArray[np.int64], end: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut the entries `first` to `end` of each segment: segment, start and count of each piece."""
    how_many = -(-(end - first) // length)
    segments = np.repeat(np.arange(first.size), how_many)
    number = np.arange(segments.size) - np.repeat(np.cumsum(how_many) - how_many, how_many)
    starts = first[segments] + number * length
    return segments, starts, np.minimum(end[segments] - starts, length)


def _launch(
    chunks: _Chunks, dtype: str, tolerances: Sequence[Tolerance], device: torch.device, mark: str
) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start the programs and the copy of what they find; the event is recorded after it."""
    limits = np.zeros((2, programs.LIMITS))
    number = np.float64 if DTYPES[dtype].itemsize > 2 else np.float32
    with np.errstate(over="ignore"):  # nothing is beyond a tolerance that the dtype cannot hold
        for k, tolerance in enumerate(tolerances):
            limits[0, k] = number(tolerance.atol or 0.0)
            limits[1, k] = number(tolerance.rtol or 0.0)
    numbers = np.concatenate([limits.view(np.int64).ravel(), chunks.places.ravel()])
    total = chunks.segments.size
    with _launching, _on(device):
        table = torch.from_numpy(numbers)
        if device.type == "cuda":  # from pinned memory: else this waits for all that is under way
            table = table.pin_memory().to(device, non_blocking=True)
        out = torch.zeros((programs.COLUMNS, total), dtype=torch.int64, device=device)
        if dtype in COMPILED:
            _count(table, out, chunks, dtype, tolerances, mark)
        else:
            _count_bits(table, out, chunks, dtype)
            out[FIRST_TOLERANCE : programs.INTEGERS] = out[0]
        if device.type == "cpu":
            return out, None
        found = torch.empty(out.shape, dtype=out.dtype, device="cpu", pin_memory=True)
        found.copy_(out, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
    return found, done


def _count(
    table: torch.Tensor,
    out: torch.Tensor,
    chunks: _Chunks,
    dtype: str,
    tolerances: Sequence[Tolerance],
    mark: str,
) -> None:
    total = chunks.segments.size
    vector = 8 if mark else _VECTOR[DTYPES[dtype].itemsize]
    lanes = _LANES * _VECTOR[DTYPES[dtype].itemsize] // vector
    kinds = dict(DTYPE=dtype, TOLERANCES=len(tolerances), MARK=mark, L=lanes, V=vector)
    kinds |= _FUSED
    relative = sum(1 << k for k, each in enumerate(tolerances) if each.rtol is not None)
    if chunks.ordinary:
        programs.count_ordinary[(chunks.ordinary,)](
            table, out, total, U=_ROWS, RELATIVE=relative, **kinds
        )
    programs.count_any[(total,)](table, out, total, chunks.ordinary, **kinds)


def _count_bits(table: torch.Tensor, out: torch.Tensor, chunks: _Chunks, dtype: str) -> None:
    itemsize, total = DTYPES[dtype].itemsize, chunks.segments.size
    keep, broken = _BROKEN.get(dtype, (0, 1))
    for first, end in ((0, chunks.ordinary), (chunks.ordinary, total)):
        if first < end:
            programs.count_bits[(end - first,)](
                table,
                out,
                total,
                first,
                SIZE=itemsize,
                KEEP=keep,
                BROKEN=broken,
                WHOLE=end == chunks.ordinary,
                L=_LANES,
                V=_VECTOR[itemsize],
                **_FUSED,
            )


def _count_strata(
    base: torch.Tensor,
    bits: torch.Tensor,
    dtype: str,
    bounds: NDArray[np.int64],
    found: Found,
) -> None:
    """Count strata by torch, on the device."""
    strata = found.population.shape[1]
    mantissa = 0x8000 // (strata // 2)
    words = base.view(torch.int16)
    place = torch.arange(8, dtype=torch.uint8, device=base.device)
    for row in range(bounds.size - 1):
        for first in range(int(bounds[row]), int(bounds[row + 1]), _STRATA_PIECE):
            end = min(first + _STRATA_PIECE, int(bounds[row + 1]))
            word = words[first:end].int() & 0x7FFF
            stratum = word // mantissa * 2 + (word % mantissa == 0)
            byte = 8 * int(found.starts[row]) + (first - int(bounds[row])) // 8
            marked = bits[byte : byte + -(-(end - first) // 8)]
            flags = (marked[:, None] >> place & 1).reshape(-1)[: end - first]
            counted = torch.bincount(stratum * 2 + flags, minlength=2 * strata).view(strata, 2)
            pair = counted.cpu().numpy()
            found.population[row] += pair.sum(axis=1)
            found.members[row] += pair[:, 1]


_STRATA_PIECE = 1 << 24


def _placed(
    base: Buffer, tuned: Buffer, dtype: str, device: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides on one device, at addresses from which an entry can be loaded."""
    itemsize = DTYPES[dtype].itemsize
    left, right = on_one_device(base, tuned, device)
    return (
        left if left.data_ptr() % itemsize == 0 else left.clone(),
        right if right.data_ptr() % itemsize == 0 else right.clone(),
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Programs are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
