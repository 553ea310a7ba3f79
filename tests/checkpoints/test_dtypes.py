"""The dtypes of the field, held against torch and the format's own library."""

from __future__ import annotations

import torch
from safetensors.torch import _TYPES

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, BY_CODE, DTYPES


def test_names_and_sizes_are_those_of_torch() -> None:
    for name, dtype in DTYPES.items():
        torch_dtype = getattr(torch, name)
        assert str(torch_dtype) == f"torch.{name}"
        assert torch_dtype.itemsize == dtype.itemsize
        assert torch_dtype.is_floating_point == dtype.floating


def test_codes_are_those_of_the_library() -> None:
    for code, torch_dtype in _TYPES.items():
        assert str(torch_dtype) == f"torch.{BY_CODE[code].name}"


def test_arithmetic_is_done_in_floats() -> None:
    assert all(DTYPES[name].floating and DTYPES[name].itemsize > 1 for name in ARITHMETIC)
