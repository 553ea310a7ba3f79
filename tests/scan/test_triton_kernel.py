"""The GPU kernel: its programs in Triton's interpreter, and itself where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import DEFAULT_TOLERANCES, kernels
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.numba_kernel import NumbaKernel
from pytest_subnet.scan.torch_kernel import TorchKernel, TorchMaskKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INTERPRETED = Path(__file__).with_name("triton_in_interpreter.py")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.slow
def test_the_programs_give_the_integers_of_the_other_kernels() -> None:
    pytest.importorskip("triton", reason="triton cannot be imported")
    # In a process of its own: Triton reads the variable when it is imported.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-W", "ignore::RuntimeWarning", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.fixture
def asked_anew() -> Iterator[None]:
    kernels.has_triton.cache_clear()
    yield
    kernels.has_triton.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_without_triton_torch_compares_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert isinstance(kernels.choose_kernel("cuda:0"), TorchKernel)
    assert isinstance(kernels.device_mask_kernel("cuda:0"), TorchMaskKernel)
    (said,) = caplog.messages
    assert said.startswith(
        "comparing on the GPU with torch, several times slower: triton cannot be used ("
    )
    assert said.endswith(
        "; install the triton that belongs to torch (pip install triton), and a C compiler"
    )


@pytest.mark.usefixtures("asked_anew")
def test_triton_without_a_driver_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="triton cannot be imported")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not kernels.has_triton()
    (said,) = caplog.messages
    assert "triton cannot be used (" in said
    assert "\n" not in said


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_on_a_gpu_the_three_kernels_give_the_same_integers(
    dtype: str, random_words: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    entries = (1 << 20) + 4099
    sides = random_words(getattr(torch, dtype), (entries,), seed=2)
    raw = [side.view(torch.uint8) for side in sides]
    bounds = np.array([0, 7, entries // 2, entries], np.int64)
    assert DTYPES[dtype].itemsize * entries == raw[0].numel()
    counted = []
    for kernel, where in (
        (NumbaKernel(), [side.numpy() for side in raw]),
        (TorchKernel(), [side.cuda() for side in raw]),
        (kernels.choose_kernel("cuda"), [side.cuda() for side in raw]),
    ):
        counters = Counters(3, DEFAULT_TOLERANCES[1:])
        kernel(*where, dtype, bounds, counters)
        counted.append(counters.integers.tolist())
    assert counted[0] == counted[1] == counted[2]
