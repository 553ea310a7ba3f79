"""What is measured does not depend on the precision that a trainer asked of torch."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import (
    displacement_rank,
    open_adapter,
    open_pair,
    principal_mask,
    singular_rotation,
    singular_shift,
    update_geometry,
    update_rank,
)
from pytest_subnet.arithmetic import _by_backend, _by_process, plain_arithmetic
from pytest_subnet.findings.geometry.masks import principal_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def precisions() -> list[str]:
    return [each.fp32_precision for each in BACKENDS]


def test_within_products_are_those_of_a_fresh_process_and_after_it_all_is_as_before() -> None:
    one, other = random(300, 200), random(200, 300, seed=1)
    wanted = one @ other
    torch.set_float32_matmul_precision("medium")
    asked = precisions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with plain_arithmetic():
            assert precisions() == ["ieee", "ieee"]
            assert torch.equal(one @ other, wanted)
        assert (one @ other).dtype == torch.bfloat16
    assert precisions() == asked
    assert torch.get_float32_matmul_precision() == "medium"


def test_what_is_full_already_is_left_alone() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # as in a fresh process
    with plain_arithmetic():
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_it_ends_with_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    asked = precisions()
    with pytest.raises(ZeroDivisionError), plain_arithmetic():
        _ = 1 / 0
    assert precisions() == asked


def test_the_last_thread_out_takes_it_back() -> None:
    torch.set_float32_matmul_precision("medium")
    asked = precisions()
    both_within, one_left = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def leave_first() -> None:
        with plain_arithmetic():
            both_within.wait()
        one_left.wait()

    def leave_last() -> list[str]:
        with plain_arithmetic():
            both_within.wait()
            one_left.wait()
            return precisions()

    with ThreadPoolExecutor(2) as threads:
        first, last = threads.submit(leave_first), threads.submit(leave_last)
        first.result()
        assert last.result() == ["ieee", "ieee"]
    assert precisions() == asked


@pytest.mark.parametrize("make_full", [_by_backend, _by_process])
@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_both_ways_of_asking_torch(make_full: Callable[[], Callable[[], None]], asked: str) -> None:
    """The second is that of torch before 2.9, and still works where nothing was set by backend."""
    torch.set_float32_matmul_precision(asked)
    before = precisions()
    go_back = make_full()
    assert precisions() == ["ieee", "ieee"]
    go_back()
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == asked


def test_what_is_inherited_stays_so() -> None:
    for each in BACKENDS:
        each.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    try:
        with plain_arithmetic():
            assert precisions() == ["ieee", "ieee"]
        assert precisions() == ["tf32", "tf32"]
        torch.backends.fp32_precision = "ieee"
        assert precisions() == ["ieee", "ieee"]
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own names")
def test_subnormals_are_no_zeros_within_and_after_it_all_is_as_before() -> None:
    smallest = torch.tensor(1e-40)
    torch.set_flush_denormal(True)
    try:
        flushed = float(smallest * 1)
        with plain_arithmetic():
            assert float(smallest * 1) == pytest.approx(1e-40, rel=1e-4)
        assert float(smallest * 1) == flushed == 0
    finally:
        torch.set_flush_denormal(False)


def rank_of_structure(root: Path) -> object:
    """Of a Toeplitz matrix, by a random sketch."""
    diagonals, places = random(799), torch.arange(400, device="cpu")
    rows, columns = places[:, None], places
    return displacement_rank(diagonals[rows - columns + 399])


def rotation_and_its_null(root: Path) -> object:
    base = random(1100, 1100)
    return singular_rotation(pair_of(base, base + 0.05 * random(1100, 1100, seed=1)), k=8)


def principal_entries_of_a_matrix(root: Path) -> object:
    mask = principal_bits(random(200, 300), 0.1, 8)
    return mask.tolist()


def mask_of_a_file(root: Path) -> object:
    save_file({"w": random(200, 300)}, root / "model.safetensors")
    mask = principal_mask(root, 0.1, rank=8)
    return [words.tolist() for words in mask.words("w")]


def merged_adapter(root: Path) -> object:
    base, adapter = root / "base", root / "adapter"
    for each in (base, adapter):
        each.mkdir()
    save_file({"layers.0.q_proj.weight": random(64, 96)}, base / "model.safetensors")
    key = "base_model.model.layers.0.q_proj.lora_{}.weight"
    factors = {key.format("A"): random(8, 96, seed=1), key.format("B"): random(64, 8, seed=2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return open_adapter(adapter, base).read("layers.0.q_proj.weight").tolist()


def pair_of(base: torch.Tensor, tuned: torch.Tensor) -> object:
    return open_pair({"w": base}, {"w": tuned})


def spectra(root: Path) -> object:
    base = random(40, 60)
    pair = pair_of(base, base + 0.05 * random(40, 60, seed=1))
    return singular_shift(pair), update_rank(pair), update_geometry(pair, rank=8, null="matrix")


def spectra_of_subnormals(root: Path) -> object:
    """Of small whole numbers, whose bits are so many times the smallest float32 of all."""
    drawn = torch.Generator().manual_seed(0)

    def whole(*shape: int, below: int) -> torch.Tensor:
        return torch.randint(1, below, shape, generator=drawn, dtype=torch.int32, device="cpu")

    base = whole(30, 40, below=1 << 18)
    tuned = base + whole(30, 1, below=50) * whole(1, 40, below=50)
    pair = pair_of(base.view(torch.float32), tuned.view(torch.float32))
    return update_rank(pair), singular_rotation(pair, k=2, null=None)


MEASURES = pytest.mark.parametrize(
    "measure",
    [
        spectra,
        spectra_of_subnormals,
        rank_of_structure,
        rotation_and_its_null,
        principal_entries_of_a_matrix,
        mask_of_a_file,
        merged_adapter,
    ],
)


@MEASURES
def test_numbers_are_those_of_full_precision(
    measure: Callable[[Path], object], tmp_path: Path
) -> None:
    """On a CPU without products of bfloat16 the first of the two precisions changes nothing."""
    (tmp_path / "full").mkdir()
    (tmp_path / "low").mkdir()
    wanted = measure(tmp_path / "full")
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(tmp_path / "low") == wanted


@MEASURES
@pytest.mark.parametrize("asked", ["device", "subnormals"])
def test_numbers_are_those_of_a_fresh_process(
    measure: Callable[[Path], object], asked: str, tmp_path: Path
) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "other").mkdir()
    wanted = measure(tmp_path / "fresh")
    with ExitStack() as undo:
        if asked == "device":
            torch.set_default_device("meta")
            undo.callback(torch.set_default_device, None)
        else:
            torch.set_flush_denormal(True)
            undo.callback(torch.set_flush_denormal, False)
        assert measure(tmp_path / "other") == wanted
