"""What the parts of a scan owe each other: each promise with the least that keeps it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pytest_subnet import CheckpointError, open_pair, update_sparsity
from pytest_subnet.checkpoints import Checkpoint, TensorInfo
from pytest_subnet.scan import PAPER, gathering
from pytest_subnet.scan.comparing import Compare
from pytest_subnet.scan.counters import (
    BASE_SQUARES,
    CHANGED,
    DELTA_SQUARES,
    FIRST_TOLERANCE,
    NONFINITE_BASE,
    NONFINITE_TUNED,
    TUNED_SQUARES,
    ZERO_FLIPS,
    Counters,
)
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.numba_kernel import NumbaKernel
from pytest_subnet.scan.torch_kernel import TorchKernel
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from pytest_subnet.scan.units import ScanUnit


class Archive(Checkpoint):
    """A format of its own: it gives names, infos and bytes, and an identity; nothing else."""

    def __init__(self, label: str, tensors: dict[str, tuple[tuple[int, ...], str, bytes]]) -> None:
        self.label, self.config, self.ties, self.buffers = label, {}, {}, frozenset()
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise self.unknown(name)
        shape, dtype, data = self._tensors[name]
        return TensorInfo(name, shape, dtype, len(data))

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self._tensors[name][2][start : start + len(buffer)]

    def identity(self) -> Hashable:
        return self.label


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.fixture
def archives() -> tuple[Archive, Archive]:
    name = "model.layers.0.mlp.up_proj.weight"
    return (
        Archive(
            "before", {name: ((2, 2), "float32", floats(1, 2, 3, 4)), "n": ((1,), "uint8", b"7")}
        ),
        Archive(
            "after", {name: ((2, 2), "float32", floats(1, 2, 3, 5)), "n": ((1,), "uint8", b"8")}
        ),
    )


def test_a_checkpoint_is_names_infos_and_bytes(archives: tuple[Archive, Archive]) -> None:
    base, tuned = archives
    pair = open_pair(base, tuned)
    assert [(t.name, t.dtype, t.layer, t.kind) for t in pair.tensors] == [
        ("model.layers.0.mlp.up_proj.weight", "float32", 0, "up_proj"),
        ("n", "uint8", None, "n"),
    ]
    assert update_sparsity(pair).sparsity == 0.75
    assert scan(pair, range(2), (PAPER,)).integers.tolist() == [[1, 0, 0, 0, 1]] * 2


def test_what_a_checkpoint_gets_for_its_bytes(archives: tuple[Archive, Archive]) -> None:
    base, _ = archives
    name = base.names()[0]
    assert base.read(name).tolist() == [[1, 2], [3, 4]]
    assert base.read(name, slice(1, 2)).tolist() == [[3, 4]]
    assert base.info(name).numel == 4
    assert len(base.fingerprint(name)) == 32
    assert base.fingerprint(name) == Archive(
        "x", {name: ((4,), "float32", floats(1, 2, 3, 4))}
    ).fingerprint(name)
    assert (base.extents(name, 0, 4), base.view(name)) == (None, None)
    assert repr(base) == "<Archive before: 2 tensors>"
    with pytest.raises(CheckpointError, match="before has no tensor m"):
        base.info("m")


def test_counters_say_what_their_columns_are() -> None:
    nan, inf = float("nan"), float("inf")
    base = floats(0.0, 1.0, 2.0, nan, inf, 3.0)
    tuned = floats(-0.0, 1.0, 2.5, nan, 1.0, inf)
    counters = Counters(1, [PAPER])
    sides = (np.frombuffer(side, np.uint8) for side in (base, tuned))
    choose_kernel(None)(*sides, "float32", np.array([0, 6]), counters)
    integers = counters.integers[0]
    assert integers[CHANGED] == 4
    assert integers[ZERO_FLIPS] == 1
    assert (integers[NONFINITE_BASE], integers[NONFINITE_TUNED]) == (2, 2)
    assert integers[FIRST_TOLERANCE] == 3
    sums = counters.sums[0]
    assert (sums[DELTA_SQUARES], sums[BASE_SQUARES], sums[TUNED_SQUARES]) == (0.25, 14.0, 8.25)
    assert counters.peaks[0] == 0.5


def test_counters_of_parts_are_added_row_by_row() -> None:
    total, part = Counters(3, [PAPER]), Counters(2, [PAPER])
    part.integers[:], part.sums[:], part.peaks[:] = 2, 0.5, [1.0, 4.0]
    for _ in range(2):
        total.add(np.array([2, 0]), part)
    total.add(np.array([0, 1]), part)
    assert total.integers[:, CHANGED].tolist() == [6, 2, 4]
    assert total.sums[:, 0].tolist() == [1.5, 0.5, 1.0]
    assert total.peaks.tolist() == [4.0, 4.0, 1.0]


def test_a_kernel_is_a_function_of_two_buffers(
    archives: tuple[Archive, Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, str, list[int]]] = []

    def kernel(
        base: np.ndarray, tuned: np.ndarray, dtype: str, bounds: np.ndarray, counters: Counters
    ) -> None:
        asked.append((base.size, tuned.size, dtype, bounds.tolist()))
        counters.integers += 1

    monkeypatch.setattr(gathering, "choose_kernel", lambda _: kernel)
    assert scan(open_pair(*archives), [0], (PAPER,)).integers.tolist() == [[1] * 5, [0] * 5]
    assert asked == [(16, 16, "float32", [0, 4])]


def test_an_engine_is_a_map_of_work_over_units(
    archives: tuple[Archive, Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()

    class OneByOne:
        def map(self, work: object, units: Sequence[ScanUnit]) -> Iterator[tuple[int, Counters]]:
            for position, unit in enumerate(units):
                with work.open() as compute:
                    seen["open"] += 1
                    yield position, compute(unit)

    monkeypatch.setattr(gathering, "ThreadEngine", OneByOne)
    assert scan(open_pair(*archives), range(2), ()).integers[:, 0].tolist() == [1, 1]
    assert seen == {"open": 2}


def test_work_is_a_function_for_each_worker() -> None:
    class Squares:
        @contextmanager
        def open(self) -> Iterator[Callable[[int], int]]:
            yield lambda number: number * number

    found = gathering.ThreadEngine(2).map(Squares(), [1, 2, 3])
    assert sorted(found) == [(0, 1), (1, 4), (2, 9)]


IN_ANOTHER_PROCESS = """
import pickle, sys
work, units = pickle.load(sys.stdin.buffer)
with work.open() as compute:
    found = [compute(unit) for unit in units]
pickle.dump([(c.integers, c.sums, c.peaks) for c in found], sys.stdout.buffer)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NumbaKernel, TorchKernel])
def test_work_on_files_can_be_done_in_another_process(tmp_path: Path, kernel: type) -> None:
    for seed, name in enumerate(("base.bin", "tuned.bin")):
        weights = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        torch.save({"a": weights, "b": weights.half()}, tmp_path / name)
    pair = open_pair(tmp_path / "base.bin", tmp_path / "tuned.bin")
    units = cut(pair, range(2))
    work = Compare(kernel(), (PAPER,), None, None)
    with work.open() as compute:
        here = [compute(unit) for unit in units]
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps((work, units)),
        capture_output=True,
        check=True,
    )
    there = pickle.loads(done.stdout)
    assert len(there) == len(here) == 2
    for counters, (integers, sums, peaks) in zip(here, there, strict=True):
        assert np.array_equal(counters.integers, integers)
        assert np.array_equal(counters.sums, sums)
        assert np.array_equal(counters.peaks, peaks)


def test_a_worker_without_the_checkpoint_says_so(archives: tuple[Archive, Archive]) -> None:
    (unit, *_) = cut(open_pair(*archives), [0])
    with (
        Compare(NumbaKernel(), (), None, None).open() as compute,
        pytest.raises(RuntimeError, match="a worker that has no checkpoint"),
    ):
        compute(unit)
