"""Which kernel compares: the compiled one on the CPU, else the reference, on a device or not."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from pytest_subnet.scan.contracts import Kernel

_log = logging.getLogger("pytest_subnet")


def choose_kernel(device: str | None) -> Kernel:
    """The fastest kernel for buffers on `device`; None is the CPU.

    Raises:
        SubnetError: there is no such device.
    """
    if device is None or device == "cpu":
        compiled = _numba_kernel()
        if compiled is not None:
            return compiled
    from pytest_subnet.scan.torch_kernel import TorchKernel

    if device is not None:
        _check_present(device)
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


def _check_present(device: str) -> None:
    import torch

    wanted = torch.device(device)
    if wanted.type == "cpu":
        return
    there = torch.cuda.device_count() if wanted.type == "cuda" else 0
    if (wanted.index or 0) >= there:
        raise SubnetError(
            f"there is no device {device} to compare on: torch {torch.__version__} sees "
            f"{there or 'no'} CUDA GPU{'' if there == 1 else 's'}; compare on the CPU with "
            'device="cpu" (--subnet-device cpu), or install a torch built for CUDA'
        )
