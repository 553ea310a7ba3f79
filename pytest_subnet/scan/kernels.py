"""Which kernel compares: the compiled one on the CPU, the reference on a device or without Numba."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_subnet.scan.contracts import Kernel

_log = logging.getLogger("pytest_subnet")


def choose_kernel(device: str | None) -> Kernel:
    """The fastest kernel for tensors on `device`; None is the CPU."""
    if device is None or device == "cpu":
        compiled = _numba_kernel()
        if compiled is not None:
            return compiled
    from pytest_subnet.scan.torch_kernel import TorchKernel

    return TorchKernel(device)


@functools.cache
def _numba_kernel() -> Kernel | None:
    try:
        from pytest_subnet.scan.numba_kernel import NumbaKernel
    except ImportError as error:
        _log.warning(
            "comparing with torch, several times slower: numba cannot be imported (%s); "
            "install a numba that supports this Python",
            error,
        )
        return None
    return NumbaKernel()
