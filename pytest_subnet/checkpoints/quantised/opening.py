"""Quantised checkpoints as the weights that they stand for, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.checkpoints.quantised.compressed import CompressedCheckpoint, is_parameter
from pytest_subnet.checkpoints.quantised.fp8_blocks import FP8, SCALE_SUFFIX, Fp8BlocksCheckpoint
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.checkpoints.base import Checkpoint
    from pytest_subnet.checkpoints.opening import Source

_OTHERS = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "MXFP4",
    ".weight_scale_2": "NVFP4 as modelopt writes it",
    "_qdata": "torchao",
    ".weight_packed": "compressed-tensors without its quantization_config in config.json",
    ".weight_scale": "a scale a tensor or a channel (FBGEMM or modelopt)",
}
"""What a format that is not read is called, by how the names of its tensors end."""


def dequantised(source: Source) -> Checkpoint:
    """The weights that a quantised checkpoint stands for, in float32; dequantised as they are read.

    Reads fp8 with a scale for each block (`weight = fp8 * scale`, the layout of DeepSeek) and what
    compressed-tensors wrote, both through the library of that name; scales are not shown. A change
    of one weight can move the scale, and with it every code, of its block or row: how sparse an
    update of quantised weights looks is partly the quantiser's doing. So `open_pair` does not
    dequantise by itself, and the notes of each result say that this was done.

    Args:
        source: anything `open_checkpoint` takes.

    Returns:
        The checkpoint in float32, which holds every value exactly; what was not quantised keeps its
        dtype. Compare with weights in bfloat16 by `open_pair(..., as_dtype="bfloat16")`.

    Raises:
        CheckpointError: it is quantised in another format, or not at all; a scale is missing,
            belongs to nothing or has a shape of its own; compressed-tensors is not installed.

    >>> codes = torch.full((2, 2), 3.0).to(torch.float8_e4m3fn)
    >>> dequantised({"w": codes, "w_scale_inv": torch.full((1, 1), 0.5)}).read("w")
    tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]])
    >>> dequantised("base")
    Traceback (most recent call last):
    ...
    pytest_subnet.errors.CheckpointError: base is not quantised...
    """
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, Fp8BlocksCheckpoint | CompressedCheckpoint):
        return checkpoint
    names = checkpoint.names()
    method = _method(checkpoint.config)
    has_fp8 = any(checkpoint.info(name).dtype in FP8 for name in names)
    if any(name.endswith(SCALE_SUFFIX) for name in names) or (method == "fp8" and has_fp8):
        _need_library(checkpoint)
        blocks = Fp8BlocksCheckpoint(checkpoint)
        if method not in (None, "fp8"):
            blocks.notes += (
                f"{safe(checkpoint.label)}: config.json says {short(method)}, its tensors are "
                "those of fp8 in blocks, which counts",
            )
        return blocks
    if method == "compressed-tensors" and any(is_parameter(name) for name in names):
        _need_library(checkpoint)
        return CompressedCheckpoint(checkpoint)
    _refuse(checkpoint, method)
    said = "" if method is None else f" (though its config.json says {short(method)})"
    raise CheckpointError(
        f"{safe(checkpoint.label)} is not quantised{said}: no tensor has scales; pass it as it is, "
        "without dequantised()"
    )


def _method(config: Mapping[str, object]) -> str | None:
    """`quant_method` of the config; None when there is none."""
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            quantisation = part.get(key)
            if isinstance(quantisation, dict):
                method = quantisation.get("quant_method")
                return method if isinstance(method, str) else None
    return None


def _refuse(checkpoint: Checkpoint, method: str | None) -> None:
    """Raise if the names of the tensors, which count, are those of a format that is not read."""
    for suffix, called in _OTHERS.items():
        name = next((name for name in checkpoint.names() if name.endswith(suffix)), None)
        if name is not None:
            said = "" if method is None else f", {short(method)} by its config.json"
            raise CheckpointError(
                f"{safe(checkpoint.label)} is quantised in a format that is not read: {called} by "
                f"the name of {short(name)}{said}; dequantise it with the tool that wrote it, save "
                "it in bfloat16 and pass that"
            )


def _need_library(checkpoint: Checkpoint) -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"to dequantise {safe(checkpoint.label)} needs compressed-tensors, which cannot be "
            'imported; pip install "pytest-subnet[quantised]"'
        ) from error
