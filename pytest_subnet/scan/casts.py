"""Buffers cast from one floating dtype to another, as torch casts them.

A NaN becomes the one quiet NaN of the target: which bits torch gives it depends on the device and
on the vector unit, and no count may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer

    Bytes = NDArray[np.uint8]

_NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
_QUIET_BFLOAT16 = np.uint16(0x7FC0)


def cast(buffer: Buffer, source: str, target: str) -> Buffer:
    """The entries of `buffer`, stored as `source`, as bytes of `target`, rounded to nearest even.

    A 16-bit target is reached through float32, as in torch.
    """
    if source == target:
        return buffer
    if isinstance(buffer, np.ndarray):
        return cast_array(buffer, source, target)
    return _cast_tensor(buffer, source, target)


def cast_array(buffer: Bytes, source: str, target: str) -> Bytes:
    """As `cast`, for what is on the CPU."""
    if source == "bfloat16":
        values = (buffer.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = buffer.view(_NUMPY[source])
    # A signalling NaN or a value too large for the target is a value like any other here.
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if target in ("bfloat16", "float16"):
            values = values.astype(np.float32, copy=False)
        if target == "bfloat16":
            return _round_to_bfloat16(values).view(np.uint8)
        result = values.astype(_NUMPY[target])
    result[np.isnan(result)] = np.nan
    return result.view(np.uint8)


def _round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _QUIET_BFLOAT16, rounded)


def _cast_tensor(buffer: torch.Tensor, source: str, target: str) -> torch.Tensor:
    import torch

    result = buffer.view(getattr(torch, source)).to(getattr(torch, target))
    return result.masked_fill_(result.isnan(), torch.nan).view(torch.uint8)
