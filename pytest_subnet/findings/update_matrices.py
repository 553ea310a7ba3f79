"""The update of one matrix, tuned - base, as a tensor to compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings.rounding import square_gaps
from pytest_subnet.scan.kernels import choose_kernel

if TYPE_CHECKING:
    import torch

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair

_ENTRIES = 1 << 24
"""How many entries of each side are in memory at a time, besides the difference."""


class UpdateMatrix(NamedTuple):
    """What was read of a matrix on both sides.

    Attributes:
        delta: tuned - base, `[m, n]`, float64 for float64 weights and float32 for all others.
        mean_square_gap: of the gaps above the larger of each two entries; None if not asked for.
    """

    delta: torch.Tensor
    mean_square_gap: float | None


def read_update(pair: ModelPair, tensor: TensorPair, *, gaps: bool) -> UpdateMatrix:
    """Read both sides of a matrix in blocks of rows and subtract on the pair's device.

    Args:
        pair: base and tuned.
        tensor: one of its tensors, of two dimensions and a dtype with arithmetic.
        gaps: also what rounding can do to it; for 16-bit dtypes.
    """
    import torch

    rows, columns = tensor.shape
    dtype = getattr(torch, tensor.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta, squares = torch.empty(0), 0.0
    step = max(1, _ENTRIES // columns)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        base = pair.base.read(tensor.base_name, block)
        tuned = pair.tuned.read(tensor.tuned_name, block)
        device = _device(pair, base, tuned)
        base, tuned = (each.to(device).to(dtype) for each in (base, tuned))
        if not start:
            delta = torch.empty(rows, columns, dtype=wide, device=device)
        torch.sub(tuned.to(wide), base.to(wide), out=delta[block])
        if gaps:
            squares += square_gaps(base, tuned)
    return UpdateMatrix(delta, squares / (rows * columns) if gaps else None)


def _device(pair: ModelPair, *sides: torch.Tensor) -> torch.device:
    """Where to compute: the pair's device, else the GPU on which a side is, else the CPU."""
    import torch

    if pair.device is None:
        return next((each.device for each in sides if each.is_cuda), sides[0].device)
    if pair.device != "cpu":
        choose_kernel(pair.device)  # says what to do where there is no such device
    return torch.device(pair.device)
