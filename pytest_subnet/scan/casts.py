"""Buffers cast from one floating dtype to another, as torch casts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

_NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def cast(buffer: Bytes, source: str, target: str) -> Bytes:
    """The entries of `buffer`, stored as `source`, as bytes of `target`, rounded to nearest even.

    A bfloat16 target is reached through float32, as in torch.
    """
    if source == target:
        return buffer
    # A signalling NaN or a value too large for the target is a value like any other here.
    with np.errstate(invalid="ignore", over="ignore"):
        if source == "bfloat16":
            values = (buffer.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = buffer.view(_NUMPY[source])
        if target == "bfloat16":
            return _round_to_bfloat16(values.astype(np.float32, copy=False)).view(np.uint8)
        return values.astype(_NUMPY[target]).view(np.uint8)


def _round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
