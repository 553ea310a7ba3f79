"""Weights in fp8 with a scale for each block, as DeepSeek stores them: `weight = fp8 * scale`.

`X` has its scales in `X_scale_inv`: one a block, the last blocks of a row or column cut off where
the matrix ends. Whole rows of blocks are dequantised at a time, which gives the same bits as the
whole matrix and takes a few MB.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.checkpoints.base import TensorInfo
from pytest_subnet.checkpoints.view import CheckpointView
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from pytest_subnet.checkpoints.base import Buffer, Checkpoint, Extent

    Block: TypeAlias = tuple[int, int]

SCALE_SUFFIX = "_scale_inv"
FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
_USUAL = (128, 128)
_STRIP_ENTRIES = 4 * 1024 * 1024
"""Entries dequantised at a time: 16 MB in float32, or one row of blocks where that is more."""


class Fp8BlocksCheckpoint(CheckpointView):
    """Weights in fp8 as the float32 values that they stand for; the scales are not shown."""

    def __init__(self, inner: Checkpoint) -> None:
        """Pair weights with scales, by headers alone.

        Raises:
            CheckpointError: a scale is missing, belongs to nothing, or is of another shape.
        """
        super().__init__(inner)
        self._scales = _scales(inner)
        self._block, disagreement = _block_size(inner, self._scales)
        self._reading = self._block
        hidden = set(self._scales.values())
        self._infos = {
            name: _as_float32(inner.info(name)) if name in self._scales else inner.info(name)
            for name in inner.names()
            if name not in hidden
        }
        rows, columns = self._block
        self.notes = (
            *inner.notes,
            f"{safe(inner.label)}: dequantised from fp8 in blocks of {rows} x {columns} to "
            "float32: which weights moved is partly the quantiser's doing",
            *disagreement,
        )

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where a tensor that is stored as it is lies; None for others."""
        self.info(name)
        return None if name in self._scales else self._inner.extents(name, start, nbytes)

    def view(self, name: str) -> Buffer | None:
        """A tensor in memory that is stored as it is; None for others."""
        self.info(name)
        return None if name in self._scales else self._inner.view(name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Dequantise the rows of blocks in which the bytes asked for lie."""
        self.check_range(name, start, len(buffer))
        if name not in self._scales:
            self._inner.read_into(name, start, buffer)
            return
        if not len(buffer):
            return
        import torch

        rows, columns = self._infos[name].shape
        height, row_bytes = self._block[0], columns * 4
        end = start + len(buffer)
        step = max(_STRIP_ENTRIES // columns // height, 1) * height
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        for top in range(start // row_bytes // height * height, -(-end // row_bytes), step):
            bottom = min(top + step, -(-end // row_bytes // height) * height, rows)
            made = self._rows(name, top, bottom).reshape(-1).view(torch.uint8)
            low, high = max(start, top * row_bytes), min(end, bottom * row_bytes)
            made = made[low - top * row_bytes : high - top * row_bytes]
            target[low - start : high - start].copy_(made)

    def _rows(self, name: str, top: int, bottom: int) -> torch.Tensor:
        """Whole rows of blocks of a weight, in float32."""
        import torch
        from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

        height = self._block[0]
        scales = slice(top // height, -(-bottom // height))
        converter = FP8BlockDequantizer(weight_block_size=self._block, dtype=torch.float32)
        made: torch.Tensor = converter.process(
            {
                "linear.weight": self._inner.read(name, slice(top, bottom)),
                "linear.weight_scale_inv": self._inner.read(self._scales[name], scales),
            }
        )["linear.weight"]
        return made.contiguous().cpu()


def _as_float32(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.name, info.shape, "float32", 4 * info.numel)


def _scales(inner: Checkpoint) -> dict[str, str]:
    """The scales of each weight in fp8; `CheckpointError` where one has no other."""
    names = dict.fromkeys(inner.names())
    label = safe(inner.label)
    scales = {
        name.removesuffix(SCALE_SUFFIX): name for name in names if name.endswith(SCALE_SUFFIX)
    }
    orphans = [scale for weight, scale in scales.items() if weight not in names]
    if orphans:
        raise CheckpointError(
            f"{label} has scales of weights that it does not have: {_few(orphans)}; a part of it "
            "is missing, save or download it again"
        )
    bare = [name for name in names if inner.info(name).dtype in FP8 and name not in scales]
    bare = [name for name in bare if not name.endswith(SCALE_SUFFIX)]
    if bare:
        raise CheckpointError(
            f"{label} has weights in fp8 without their scales: {_few(bare)} (looked for "
            f"{short(bare[0] + SCALE_SUFFIX)}); what they stand for cannot be known, save or "
            "download it again"
        )
    for weight, scale in scales.items():
        _check_kinds(label, inner.info(weight), inner.info(scale))
    return {name: scales[name] for name in names if name in scales}


def _check_kinds(label: str, weight: TensorInfo, scale: TensorInfo) -> None:
    if weight.dtype not in FP8:
        raise CheckpointError(
            f"{short(weight.name)} of {label} has scales and is stored as {weight.dtype}, not in "
            "fp8; save the checkpoint again"
        )
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(
            f"{short(weight.name)} of {label} is {spell_tensor(weight.dtype, weight.shape)}; "
            "blocks are of matrices, dequantise it with the tool that wrote it and save it in "
            "bfloat16"
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{short(scale.name)} of {label} is stored as {scale.dtype}, which no scales are; save "
            "the checkpoint again"
        )


def _block_size(inner: Checkpoint, scales: Mapping[str, str]) -> tuple[Block, tuple[str, ...]]:
    """The size of the blocks, and a note where config.json says another than the scales do."""
    stated = _stated(inner.config)
    for block in dict.fromkeys((stated or _USUAL, _USUAL)):
        if all(
            inner.info(scale).shape == _grid(inner, weight, block)
            for weight, scale in scales.items()
        ):
            if stated in (None, block):
                return block, ()
            return block, (
                f"{safe(inner.label)}: config.json says blocks of {stated[0]} x {stated[1]}, the "
                f"scales are those of {block[0]} x {block[1]}, which were taken",
            )
    block = stated or _USUAL
    weight, scale = next(
        (weight, scale)
        for weight, scale in scales.items()
        if inner.info(scale).shape != _grid(inner, weight, block)
    )
    raise CheckpointError(
        f"{short(scale)} of {safe(inner.label)} is {_spelled(inner.info(scale).shape)}; the scales "
        f"of {_spelled(inner.info(weight).shape)} in blocks of {block[0]} x {block[1]} are "
        f"{_spelled(_grid(inner, weight, block))}; weight_block_size in config.json says the size "
        "of the blocks, mend it or save the checkpoint again"
    )


def _stated(config: Mapping[str, object]) -> Block | None:
    """`weight_block_size` of the config; None where it has none that could be."""
    quantisation = config.get("quantization_config")
    sizes = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if (
        isinstance(sizes, list)
        and len(sizes) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in sizes)
    ):
        return sizes[0], sizes[1]
    return None


def _grid(inner: Checkpoint, weight: str, block: Block) -> tuple[int, ...]:
    return tuple(
        math.ceil(extent / size)
        for extent, size in zip(inner.info(weight).shape, block, strict=True)
    )


def _spelled(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _few(names: Sequence[str]) -> str:
    return first_few([short(name) for name in names])
