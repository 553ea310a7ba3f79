"""Products of matrices in the precision of their dtype, whatever the process asked of torch.

`torch.set_float32_matmul_precision("medium")` lets torch multiply float32 as bfloat16, on a CPU
that can as well as on a GPU, and `torch.autocast` casts what it multiplies. A trainer asks for
that, to be quick; what it did to its weights is not to be measured so.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FULL = "ieee", "none"
"""What a backend's precision is called where it is full."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 are of float32 within; also a decorator.

    The precision is the process's: while one thread is within, it is full for all.

    >>> import torch
    >>> ones = torch.ones(2, 2)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     outside = (ones @ ones).dtype
    ...     with full_float32():
    ...         inside = (ones @ ones).dtype
    >>> outside, inside
    (torch.bfloat16, torch.float32)
    """
    import torch

    _process.enter()
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        _process.leave()


class _Process:
    """The precision of this process: full while a thread is within."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._go_back: Callable[[], None] | None = None

    def enter(self) -> None:
        """Make it full, unless another thread did."""
        with self._lock:
            if not self._within:
                self._go_back = _make_full()
            self._within += 1

    def leave(self) -> None:
        """Make it what it was, unless another thread is still within."""
        with self._lock:
            self._within -= 1
            if not self._within and self._go_back:
                self._go_back()


_process = _Process()


def _make_full() -> Callable[[], None]:
    """Ask torch for full precision; returned is what takes that back."""
    import torch

    by_backend = hasattr(torch.backends, "fp32_precision")  # from torch 2.9 on
    return _by_backend() if by_backend else _by_process()


def _by_backend() -> Callable[[], None]:
    """For each backend by itself: torch refuses to tell of the process once one was set so."""
    import torch

    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # is made at run time
    backends = torch.backends.cuda.matmul, cpu
    before = [(each, each.fp32_precision) for each in backends]
    changed = [(each, precision) for each, precision in before if precision not in _FULL]

    def set_each(full: bool) -> None:
        for each, precision in changed:
            each.fp32_precision = "ieee" if full else precision

    set_each(full=True)
    return lambda: set_each(full=False)


def _by_process() -> Callable[[], None]:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)
