"""Which kernel compares: Numba's on the CPU, Triton's on a GPU; else the reference, on either."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from subprocess import SubprocessError
from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from pytest_subnet.scan.contracts import Kernel, MaskKernel

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

        return TorchKernel(device)
    _check_present(device)
    return device_kernel(device)


def device_kernel(device: str | None) -> Kernel:
    """The fastest kernel for tensors on `device`; None compares them where they are."""
    if _is_cuda(device) and has_triton():
        from pytest_subnet.scan.triton_kernel import TritonKernel

        return TritonKernel(device)
    from pytest_subnet.scan.torch_kernel import TorchKernel

    return TorchKernel(device)


def device_mask_kernel(device: str | None) -> MaskKernel:
    """As `device_kernel`."""
    if _is_cuda(device) and has_triton():
        from pytest_subnet.scan.triton_kernel import TritonMaskKernel

        return TritonMaskKernel(device)
    from pytest_subnet.scan.torch_kernel import TorchMaskKernel

    return TorchMaskKernel(device)


def device_bits_kernel(device: str | None) -> Kernel:
    """The same for the dtypes that are compared by bits."""
    if _is_cuda(device) and has_triton():
        from pytest_subnet.scan.triton_kernel import TritonKernel

        return TritonKernel(device)
    from pytest_subnet.scan import bits_kernel

    return bits_kernel.compare


def _is_cuda(device: str | None) -> bool:
    """Whether `device` is a CUDA GPU, or there is one where tensors may be."""
    import torch

    return torch.cuda.is_available() if device is None else device.startswith("cuda")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be used; says what it costs where it cannot."""
    import torch

    try:
        importlib.import_module("triton")
        if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            # Builds what it starts programs with, for which it needs a compiler and the driver.
            driver = importlib.import_module("triton.runtime.driver").driver
            driver.active.get_current_target()
    except (ImportError, AssertionError, OSError, RuntimeError, SubprocessError) as error:
        _log.warning(
            "comparing on the GPU with torch, several times slower: triton cannot be used (%s); "
            "install the triton that belongs to torch (pip install triton), and a C compiler",
            str(error).partition("\n")[0],
        )
        return False
    return True


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
