"""The programs of the GPU kernel, run by Triton's interpreter: `test_triton_kernel.py` starts this.

The interpreter takes milliseconds for what a GPU does in nanoseconds, so tiles are small here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance, bits_kernel, triton_kernel
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.device_pipeline import CompareOnGpu, Lane
from pytest_subnet.scan.found import Found
from pytest_subnet.scan.numba_kernel import NumbaKernel
from pytest_subnet.scan.torch_kernel import TorchMaskKernel
from pytest_subnet.scan.triton_kernel import COMPILED, TritonKernel, TritonMaskKernel, can_count
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SEVEN = [
    PAPER,
    Tolerance(rtol=1e-3),
    Tolerance(atol=0.0),
    Tolerance(rtol=1e30),
    Tolerance(atol=1e300),
    Tolerance(atol=1e-45),
    Tolerance(rtol=2**-8),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "_LANES", 4)


def words_of(dtype: str, kind: str, entries: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    word = WORD[DTYPES[dtype].itemsize]
    bits = 8 * DTYPES[dtype].itemsize
    if kind == "random bits":
        base = random.integers(0, 2**bits - 1, entries, word, endpoint=True)
        return base, np.where(random.random(entries) < 0.5, base, base[::-1])
    info = torch.finfo(getattr(torch, dtype))
    scale = {"weights": 0.02, "tiny": info.tiny**0.5 * 1e-3, "huge": info.max**0.5 * 1e3, "zero": 0}
    values = torch.from_numpy(random.standard_normal(entries) * scale[kind])
    base = values.to(getattr(torch, dtype)).view(torch.uint8).numpy().view(word).copy()
    tuned = base + (random.random(entries) < 0.3).astype(word)
    base[::50], tuned[::50] = 0, 1 << (bits - 1)
    base[7::50], tuned[9::50] = 0, 0
    return base, tuned


def at_address(words: np.ndarray, remainder: int) -> np.ndarray:
    """The bytes of some words at an address with this remainder by 16."""
    room = np.empty(words.nbytes + 32, np.uint8)
    start = (remainder - room.ctypes.data) % 16
    room[start : start + words.nbytes] = words.view(np.uint8)
    return room[start : start + words.nbytes]


# Two whole tiles and a rest; a segment that starts off 16 bytes, an empty one, a short one.
CUTS = np.array([0, 300, 301, 301, 340, 350], np.int64)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((dtype, kind) for dtype in COMPILED for kind in ("weights", "random bits")),
        *(("bfloat16", kind) for kind in ("tiny", "huge", "zero")),
    ],
)
def test_counters_are_those_of_the_definition(
    dtype: str, kind: str, by_definition: Callable[..., tuple[object, ...]]
) -> None:
    base, tuned = words_of(dtype, kind, CUTS[-1])
    asked = SEVEN if kind == "random bits" else SEVEN[:2]
    counters = Counters(len(CUTS) - 1, asked)
    TritonKernel()(at_address(base, 0), at_address(tuned, 0), dtype, CUTS, counters)
    for row, (start, end) in enumerate(pairwise(CUTS)):
        integers, sums, peak = by_definition(
            base[start:end].tobytes(), tuned[start:end].tobytes(), dtype, asked
        )
        assert counters.integers[row].tolist() == integers
        np.testing.assert_allclose(counters.sums[row], sums, rtol=1e-5, atol=1e-300)
        np.testing.assert_allclose(counters.peaks[row], peak, rtol=1e-6)


@pytest.mark.parametrize("remainder", [2, 3])
def test_sides_at_odd_addresses(remainder: int, by_definition: Callable[..., object]) -> None:
    base, tuned = words_of("bfloat16", "weights", 300)
    counters = Counters(1, ())
    bounds = np.array([0, 300])
    sides = at_address(base, 0), at_address(tuned, remainder)
    TritonKernel()(*sides, "bfloat16", bounds, counters)
    wanted = by_definition(base.tobytes(), tuned.tobytes(), "bfloat16", ())
    assert counters.integers[0].tolist() == wanted.integers


def test_what_is_found_is_added() -> None:
    base, tuned = words_of("float16", "weights", 300)
    counters, once = Counters(1, SEVEN[:1]), Counters(1, SEVEN[:1])
    bounds = np.array([0, 300])
    for each in (once, counters, counters):
        TritonKernel()(at_address(base, 0), at_address(tuned, 0), "float16", bounds, each)
    assert (counters.integers == 2 * once.integers).all()
    assert once.integers[0, 0]
    assert (counters.peaks == once.peaks).all()


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [
        *((dtype, "weights", SAME_BITS) for dtype in COMPILED),
        *((dtype, "random bits", PAPER) for dtype in COMPILED),
        ("bfloat16", "weights", Tolerance(rtol=2**-8)),
    ],
)
def test_bits_and_strata_are_those_of_the_reference(
    dtype: str, kind: str, tolerance: Tolerance
) -> None:
    sides = [at_address(side, 0) for side in words_of(dtype, kind, CUTS[-1])]
    counters = [Counters(len(CUTS) - 1, SEVEN[1:2]) for _ in range(2)]
    found = [Found(CUTS, dtype, tolerance) for _ in range(2)]
    TritonMaskKernel()(*sides, dtype, CUTS, counters[0], found[0])
    TorchMaskKernel()(*sides, dtype, CUTS, counters[1], found[1])
    assert found[0].words.tolist() == found[1].words.tolist()
    assert found[0].words.any()
    assert (found[0].population == found[1].population).all()
    assert (found[0].members == found[1].members).all()
    assert (counters[0].integers == counters[1].integers).all()


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each not in COMPILED])
def test_other_dtypes(dtype: str) -> None:
    random = np.random.default_rng(6)
    itemsize = DTYPES[dtype].itemsize
    entries = 4 * 4 * 16 + 77
    base, other = random.integers(0, 256, (2, entries * itemsize), np.uint8)
    tuned = np.where(random.random(base.size) < 0.7, base, other)
    bounds = np.array([0, entries - 3, entries])
    got, wanted = Counters(2, SEVEN[:2]), Counters(2, SEVEN[:2])
    reference = NumbaKernel() if dtype == "float64" else bits_kernel.compare
    TritonKernel()(at_address(base, 0), at_address(tuned, 0), dtype, bounds, got)
    reference(base, tuned, dtype, bounds, wanted)
    assert got.integers.tolist() == wanted.integers.tolist()
    assert can_count(dtype) == (dtype not in ("float64", "complex64", "complex128"))


def test_a_pair_in_memory_is_compared_where_it_lies() -> None:
    from pytest_subnet import open_pair

    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).half()
    tuned = torch.where(torch.arange(40)[:, None] % 3 == 0, base, base * 2)
    before = {"weight": base, "bias": base.ravel()[1:6]}  # at an odd address
    after = {"weight": torch.nn.Parameter(tuned), "bias": tuned.ravel()[31:36]}
    pair = open_pair(before, after)
    (unit,) = cut(pair, range(2))
    work = CompareOnGpu(NumbaKernel(), (PAPER,), pair.base, pair.tuned, "cpu")
    got, wanted = Counters(2, (PAPER,)), Counters(2, (PAPER,))
    assert work._compare_in_place(unit, got)
    for row, name in enumerate(before):
        sides = [side[name].detach().contiguous().numpy() for side in (before, after)]
        part = Counters(1, (PAPER,))
        bounds = np.array([0, sides[0].size])
        NumbaKernel()(*(side.reshape(-1).view(np.uint8) for side in sides), "float16", bounds, part)
        wanted.add(np.array([row]), part)
    assert got.integers.tolist() == wanted.integers.tolist()

    apart = open_pair(before, {"weight": tuned, "bias": torch.ones(10).half()[::2]})
    (unit,) = cut(apart, range(2))
    work = CompareOnGpu(NumbaKernel(), (PAPER,), apart.base, apart.tuned, "cpu")
    assert not work._compare_in_place(unit, got)  # not in row order


def test_pieces_from_files_give_the_counters_of_the_whole(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from pytest_subnet import open_pair

    named: dict[str, dict[str, np.ndarray]] = {}
    for number, entries in enumerate((600, 5, 333)):
        sides = words_of("float16", "weights", entries)
        for name, side in zip(("base", "tuned"), sides, strict=True):
            named.setdefault(name, {})[f"{number}.weight"] = side.view(np.float16)
    for name, tensors in named.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    (unit,) = cut(pair, range(3))
    got, wanted = Counters(3, (PAPER,)), Counters(3, (PAPER,))
    lane = Lane(torch.device("cpu"), 256)
    with FileReader() as reader:
        lane.compare(unit, reader, got)
    for row, segment in enumerate(unit.segments):
        sides = [named[name][segment.base_name].view(np.uint8) for name in ("base", "tuned")]
        part = Counters(1, (PAPER,))
        NumbaKernel()(*sides, "float16", np.array([0, segment.count]), part)
        wanted.add(np.array([row]), part)
    assert got.integers.tolist() == wanted.integers.tolist()
    np.testing.assert_allclose(got.sums, wanted.sums, rtol=1e-6)
