"""The dtypes of the field by the names torch gives them, known without torch."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """What must be known of a dtype to read and compare it."""

    name: str
    itemsize: int
    floating: bool
    code: str


_TABLE = [
    DType("bfloat16", 2, True, "BF16"),
    DType("float16", 2, True, "F16"),
    DType("float32", 4, True, "F32"),
    DType("float64", 8, True, "F64"),
    DType("float8_e4m3fn", 1, True, "F8_E4M3"),
    DType("float8_e4m3fnuz", 1, True, "F8_E4M3FNUZ"),
    DType("float8_e5m2", 1, True, "F8_E5M2"),
    DType("float8_e5m2fnuz", 1, True, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, True, "F8_E8M0"),
    DType("int8", 1, False, "I8"),
    DType("int16", 2, False, "I16"),
    DType("int32", 4, False, "I32"),
    DType("int64", 8, False, "I64"),
    DType("uint8", 1, False, "U8"),
    DType("uint16", 2, False, "U16"),
    DType("uint32", 4, False, "U32"),
    DType("uint64", 8, False, "U64"),
    DType("bool", 1, False, "BOOL"),
    DType("complex64", 8, False, "C64"),
    DType("complex128", 16, False, ""),  # safetensors has no such dtype
]

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""Every dtype that can be read, by its torch name (`"bfloat16"`)."""

BY_CODE = {dtype.code: dtype for dtype in _TABLE if dtype.code}
"""The same by the code a safetensors header uses (`"BF16"`)."""

ARITHMETIC = ("bfloat16", "float16", "float32", "float64")
"""The dtypes whose differences are formed; all others are compared by bits."""
