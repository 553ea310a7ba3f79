"""Every kernel gives the integers of the definition, for whatever bits there are."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_subnet import SubnetError
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import DEFAULT_TOLERANCES, PAPER, Tolerance, bits_kernel
from pytest_subnet.scan.contracts import FileKernel, FileRun, Place
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.numba_kernel import BLOCK, NumbaKernel
from pytest_subnet.scan.torch_kernel import TorchKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytest_subnet.scan.contracts import Kernel

BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
WORD = {16: np.uint16, 32: np.uint32, 64: np.uint64}
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}
OTHERS = [dtype for dtype in DTYPES if dtype not in ARITHMETIC]
TOLERANCES = [
    *(Tolerance(atol=atol) for atol in (0.0, 1e-45, 1e-5, 2**-9, 1.0, 1e30, 1e300)),
    *(Tolerance(rtol=rtol) for rtol in (0.0, 1e-12, 1e-3, 2**-8, 0.5, 1.0, 2.0, 1e30)),
]

thorough = settings(derandomize=True, deadline=None, max_examples=300, database=None)


def remarkable(dtype: str) -> list[int]:
    """Zeros, the ends of the subnormal and normal numbers, Inf, quiet and signalling NaN."""
    mantissa = MANTISSA[dtype]
    infinity = ((1 << (BITS[dtype] - 1 - mantissa)) - 1) << mantissa
    one = (infinity >> mantissa >> 1) << mantissa
    smallest_normal = 1 << mantissa
    positive = [0, 1, smallest_normal - 1, smallest_normal, one, one + 1, infinity - 1, infinity]
    positive += [infinity + 1, infinity + (1 << (mantissa - 1)), 2 * infinity + 1 - infinity]
    return [*positive, *(word | 1 << (BITS[dtype] - 1) for word in positive)]


def words(dtype: str) -> st.SearchStrategy[tuple[int, int]]:
    """A word of the base and one of the tuned checkpoint: alike, neighbours, or strangers."""
    bits = BITS[dtype]
    word = st.one_of(st.sampled_from(remarkable(dtype)), st.integers(0, 2**bits - 1))
    relation = st.one_of(
        st.sampled_from([lambda w: w, lambda w: w ^ 1 << (bits - 1), lambda w: w ^ 1]),
        word.map(lambda other: lambda _: other),
    )
    return st.tuples(word, relation).map(lambda pair: (pair[0], pair[1](pair[0])))


class Case:
    """Two buffers, how they are cut into segments, and the tolerances."""

    def __init__(
        self,
        dtype: str,
        base: bytes,
        tuned: bytes,
        cuts: Sequence[int] = (),
        tolerances: Sequence[Tolerance] = (),
    ) -> None:
        self.dtype, self.base, self.tuned, self.tolerances = dtype, base, tuned, tuple(tolerances)
        entries = len(base) // DTYPES[dtype].itemsize
        self.bounds = np.array([0, *sorted(cut % (entries + 1) for cut in cuts), entries], np.int64)

    @classmethod
    def of(cls, dtype: str, pairs: Sequence[tuple[int, int]], *rest: object) -> Case:
        sides = np.array(pairs, WORD[BITS[dtype]]).reshape(-1, 2).T
        return cls(dtype, sides[0].tobytes(), sides[1].tobytes(), *rest)

    def counters(self) -> Counters:
        return Counters(len(self.bounds) - 1, self.tolerances)

    def check(self, counters: Counters, by_definition: Callable[..., tuple[object, ...]]) -> None:
        itemsize = DTYPES[self.dtype].itemsize
        for row, (start, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            part = slice(start * itemsize, end * itemsize)
            integers, sums, peak = by_definition(
                self.base[part], self.tuned[part], self.dtype, self.tolerances
            )
            assert counters.integers[row].tolist() == integers
            np.testing.assert_allclose(counters.sums[row], sums, rtol=1e-5, atol=1e-300)
            np.testing.assert_allclose(counters.peaks[row], peak, rtol=1e-6)

    def __repr__(self) -> str:
        return f"Case({self.dtype}, {self.base.hex()}, {self.tuned.hex()}, {self.bounds})"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(ARITHMETIC))
    pairs = draw(st.lists(words(dtype), max_size=40))
    cuts = draw(st.lists(st.integers(0, 40), max_size=4))
    tolerances = draw(st.lists(st.sampled_from(TOLERANCES), max_size=4, unique=True))
    return Case.of(dtype, pairs, cuts, tolerances)


def buffer(data: bytes, *, shift: int = 0) -> np.ndarray:
    """Bytes in memory, `shift` bytes after an address that any word may have."""
    room = np.empty(len(data) + shift, np.uint8)
    room[shift:] = np.frombuffer(data, np.uint8)
    return room[shift:]


@pytest.fixture(params=[NumbaKernel, TorchKernel], scope="module")
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param()


# A NaN that stays itself and a zero that changes its sign, in one block.
NAN_AND_ZERO = [Case.of(d, [(remarkable(d)[9],) * 2, (0, 1 << (BITS[d] - 1))]) for d in ARITHMETIC]


@thorough
@given(case=cases(), shift=st.integers(0, 3))
@example(case=NAN_AND_ZERO[0], shift=0)
@example(case=NAN_AND_ZERO[3], shift=0)
def test_buffers_give_the_numbers_of_the_definition(
    kernel: Kernel, by_definition: Callable[..., object], case: Case, shift: int
) -> None:
    counters = case.counters()
    base, tuned = buffer(case.base, shift=shift), buffer(case.tuned)
    kernel(base, tuned, case.dtype, case.bounds, counters)
    case.check(counters, by_definition)


class Files:
    """Two files that hold the buffers of one case, each somewhere in the middle."""

    def __init__(self, directory: Path) -> None:
        names = ("base", "tuned")
        self._files = [open(directory / name, "w+b", buffering=0) for name in names]  # noqa: SIM115

    def compare(
        self,
        case: Case,
        scratch: int,
        offsets: tuple[int, int] = (0, 0),
        cuts: Sequence[int] = (),
    ) -> Counters | None:
        places = []
        sides = zip(self._files, (case.base, case.tuned), offsets, strict=True)
        for file, data, offset in sides:
            file.seek(0)
            file.truncate()
            file.write(b"\x7f" * offset + data)
            places.append(Place(file.fileno(), offset))
        counters = case.counters()
        room = np.empty(scratch, np.uint8), np.empty(scratch, np.uint8)
        itemsize = DTYPES[case.dtype].itemsize
        entries = [0, *sorted(cuts), int(case.bounds[-1])]
        runs = [
            FileRun(
                *(Place(place.file, place.offset + start * itemsize) for place in places),
                room,
                end - start,
            )
            for start, end in pairwise(entries)
        ]
        done = NumbaKernel().compare_files(runs, case.dtype, case.bounds, counters)
        return counters if done else None

    def close(self) -> None:
        for file in self._files:
            file.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    opened = Files(tmp_path_factory.mktemp("kernels"))
    yield opened
    opened.close()


needs_pread = pytest.mark.skipif(not hasattr(os, "pread"), reason="the system has no pread")


@needs_pread
@thorough
@given(
    case=cases(),
    scratch=st.sampled_from([8, 16, 24, 64, 1024]),
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_files_give_the_numbers_of_the_definition(
    files: Files,
    by_definition: Callable[..., object],
    case: Case,
    scratch: int,
    offsets: tuple[int, int],
) -> None:
    counters = files.compare(case, scratch, offsets)
    assert counters is not None
    case.check(counters, by_definition)


# Squares of tiny and huge ones are too small and too large for the dtype they are added in.
SIZE = {
    "weights": lambda _: 0.02,
    "tiny": lambda info: info.tiny**0.5 * 1e-3,
    "huge": lambda info: info.max**0.5 * 1e3,
}


def long_case(dtype: str, kind: str) -> Case:
    """More than two blocks of a dtype, cut inside of blocks."""
    random = np.random.default_rng(3)
    entries = 2 * BLOCK + 77
    word = WORD[BITS[dtype]]
    if kind in SIZE:
        floats = random.standard_normal(entries) * SIZE[kind](torch.finfo(getattr(torch, dtype)))
        base = torch.from_numpy(floats).to(getattr(torch, dtype)).view(torch.uint8).numpy()
        base = base.view(word)
        tuned = base + (random.random(entries) < 0.15).astype(word)
        if kind == "tiny":  # becomes ordinary somewhere
            tuned[100 : BLOCK + 1] = remarkable(dtype)[4]
    elif kind == "constant":
        base = np.full(entries, remarkable(dtype)[4], word)
        tuned = base + word(1)
    else:
        base = random.integers(0, 2 ** BITS[dtype], entries, word, endpoint=False)
        tuned = np.where(random.random(entries) < 0.5, base, base[::-1])
    if kind == "mostly finite":
        exponent = remarkable(dtype)[7]
        base = np.where((base & exponent) == exponent, word(1), base)
        tuned = np.where((tuned & exponent) == exponent, word(2), tuned)
        base[5], tuned[BLOCK + 9], tuned[BLOCK - 1] = exponent, exponent + 1, exponent
    cuts = [1, 100, BLOCK - 1, BLOCK + 1, BLOCK + 1, 2 * BLOCK]
    return Case(dtype, base.tobytes(), tuned.tobytes(), cuts, [Tolerance(rtol=1e-3), PAPER])


LONG = pytest.mark.parametrize("kind", [*SIZE, "constant", "random", "mostly finite"])


@LONG
@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_segments_longer_than_a_block(
    kernel: Kernel, by_definition: Callable[..., object], dtype: str, kind: str
) -> None:
    case = long_case(dtype, kind)
    counters = case.counters()
    kernel(buffer(case.base), buffer(case.tuned), dtype, case.bounds, counters)
    case.check(counters, by_definition)


@needs_pread
@LONG
@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_segments_longer_than_a_block_from_files(
    files: Files, by_definition: Callable[..., object], dtype: str, kind: str
) -> None:
    case = long_case(dtype, kind)
    for scratch in (1 << 12, 1 << 20):
        counters = files.compare(case, scratch)
        assert counters is not None
        case.check(counters, by_definition)


@needs_pread
@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_what_lies_in_several_runs_is_counted_as_one(
    files: Files, by_definition: Callable[..., object], dtype: str
) -> None:
    case = long_case(dtype, "random")
    total = int(case.bounds[-1])
    edges = [int(edge) for edge in case.bounds[1:-1]]
    random = np.random.default_rng(3)
    drawn = np.unique(random.integers(1, total, 9)).tolist()
    for cuts in ([1], [total // 2], [total - 1], edges, drawn):
        counters = files.compare(case, 1 << 14, cuts=sorted({*cuts} - {0, total}))
        assert counters is not None
        case.check(counters, by_definition)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_word_of_16_bits_beside_itself_and_its_neighbours(
    kernel: Kernel, by_definition: Callable[..., object], dtype: str
) -> None:
    base = np.arange(1 << 16, dtype=np.uint16)
    for tuned in (base, base + np.uint16(1), base ^ np.uint16(0x8000)):
        case = Case(dtype, base.tobytes(), tuned.tobytes(), [], TOLERANCES)
        counters = case.counters()
        kernel(buffer(case.base), buffer(case.tuned), dtype, case.bounds, counters)
        case.check(counters, by_definition)


def test_what_is_found_is_added_to_the_counters(kernel: Kernel) -> None:
    case = Case.of("bfloat16", [(0x3F80, 0x4000), (0, 0)], [], DEFAULT_TOLERANCES[1:])
    counters = case.counters()
    for _ in range(3):
        kernel(buffer(case.base), buffer(case.tuned), "bfloat16", case.bounds, counters)
    assert counters.integers.tolist() == [[3, 0, 0, 0, 3]]
    assert counters.sums.tolist() == [[3.0, 3.0, 12.0]]
    assert counters.peaks.tolist() == [1.0]


def test_buffers_that_must_not_be_written_to(kernel: Kernel) -> None:
    case = Case.of("float32", [(0, 1)])
    sides = [np.frombuffer(side, np.uint8) for side in (case.base, case.tuned)]
    counters = case.counters()
    kernel(*sides, "float32", case.bounds, counters)
    assert counters.integers[0, 0] == 1


@needs_pread
@pytest.mark.parametrize("missing", [1, 2, 40])
def test_a_file_that_ends_early_leaves_the_counters_alone(files: Files, missing: int) -> None:
    case = long_case("float32", "random")
    short = Case("float32", case.base[:-missing], case.tuned)
    short.bounds = case.bounds
    assert files.compare(short, 1 << 12) is None
    counters = Counters(len(case.bounds) - 1, ())
    room = np.empty((2, 64), np.uint8)
    run = FileRun(Place(-1, 0), Place(-1, 0), (room[0], room[1]), int(case.bounds[-1]))
    for runs in ([run], []):  # a file that is not there, and bytes that no run has
        assert not NumbaKernel().compare_files(runs, "float32", case.bounds, counters)
    assert not counters.integers.any()


@pytest.mark.parametrize("dtype", OTHERS)
@given(data=st.data())
@settings(thorough, max_examples=15)
def test_other_dtypes_are_compared_by_bits(dtype: str, data: st.DataObject) -> None:
    itemsize = DTYPES[dtype].itemsize
    entry = st.binary(min_size=itemsize, max_size=itemsize)
    pairs = data.draw(st.lists(st.one_of(st.tuples(entry, entry), entry.map(lambda e: (e, e)))))
    base, tuned = (b"".join(side) for side in (zip(*pairs, strict=True) if pairs else ("", "")))
    case = Case(dtype, base or b"", tuned or b"", [len(pairs) // 2], [PAPER, Tolerance(rtol=0.5)])
    counters = case.counters()
    bits_kernel.compare(buffer(case.base), buffer(case.tuned), dtype, case.bounds, counters)
    for row, (start, end) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
        changed = sum(one != other for one, other in pairs[start:end])
        assert counters.integers[row, [0, 4, 5]].tolist() == [changed] * 3
        assert counters.integers[row, 1] == 0
    assert not counters.sums.any()
    assert not counters.peaks.any()


@pytest.mark.parametrize("dtype", OTHERS)
def test_nan_and_inf_of_other_dtypes_are_counted(dtype: str) -> None:
    special = np.array([0, np.nan, np.inf, -np.inf, 1, 2, np.nan, np.nan], np.float64)
    for data in (
        np.arange(256, dtype=np.uint8),
        np.random.default_rng(5).integers(0, 256, 1 << 12, np.uint8),
        special.view(np.uint8),
        special.astype(np.float32).view(np.uint8),
    ):
        tensor = torch.from_numpy(data.copy()).view(getattr(torch, dtype))
        if tensor.is_complex():
            broken = ~torch.view_as_real(tensor).isfinite().all(dim=1)
        else:
            broken = ~tensor.double().isfinite()
        counters = Counters(1, ())
        bounds = np.array([0, tensor.numel()])
        bits_kernel.compare(data, np.zeros_like(data), dtype, bounds, counters)
        bits_kernel.compare(np.zeros_like(data), data, dtype, bounds, counters)
        assert counters.integers[0, 2:].tolist() == [int(broken.sum())] * 2


def test_the_compiled_kernel_is_chosen_on_the_cpu() -> None:
    for device in (None, "cpu"):
        assert isinstance(choose_kernel(device), NumbaKernel)
    assert isinstance(choose_kernel(None), FileKernel)
    assert not isinstance(TorchKernel(), FileKernel)


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_an_error_with_its_remedy(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        SubnetError, match=rf"no device {device} .* sees no CUDA GPUs; .*--subnet-d"
    ):
        choose_kernel(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SubnetError, match="sees 1 CUDA GPU;"):
        choose_kernel("cuda:7")
    assert choose_kernel("cuda:0").device == "cuda:0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_reference_gives_the_numbers_of_the_definition(
    by_definition: Callable[..., object],
) -> None:
    for dtype in ARITHMETIC:
        case = long_case(dtype, "mostly finite")
        counters = case.counters()
        sides = (torch.from_numpy(buffer(side)).cuda() for side in (case.base, case.tuned))
        TorchKernel()(*sides, dtype, case.bounds, counters)
        case.check(counters, by_definition)
