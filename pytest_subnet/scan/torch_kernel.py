"""The reference kernel: the definition written down in torch.

It is what the other kernels are held to. It also compares tensors where they are on a GPU, and
serves where Numba cannot be imported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.counters import Counters
    from pytest_subnet.scan.found import Found
    from pytest_subnet.scan.tolerance import Tolerance

_PIECE = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchKernel:
    """A `Kernel` on a torch device."""

    def __init__(self, device: str | None = None) -> None:
        """Compare on `device`; None stays where the buffers are."""
        self.device = device

    def __call__(
        self, base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
    ) -> None:
        """As `Kernel`."""
        if not bounds[-1]:  # torch cannot see an empty buffer as anything else
            return
        left, right = _as_values(base, tuned, dtype, self.device)
        for row, (start, end) in enumerate(pairwise(bounds.tolist())):
            for first in range(start, end, _PIECE):
                piece = slice(first, min(first + _PIECE, end))
                _compare(left[piece], right[piece], counters, row)


class TorchMaskKernel:
    """A `MaskKernel` on a torch device."""

    def __init__(self, device: str | None = None) -> None:
        """As `TorchKernel`."""
        self.device = device
        self._counting = TorchKernel(device)

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
        self._counting(base, tuned, dtype, bounds, counters)
        if not bounds[-1]:
            return
        left, right = _as_values(base, tuned, dtype, self.device)
        for row, (start, end) in enumerate(pairwise(bounds.tolist())):
            for first in range(start, end, _PIECE):
                piece = slice(first, min(first + _PIECE, end))
                flags = _updated(left[piece], right[piece], found.tolerance).cpu().numpy()
                found.mark(row, flags, first - start)
                if found.population.size:
                    words = left[piece].view(torch.int16).cpu().numpy().view(np.uint16)
                    found.count(row, words, flags)


def _updated(base: torch.Tensor, tuned: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """Which entries are beyond a tolerance."""
    bits = _INTEGERS[base.element_size()]
    differs = base.view(bits) != tuned.view(bits)
    if tolerance.same_bits:
        return differs
    before, after = _widened(base), _widened(tuned)
    finite = before.isfinite() & after.isfinite()
    return torch.where(finite, _beyond((after - before).abs(), before, after, tolerance), differs)


def _widened(values: torch.Tensor) -> torch.Tensor:
    """In the dtype in which differences are formed."""
    return values.to(torch.float32 if values.element_size() == 2 else torch.float64)


def _as_values(
    base: Buffer, tuned: Buffer, dtype: str, device: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = on_one_device(base, tuned, device)
    return left.view(getattr(torch, dtype)), right.view(getattr(torch, dtype))


def on_one_device(
    base: Buffer, tuned: Buffer, device: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both buffers as bytes on `device`; by default on the GPU that one of them is on."""
    left, right = _as_tensor(base), _as_tensor(tuned)
    there = left.device if left.device.type != "cpu" else right.device
    if there.type == "mps":  # has no float64, in which sums are formed
        there = torch.device("cpu")
    return left.to(device or there), right.to(device or there)


def _as_tensor(buffer: Buffer) -> torch.Tensor:
    if not isinstance(buffer, np.ndarray):
        return buffer
    # torch warns of an array that it must not write to.
    return torch.from_numpy(buffer if buffer.flags.writeable else buffer.copy())


def _compare(base: torch.Tensor, tuned: torch.Tensor, counters: Counters, row: int) -> None:
    bits = _INTEGERS[base.element_size()]
    differs = base.view(bits) != tuned.view(bits)
    before, after = _widened(base), _widened(tuned)
    base_finite, tuned_finite = before.isfinite(), after.isfinite()
    finite = base_finite & tuned_finite
    delta = (after - before).abs()
    integers = [
        differs,
        differs & (before == 0) & (after == 0),
        ~base_finite,
        ~tuned_finite,
        *(
            torch.where(finite, _beyond(delta, before, after, tolerance), differs)
            for tolerance in counters.tolerances
        ),
    ]
    counts = torch.stack([torch.count_nonzero(found) for found in integers])
    counters.integers[row] += counts.cpu().numpy()
    wide = (after.double() - before.double()).where(finite, 0)
    sums = (
        wide.square().sum(),
        before.double().where(base_finite, 0).square().sum(),
        after.double().where(tuned_finite, 0).square().sum(),
    )
    counters.sums[row] += torch.stack(sums).cpu().numpy()
    if wide.numel():
        counters.peaks[row] = max(counters.peaks[row], float(wide.abs().max()))


def _beyond(
    delta: torch.Tensor, before: torch.Tensor, after: torch.Tensor, tolerance: Tolerance
) -> torch.Tensor:
    if tolerance.rtol is not None:
        return delta > tolerance.rtol * torch.maximum(before.abs(), after.abs())
    return delta > (tolerance.atol or 0.0)
