"""Comparing on a GPU, as far as that shows without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import SubnetError, open_pair, update_mask, update_sparsity
from pytest_subnet.checkpoints.base import Extent
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import PAPER, SAME_BITS, device_pipeline, kernels, masking
from pytest_subnet.scan.comparing import Compare
from pytest_subnet.scan.device_pipeline import CompareOnGpu, Lane, comparing, gpu_of
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.masking import CompareAndMark, choose_mask_kernel, mark
from pytest_subnet.scan.torch_kernel import TorchKernel, TorchMaskKernel
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan import Tolerance
    from pytest_subnet.scan.counters import Counters
    from pytest_subnet.scan.units import ScanUnit

MB = 1024 * 1024


def lane_with_room_for(most: int) -> Callable[[torch.device, int], int]:
    """What stands for a lane on a GPU with so much memory: the size it was given."""

    def lane(device: torch.device, nbytes: int) -> int:
        if 2 * nbytes > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a piece")
        return nbytes

    return lane


@pytest.mark.parametrize(("room", "piece"), [(10**9, 16), (20 * MB, 8), (2 * MB, 1)])
def test_where_memory_is_short_pieces_are_smaller(
    monkeypatch: pytest.MonkeyPatch, room: int, piece: int
) -> None:
    monkeypatch.setattr(device_pipeline, "cores", lambda: 4)
    monkeypatch.setattr(device_pipeline, "Lane", lane_with_room_for(room))
    assert device_pipeline.lane_on("cuda:0") == piece * MB


def test_what_is_in_flight_is_bounded_on_any_number_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_pipeline, "Lane", lane_with_room_for(10**9))
    for cores in (1, 2, 16, 100, 256):
        monkeypatch.setattr(device_pipeline, "cores", lambda cores=cores: cores)
        assert 2 * cores * device_pipeline.lane_on("cuda:0") <= 512 * MB


def test_no_memory_at_all_is_an_error_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pipeline, "Lane", lane_with_room_for(0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (512, 85_000_000_000)}.get)
    with pytest.raises(SubnetError) as caught:
        device_pipeline.lane_on("cuda:1")
    assert str(caught.value) == (
        "no room to compare on cuda:1: 2 pieces of 1,048,576 bytes do not fit; 512 of its "
        "85,000,000,000 bytes are free; free some (torch.cuda.empty_cache()) or compare on the "
        'CPU with device="cpu" (--subnet-device cpu)'
    )


def test_another_error_of_the_device_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, nbytes: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_pipeline, "Lane", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device_pipeline.lane_on("cuda:0")


@pytest.mark.parametrize(("has_triton", "work"), [(True, CompareOnGpu), (False, Compare)])
def test_triton_is_used_where_it_is(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, work: type
) -> None:
    monkeypatch.setattr(device_pipeline, "has_triton", lambda: has_triton)
    monkeypatch.setattr(device_pipeline, "device_kernel", TorchKernel)
    assert type(comparing(TorchKernel(), (), None, None, "cuda:0")) is work
    assert type(comparing(TorchKernel(), (), None, None, "cpu")) is Compare
    assert type(comparing(TorchKernel(), (), None, None, None)) is Compare


def test_files_and_tensors_of_the_cpu_are_on_no_gpu(tmp_path: Path) -> None:
    named = {"a.weight": torch.ones(2, 2)}, {"a.weight": torch.zeros(2, 2)}
    assert gpu_of(open_pair(*named)) is None


def test_runs_of_bytes_are_read_across_extents(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    extents = [Extent(str(path), at, 10) for at in (20, 50, 0)]
    whole = [*range(20, 30), *range(50, 60), *range(10)]
    with FileReader() as reader:
        for skip in range(30):
            for count in range(30 - skip):
                into = bytearray(count)
                device_pipeline._read(reader, extents, skip, memoryview(into))
                assert list(into) == whole[skip : skip + count]


DTYPES_OF_WEIGHTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def saved_pair(
    tmp_path: Path, dtype: torch.dtype, random_words: Callable[..., tuple[torch.Tensor, ...]]
) -> ModelPair:
    shapes = {"a.weight": (70, 1001), "b.bias": (3,), "c.weight": (513, 200), "d.norm": (64,)}
    for number, name in enumerate(("base", "tuned")):
        tensors = {
            key: random_words(dtype, shape, seed=seed)[number]
            for seed, (key, shape) in enumerate(shapes.items())
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")


@pytest.mark.parametrize("tolerance", [SAME_BITS, PAPER])
@pytest.mark.parametrize("dtype", DTYPES_OF_WEIGHTS)
def test_masks_of_files_go_through_the_lanes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: Tolerance,
    random_words: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    """A lane on the CPU stands for one on a GPU: its bytes are those that are compared."""
    pair = saved_pair(tmp_path, dtype, random_words)
    tolerances = (PAPER,)
    plain = CompareAndMark(choose_mask_kernel(None), tolerances, tolerance, None, None)
    through = CompareAndMark(TorchMaskKernel("cpu"), tolerances, tolerance, None, None, "cpu")
    marked = []

    class Noted(Lane):
        def mark(self, unit: ScanUnit, *rest: Any) -> bool:
            marked.append((unit.number, super().mark(unit, *rest)))
            return marked[-1][1]

    monkeypatch.setattr(masking, "is_gpu", lambda device: device == "cpu")
    monkeypatch.setattr(masking, "lane_on", lambda device: Noted(torch.device(device), 256 * 1024))
    units = [*cut(pair, range(4), 256 * 1024), *cut(pair, [0], MB)]
    with plain.open() as expected, through.open() as got:
        for unit in units:
            one, other = expected(unit), got(unit)
            assert [w.tolist() for w in one.words] == [w.tolist() for w in other.words]
            assert (one.counters.integers == other.counters.integers).all()
            for these, those in zip(one.strata, other.strata, strict=True):
                assert these.tolist() == those.tolist()
    fits = [unit.count * dtype.itemsize <= 256 * 1024 for unit in units]
    assert [did for _, did in marked] == fits
    assert fits.count(False) == (dtype.itemsize >= 4)  # that one is read and copied at once


def test_what_is_cast_or_not_in_files_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "is_gpu", lambda device: True)
    monkeypatch.setattr(masking, "lane_on", None)
    tensors = [{"w": torch.full((70,), value)} for value in (1.0, 2.0)]
    for options in ({}, {"as_dtype": "bfloat16"}):
        (unit,) = cut(pair := open_pair(*tensors, **options), [0])
        work = CompareAndMark(TorchMaskKernel("cpu"), (), SAME_BITS, pair.base, pair.tuned, "cpu")
        with work.open() as compare:
            assert compare(unit).counters.integers[0, 0] == 70


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there_is_our_own_error(device: str) -> None:
    """Not torch's AssertionError, which is what a claim that does not hold raises."""
    pair = open_pair({"w": torch.zeros(3)}, {"w": torch.ones(3)}, device=device)
    for measure in (update_sparsity, update_mask):
        with pytest.raises(SubnetError, match=f"^there is no device {device} to compare on: torch"):
            measure(pair)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tolerance", [SAME_BITS, PAPER])
@pytest.mark.parametrize("dtype", DTYPES_OF_WEIGHTS)
def test_masks_from_files_are_those_of_the_cpu(
    tmp_path: Path,
    dtype: torch.dtype,
    tolerance: Tolerance,
    random_words: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    pair = saved_pair(tmp_path, dtype, random_words)
    other = open_pair(pair.base, pair.tuned, device="cuda")

    def marked(of: ModelPair) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        mark(of, range(4), tolerance, lambda *at: found.update({at[:2]: at[2].tolist()}))
        return found

    assert marked(other) == marked(pair)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_in_memory_and_from_files_the_integers_are_those_of_the_cpu(
    tmp_path: Path, dtype: torch.dtype, random_words: Callable[..., tuple[torch.Tensor, ...]]
) -> None:
    from safetensors.torch import save_file

    shapes = {"a": (700, 1000), "b": (3,), "c": (4096, 2050)}
    sides = [random_words(dtype, shape, seed=seed) for seed, shape in enumerate(shapes.values())]
    for number, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        tensors = {key: both[number] for key, both in zip(shapes, sides, strict=True)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    files = tmp_path / "base", tmp_path / "tuned"
    on_gpu = [
        {key: both[number].cuda() for key, both in zip(shapes, sides, strict=True)}
        for number in range(2)
    ]
    transposed = [{key: each.t().contiguous().t() for key, each in on_gpu[0].items()}, on_gpu[1]]
    pairs = [
        open_pair(*files, device="cpu"),
        open_pair(*files, device="cuda"),
        open_pair(*on_gpu),
        open_pair(*on_gpu, device="cuda:0"),
        open_pair(*transposed),
    ]
    assert kernels.has_triton()
    assert gpu_of(pairs[2]) == "cuda:0"
    wanted, *got = (scan(pair, range(3), (PAPER,)).integers.tolist() for pair in pairs)
    assert got == [wanted] * 4
    assert np.array(wanted).all(axis=0)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_caller_still_writes_is_waited_for() -> None:
    base = {"w.weight": torch.zeros(1 << 20, device="cuda")}
    tuned = {"w.weight": torch.zeros(1 << 20, device="cuda")}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        pair = open_pair(base, tuned)
        torch.cuda._sleep(1_000_000_000)
        tuned["w.weight"].add_(1)
        assert scan(pair, [0], ()).integers[0, 0] == 1 << 20


def comparing_at_most(most: int) -> Callable[[ScanUnit], Counters]:
    """A comparison on a GPU that has room for so many bytes of a pair in files."""
    work = Compare(kernels.choose_kernel(None), (PAPER,), None, None)

    def compare(unit: ScanUnit) -> Counters:
        if unit.nbytes > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a piece")
        with work.open() as within:
            return within(unit)

    return compare


@pytest.mark.parametrize("most", [4 * MB, 7 * MB, 64 * MB])
def test_what_does_not_fit_is_compared_in_halves(tmp_path: Path, most: int) -> None:
    random = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (700, 1001), "b.bias": (3,), "c.weight": (2048, 1024), "d.norm": (1,)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tuned = {name: value + (torch.rand(value.shape) < 0.1) for name, value in base.items()}
    for side, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{side}.safetensors")
    pair = open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    for unit in cut(pair, range(len(pair.tensors))):
        whole = comparing_at_most(10**12)(unit)
        pieces = device_pipeline._in_pieces(comparing_at_most(most), unit, (PAPER,), "cuda:0")
        assert (pieces.integers == whole.integers).all()
        assert (pieces.peaks == whole.peaks).all()
        np.testing.assert_allclose(pieces.sums, whole.sums, rtol=1e-6)


def test_where_not_even_a_small_part_fits_the_numbers_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("base", "tuned"):
        save_file({"w": torch.full((1024, 1024), len(side))}, tmp_path / f"{side}.safetensors")
    pair = open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    (unit,) = cut(pair, [0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (512, 85_000_000_000)}.get)
    with pytest.raises(SubnetError) as caught:
        device_pipeline._in_pieces(comparing_at_most(0), unit, (PAPER,), "cuda:1")
    assert str(caught.value) == (
        "no room to compare on cuda:1: 2,097,152 bytes of the pair do not fit; 512 of its "
        "85,000,000,000 bytes are free; free some (torch.cuda.empty_cache()) or compare on the "
        'CPU with device="cpu" (--subnet-device cpu)'
    )
