"""Arithmetic as it is in a fresh process, whatever a trainer asked of torch.

`torch.set_float32_matmul_precision("medium")` lets torch multiply float32 as bfloat16, on a CPU
that can as well as on a GPU; `torch.autocast` casts what it multiplies; `torch.set_flush_denormal`
takes subnormals for zero; `torch.set_default_device` makes tensors elsewhere. A trainer asks for
that, to be quick; what it did to its weights is not to be measured so.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_subnet.held import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FULL = "ieee", "none"
"""What a backend's precision is called where it is full."""

_ENVIRONMENT_BYTES = 1024
"""More than C's `fenv_t` takes anywhere."""


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Arithmetic is that of a fresh process within; also a decorator.

    The precision of products is the process's: while one thread is within, it is full for all.

    >>> import torch
    >>> ones = torch.ones(2, 2)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     outside = (ones @ ones).dtype
    ...     with plain_arithmetic():
    ...         inside = (ones @ ones).dtype
    >>> outside, inside
    (torch.bfloat16, torch.float32)
    """
    import torch

    uncast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with _full_products(), uncast[0], uncast[1], torch.device("cpu"), _subnormals_counted():
        yield


def count_subnormals() -> None:
    """Have this thread compute as IEEE 754 says.

    A thread inherits from the one that starts it whether subnormals are taken for zero.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV


@contextmanager
def _subnormals_counted() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    library.fegetenv(before)
    count_subnormals()
    try:
        yield
    finally:
        library.fesetenv(before)


def _make_full() -> Callable[[], None]:
    """Ask torch for full precision; returned is what takes that back."""
    import torch

    by_backend = hasattr(torch.backends, "fp32_precision")  # from torch 2.9 on
    return _by_backend() if by_backend else _by_process()


def _by_backend() -> Callable[[], None]:
    """For each backend by itself: torch refuses to tell of the process once one was set so."""
    import torch

    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # is made at run time
    before = [(each, each.fp32_precision) for each in (torch.backends.cuda.matmul, cpu)]
    changed = [(each, precision) for each, precision in before if precision not in _FULL]
    for each, _ in changed:
        each.fp32_precision = "ieee"

    def take_back() -> None:
        for each, precision in changed:
            each.fp32_precision = "none"  # as all of torch is, which may be what it was
            if each.fp32_precision != precision:
                each.fp32_precision = precision

    return take_back


def _by_process() -> Callable[[], None]:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


_full_products = Held(_make_full)
