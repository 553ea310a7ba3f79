"""Entries that someone hands over, as booleans; what is no set of entries is an error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.errors import SelectionError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Flags = NDArray[np.bool_]


def check_entries(entries: object) -> None:
    """Raise unless `entries` is a mapping from names to something, and has any."""
    if not isinstance(entries, Mapping):
        raise TypeError(
            "entries is a mapping from tensor names to arrays, as in {'weight': array}, "
            f"not {type(entries).__name__}"
        )
    if not entries:
        raise SelectionError(
            "nothing is selected: entries has no tensor, and a mask covers at least one"
        )
    for name in entries:
        if not isinstance(name, str):
            raise TypeError(
                f"entries has the name {safe(repr(name))}; names of tensors are str, "
                f"not {type(name).__name__}"
            )


def as_entries(name: str, array: object) -> Flags:
    """Booleans in the shape of `array`; raise unless it holds booleans, or only 0 and 1."""
    torch = sys.modules.get("torch")  # without it there is no tensor
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_tensor(name, array)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"the entries of {safe(name)} are a masked array; say what is behind its mask first, "
            "as in array.filled(False)"
        )
    try:
        given = np.asarray(array)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the entries of {safe(name)} are no array ({safe(error)}); pass one in the shape of "
            "the tensor"
        ) from None
    if given.dtype.kind not in "biufc":
        raise TypeError(
            f"the entries of {safe(name)} are {safe(type(array).__name__)} of "
            f"{safe(given.dtype)}; pass an array of booleans, or of 0 and 1"
        )
    flags = np.asarray(given != 0, np.bool_)
    if given.dtype != np.bool_ and not (flags == given).all():
        raise _no_flags(name)
    return flags


def _of_tensor(name: str, tensor: Tensor) -> Flags:
    import torch

    if tensor.is_nested or tensor.layout is not torch.strided:
        raise TypeError(
            f"the entries of {safe(name)} are a sparse or nested tensor; pass a dense one, as in "
            "tensor.to_dense()"
        )
    if tensor.is_meta or tensor.is_quantized:
        what = "on the meta device, where there are none" if tensor.is_meta else "quantised"
        raise TypeError(f"the entries of {safe(name)} are {what}; pass booleans, or 0 and 1")
    values = tensor.detach()
    if values.is_floating_point() and values.itemsize == 1:
        values = values.float()  # float8 is stored, never compared
    flags = values != 0
    if not (~flags | (values == 1)).all():
        raise _no_flags(name)
    return np.asarray(flags.cpu().numpy(), np.bool_)


def _no_flags(name: str) -> ValueError:
    return ValueError(
        f"the entries of {safe(name)} are not all 0 or 1; compare them first, as in array != 0"
    )
