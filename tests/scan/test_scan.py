"""A whole pair: the numbers of the definition, from wherever the weights are and by whomever."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import open_checkpoint, open_pair
from pytest_subnet.checkpoints import Checkpoint, TensorInfo
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import PAPER, Tolerance, comparing, gathering, units
from pytest_subnet.scan.casts import cast
from pytest_subnet.scan.engines import ThreadEngine
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.torch_kernel import TorchKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from pytest_subnet.scan.counters import Counters

TOLERANCES = (PAPER, Tolerance(rtol=1e-3))
SHAPES = {"a": (3,), "b": (40, 7), "c": (1,), "d": (33,)}
Sides = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def sides(random_words: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Sides]:
    """Base and tuned of a few tensors of one dtype, in odd sizes."""

    def make(dtype: str) -> Sides:
        return {
            name: random_words(getattr(torch, dtype), shape, seed=seed)
            for seed, (name, shape) in enumerate(SHAPES.items())
        }

    return make


def side(sides: Sides, which: int) -> dict[str, torch.Tensor]:
    return {name: both[which] for name, both in sides.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class Bytes(Checkpoint):
    """The least a checkpoint can be: bytes by name, neither in files nor in memory to look at."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.label, self.config, self.ties, self.buffers = "bytes", {}, {}, frozenset()
        self._bytes = {name: raw(tensor) for name, tensor in tensors.items()}
        self._infos = {
            name: TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes)
            for name, t in tensors.items()
        }

    def names(self) -> Sequence[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[name][start : start + len(buffer)]

    def identity(self) -> Hashable:
        return id(self)


def in_file(tensors: dict[str, torch.Tensor], directory: Path) -> Path:
    """A safetensors file whose data starts at an odd byte."""
    path = directory / "model.safetensors"
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    stored = path.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    odd = length + 1
    path.write_bytes(
        odd.to_bytes(8, "little") + stored[8 : 8 + length] + b" " + stored[8 + length :]
    )
    return path


def transposed(tensors: dict[str, torch.Tensor], _: Path) -> dict[str, torch.Tensor]:
    """The same weights, in memory in another order of rows and columns."""
    return {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in tensors.items()}


SOURCES = {
    "file": in_file,
    "bin": lambda tensors, directory: torch.save(tensors, f := f"{directory}.bin") or f,
    "memory": lambda tensors, _: tensors,
    "transposed": transposed,
    "bytes": lambda tensors, _: Bytes(tensors),
}


@pytest.fixture(autouse=True)
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny tensors, so that units, segments and buffers end everywhere."""
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    monkeypatch.setattr(comparing, "_SCRATCH_BYTES", 128)


def check(
    counted: Counters, sides: Sides, by_definition: Callable[..., object], dtype: str
) -> None:
    for row, (base, tuned) in enumerate(sides.values()):
        integers, sums, peak = by_definition(raw(base), raw(tuned), dtype, TOLERANCES)
        assert counted.integers[row].tolist() == integers
        np.testing.assert_allclose(counted.sums[row], sums, rtol=1e-5)
        np.testing.assert_allclose(counted.peaks[row], peak, rtol=1e-6)


@pytest.mark.parametrize("dtype", ARITHMETIC)
@pytest.mark.parametrize(
    "sources",
    [
        ("file", "file"),
        ("bin", "file"),
        ("memory", "transposed"),
        ("bytes", "memory"),
        ("file", "bytes"),
    ],
)
def test_the_numbers_of_the_definition_from_any_source(
    sides: Callable[..., Sides],
    by_definition: Callable[..., object],
    tmp_path: Path,
    dtype: str,
    sources: tuple[str, str],
) -> None:
    weights = sides(dtype)
    pair = open_pair(
        *(SOURCES[source](side(weights, i), tmp_path / f"{i}") for i, source in enumerate(sources))
    )
    order = [tensor.name for tensor in pair.tensors]
    counted = scan(pair, range(len(order)), TOLERANCES)
    check(counted, {name: weights[name] for name in order}, by_definition, dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ARITHMETIC])
def test_all_other_dtypes_are_compared_by_bits(
    sides: Callable[..., Sides], tmp_path: Path, dtype: str
) -> None:
    weights = sides(dtype)
    for source in ("bin", "memory", "bytes"):
        paths = [SOURCES[source](side(weights, i), tmp_path / f"{source}{i}") for i in (0, 1)]
        counted = scan(open_pair(*paths), range(len(SHAPES)), TOLERANCES)
        for row, (base, tuned) in enumerate(weights.values()):
            words = [np.frombuffer(raw(t), f"V{DTYPES[dtype].itemsize}") for t in (base, tuned)]
            differing = int((words[0] != words[1]).sum())
            assert counted.integers[row, [0, 4, 5]].tolist() == [differing] * 3
            assert not counted.sums[row].any()


def test_rows_that_were_not_asked_for_stay_zero(
    sides: Callable[..., Sides], tmp_path: Path
) -> None:
    weights = sides("float32")
    pair = open_pair(
        in_file(side(weights, 0), tmp_path / "b"), in_file(side(weights, 1), tmp_path / "t")
    )
    counted = scan(pair, [1], TOLERANCES)
    assert [bool(row.any()) for row in counted.integers] == [False, True, False, False]


@pytest.mark.parametrize("as_dtype", ARITHMETIC)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float64")])
@pytest.mark.parametrize("source", ["file", "memory"])
def test_sides_of_different_dtypes_are_compared_after_a_cast(
    sides: Callable[..., Sides],
    by_definition: Callable[..., object],
    tmp_path: Path,
    dtypes: tuple[str, str],
    as_dtype: str,
    source: str,
) -> None:
    both = [side(sides(dtype), which) for which, dtype in enumerate(dtypes)]
    paths = [SOURCES[source](tensors, tmp_path / f"{i}") for i, tensors in enumerate(both)]
    pair = open_pair(*paths, as_dtype=as_dtype)
    counted = scan(pair, range(len(pair.tensors)), TOLERANCES)
    for row, tensor in enumerate(pair.tensors):
        stored = [np.frombuffer(raw(tensors[tensor.name]), np.uint8) for tensors in both]
        casts = [bytes(cast(b, d, as_dtype)) for b, d in zip(stored, dtypes, strict=True)]
        assert counted.integers[row].tolist() == by_definition(*casts, as_dtype, TOLERANCES)[0]


def test_the_common_rows_of_a_resized_vocabulary_only() -> None:
    name = "embed_tokens.weight"
    base, tuned = torch.zeros(60, 5), torch.zeros(64, 5)
    tuned[60:], tuned[7, 2] = 1, 1
    pair = open_pair({name: base}, {name: tuned}, vocab="common")
    assert scan(pair, [0], ()).integers.tolist() == [[1, 0, 0, 0]]


def test_numbers_do_not_depend_on_the_number_of_threads(
    sides: Callable[..., Sides], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sides("bfloat16")
    pair = open_pair(
        in_file(side(weights, 0), tmp_path / "b"), in_file(side(weights, 1), tmp_path / "t")
    )
    counted = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(
            gathering, "ThreadEngine", lambda threads=threads: ThreadEngine(threads)
        )
        counted.append(scan(pair, range(4), TOLERANCES))
    for other in counted[1:]:
        assert np.array_equal(other.integers, counted[0].integers)
        assert other.sums.tobytes() == counted[0].sums.tobytes()
        assert other.peaks.tobytes() == counted[0].peaks.tobytes()


class Reversed:
    """An engine that gives the last unit first."""

    def map(self, work: object, units: Sequence[object]) -> object:
        yield from reversed(list(ThreadEngine(1).map(work, units)))


def test_numbers_do_not_depend_on_the_order_of_the_results(
    sides: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sides("float32")
    pair = open_pair(side(weights, 0), side(weights, 1))
    in_order = scan(pair, range(4), ())
    monkeypatch.setattr(gathering, "ThreadEngine", Reversed)
    assert scan(pair, range(4), ()).sums.tobytes() == in_order.sums.tobytes()


@pytest.mark.parametrize(("copies", "says"), [(0, "did not come back"), (2, "came back twice")])
def test_an_engine_that_loses_or_repeats_a_unit_is_found_out(
    monkeypatch: pytest.MonkeyPatch, copies: int, says: str
) -> None:
    class Careless:
        def map(self, work: object, units: Sequence[object]) -> object:
            for result in ThreadEngine(1).map(work, units):
                yield from [result] * copies

    monkeypatch.setattr(gathering, "ThreadEngine", Careless)
    with pytest.raises(RuntimeError, match=says):
        scan(open_pair({"a": torch.zeros(3)}, {"a": torch.ones(3)}), [0], ())


def test_where_the_system_has_no_pread_files_are_read_into_buffers(
    sides: Callable[..., Sides],
    by_definition: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> bool:
        raise AssertionError("this calls pread by name")

    kernel = choose_kernel(None)
    monkeypatch.setattr(type(kernel), "compare_files", never)
    weights = sides("bfloat16")
    pair = open_pair(
        in_file(side(weights, 0), tmp_path / "b"), in_file(side(weights, 1), tmp_path / "t")
    )
    with pytest.raises(AssertionError, match="pread"):
        scan(pair, range(4), TOLERANCES)
    monkeypatch.setattr(comparing, "_HAS_PREAD", False)
    check(scan(pair, range(4), TOLERANCES), weights, by_definition, "bfloat16")


def test_from_safetensors_files_to_counters_torch_is_not_imported(
    sides: Callable[..., Sides], tmp_path: Path
) -> None:
    paths = [in_file(side(sides("bfloat16"), i), tmp_path / f"{i}") for i in (0, 1)]
    script = (
        "import sys; from pytest_subnet import open_pair; from pytest_subnet.scan import SAME_BITS;"
        "from pytest_subnet.scan.gathering import gather;"
        "print(gather(open_pair(*sys.argv[1:]), range(4), SAME_BITS).scanned.size,"
        "{'torch', 'transformers', 'safetensors', 'pytest'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout == "4 set()\n"


class Elsewhere(Bytes):
    """Weights that are tensors to look at, as those on a GPU are."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.tensors = tensors

    def view(self, name: str) -> torch.Tensor:
        return self.tensors[name].reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_tensors_are_compared_as_tensors_even_beside_arrays(
    sides: Callable[..., Sides], by_definition: Callable[..., object], device: str | None
) -> None:
    weights = sides("bfloat16")
    for base, tuned in ((Elsewhere, Elsewhere), (Elsewhere, Bytes), (open_checkpoint, Elsewhere)):
        pair = open_pair(base(side(weights, 0)), tuned(side(weights, 1)), device=device)
        check(scan(pair, range(4), TOLERANCES), weights, by_definition, "bfloat16")


def test_tensors_of_other_dtypes_are_compared_by_bits(sides: Callable[..., Sides]) -> None:
    weights = sides("int32")
    pair = open_pair(Elsewhere(side(weights, 0)), Elsewhere(side(weights, 1)))
    differing = [int((base != tuned).sum()) for base, tuned in weights.values()]
    assert scan(pair, range(4), ()).integers[:, 0].tolist() == differing


def test_files_can_be_compared_by_the_reference(
    sides: Callable[..., Sides],
    by_definition: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "choose_kernel", lambda _: TorchKernel())
    weights = sides("float16")
    pair = open_pair(
        in_file(side(weights, 0), tmp_path / "b"), in_file(side(weights, 1), tmp_path / "t")
    )
    check(scan(pair, range(4), TOLERANCES), weights, by_definition, "float16")
