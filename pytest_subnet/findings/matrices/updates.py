"""The update of one matrix, tuned - base, as a tensor to compute with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.scan.found import STRATA, rounded_to
from pytest_subnet.scan.kernels import choose_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair

Side: TypeAlias = Literal["base", "tuned"]

_ENTRIES = 1 << 20
"""How many entries of each side are in memory at a time, besides the difference."""

_WIDE = 1 << 22
"""How many gaps are in float64 at a time."""


class Matrix(NamedTuple):
    """A matrix of a pair: a tensor of two dimensions, or one of a stack of them.

    Attributes:
        row: of `pair.tensors`.
        at: which of the stack; None where the tensor itself is the matrix.
        shape: `(m, n)`.
    """

    row: int
    at: int | None
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)

    def name(self, tensor: TensorPair) -> str:
        """As results call it: `experts[3]` in a stack."""
        return tensor.name if self.at is None else f"{tensor.name}[{self.at}]"

    def nbytes(self, tensor: TensorPair) -> int:
        """What is read of both sides."""
        itemsizes = (DTYPES[dtype].itemsize for dtype in (tensor.base_dtype, tensor.tuned_dtype))
        return self.numel * sum(itemsizes)


def matrices_of(row: int, tensor: TensorPair) -> Iterator[Matrix]:
    """The matrices that a tensor is made of; none where it is neither a matrix nor a stack.

    A stack (fused experts) has no more matrices than these have rows or columns, or says so in its
    name. Any other is a convolution over one dimension, `[out, in, width]`: thousands of matrices
    that mean nothing.
    """
    if not tensor.is_weight:
        return
    if len(tensor.shape) == 2:
        yield Matrix(row, None, (tensor.shape[0], tensor.shape[1]))
    elif len(tensor.shape) == 3 and (
        tensor.shape[0] <= min(tensor.shape[1:]) or "expert" in tensor.name
    ):
        for index in range(tensor.shape[0]):
            yield Matrix(row, index, (tensor.shape[1], tensor.shape[2]))


class UpdateMatrix(NamedTuple):
    """What was read of a matrix on both sides.

    Attributes:
        delta: tuned - base, `[m, n]`, float64 for float64 weights and float32 for all others.
        floor: the largest singular value to expect of the rounding; None if nothing is rounded, or
            it was not asked for.
        is_bfloat16: whether the tuned side is float32 of which every value is one of bfloat16.
    """

    delta: torch.Tensor
    floor: float | None
    is_bfloat16: bool


def grids_of(tensor: TensorPair) -> tuple[str, ...]:
    """The 16-bit dtypes to which an update was rounded: the one compared, the one stored."""
    if rounded_to(tensor.dtype, tensor.tuned_dtype) is None:
        return ()
    both = dict.fromkeys((tensor.dtype, tensor.tuned_dtype))
    return tuple(each for each in both if each in STRATA)


def read_update(pair: ModelPair, matrix: Matrix, *, grids: Sequence[str]) -> UpdateMatrix:
    """Read both sides of a matrix in blocks of rows and subtract on the pair's device.

    A matrix of a stack is read at once.

    Args:
        pair: base and tuned.
        matrix: one of its matrices, of a dtype with arithmetic.
        grids: the 16-bit dtypes to which it was rounded: measures the floor of that too.
    """
    import torch

    tensor = pair.tensors[matrix.row]
    rows, columns = matrix.shape
    dtype = getattr(torch, tensor.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta, by_row, by_column = (torch.empty(0) for _ in range(3))
    is_bfloat16 = tensor.tuned_dtype == tensor.dtype == "float32"
    for block in _row_blocks(matrix):
        stored = _read(pair, matrix, block)
        base, tuned = (each.to(dtype) for each in stored)
        if not block.start:
            delta = torch.empty(rows, columns, dtype=wide, device=base.device)
            by_row = torch.empty(rows, dtype=torch.float64, device=base.device)
            by_column = torch.zeros(columns, dtype=torch.float64, device=base.device)
        torch.sub(tuned.to(wide), base.to(wide), out=delta[block])
        if is_bfloat16:
            is_bfloat16 = not bool((tuned.view(torch.int32) & 0xFFFF).any())
        if grids:
            by_row[block] = _add_square_gaps(by_column, *stored, grids)
    return UpdateMatrix(delta, _floor(by_row, by_column) if grids else None, is_bfloat16)


def update_blocks(pair: ModelPair, matrix: Matrix) -> Iterator[torch.Tensor]:
    """The update some rows at a time: `[rows, n]` each, in order, as `UpdateMatrix.delta`."""
    import torch

    dtype = getattr(torch, pair.tensors[matrix.row].dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for block in _row_blocks(matrix):
        base, tuned = (each.to(dtype).to(wide) for each in _read(pair, matrix, block))
        yield tuned - base


def side_blocks(pair: ModelPair, matrix: Matrix, side: Side) -> Iterator[torch.Tensor]:
    """One side some rows at a time: `[rows, n]` each, in order, as `read_side` gives it."""
    if matrix.at is not None:
        yield read_side(pair, matrix, side)
        return
    for block in _row_blocks(matrix):
        yield read_side(pair, matrix, side, block)


def _row_blocks(matrix: Matrix) -> list[slice]:
    rows, columns = matrix.shape
    step = rows if matrix.at is not None else max(1, _ENTRIES // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_side(
    pair: ModelPair,
    matrix: Matrix,
    side: Side,
    rows: slice | None = None,
) -> torch.Tensor:
    """One side of a matrix, `[m, n]`, in the dtype compared, on the pair's device.

    Args:
        pair: base and tuned.
        matrix: one of its matrices.
        side: which.
        rows: some of a matrix that is a tensor of its own; None reads all.
    """
    import torch

    tensor = pair.tensors[matrix.row]
    checkpoint = pair.base if side == "base" else pair.tuned
    name = tensor.base_name if side == "base" else tensor.tuned_name
    at = matrix.at
    whole = slice(0, matrix.shape[0]) if at is None else slice(at, at + 1)
    read = checkpoint.read(name, rows or whole)
    stored = read if at is None else read[0]
    return stored.to(_device(pair, stored)).to(getattr(torch, tensor.dtype))


def _read(pair: ModelPair, matrix: Matrix, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both sides as they are stored, on the device where they are compared."""
    tensor = pair.tensors[matrix.row]
    if matrix.at is not None:
        block = slice(matrix.at, matrix.at + 1)
    base = pair.base.read(tensor.base_name, block)
    tuned = pair.tuned.read(tensor.tuned_name, block)
    if matrix.at is not None:
        base, tuned = base[0], tuned[0]
    device = _device(pair, base, tuned)
    return base.to(device), tuned.to(device)


def _add_square_gaps(
    by_column: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor, grids: Sequence[str]
) -> torch.Tensor:
    """Σ gap² of each row, those of each column added to `by_column`."""
    import torch

    by_row = []
    step = max(1, _WIDE // base.shape[1])
    for start in range(0, base.shape[0], step):
        sides = base[start : start + step], tuned[start : start + step]
        gaps = [_gaps(*(side.to(getattr(torch, grid)) for side in sides)) for grid in grids]
        squares = (gaps[0] if len(gaps) == 1 else torch.maximum(*gaps)).square_()
        by_row.append(squares.sum(dim=1))
        by_column += squares.sum(dim=0)
    return torch.cat(by_row)


def _gaps(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """The gap above the larger magnitude of the two sides, float64, for each entry.

    Both are of one of the dtypes in `STRATA`. What rounding adds to an update is spread over such
    a gap: of variance gap² / 12.
    """
    import torch

    mantissa_bits = 17 - STRATA[str(base.dtype).removeprefix("torch.")].bit_length()
    words = torch.maximum(base.view(torch.int16) & 0x7FFF, tuned.view(torch.int16) & 0x7FFF)
    # Without its mantissa a word is the power of two below it; subnormals have the smallest's gap.
    exponents = 0x7FFF >> mantissa_bits << mantissa_bits
    powers = (words & exponents).clamp_(min=1 << mantissa_bits).view(base.dtype)
    return powers.double().mul_(2.0**-mantissa_bits)


def _floor(by_row: torch.Tensor, by_column: torch.Tensor) -> float:
    """The largest singular value to expect of independent noise of variance gap² / 12.

    But for a smaller term, at most the root of the largest row's variance and that of the largest
    column's together (Bandeira and van Handel, arXiv 1408.6185); of even gaps it is
    (√m + √n) gap / √12.
    """
    return (math.sqrt(float(by_row.max())) + math.sqrt(float(by_column.max()))) / math.sqrt(12)


def _device(pair: ModelPair, *sides: torch.Tensor) -> torch.device:
    """Where to compute: the pair's device, else the GPU on which a side is, else the CPU."""
    import torch

    if pair.device is None:
        return next((each.device for each in sides if each.is_cuda), sides[0].device)
    if pair.device != "cpu":
        choose_kernel(pair.device)  # says what to do where there is no such device
    return torch.device(pair.device)
