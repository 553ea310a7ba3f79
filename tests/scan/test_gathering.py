"""What was counted is kept: nothing is read twice, by whomever and for whatever tolerance."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, ModelPair, open_pair, progress
from pytest_subnet.checkpoints import open_checkpoint
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance, comparing, gathering
from pytest_subnet.scan.gathering import declare, gather, ledger
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDE, NARROW = Tolerance(atol=1.0), Tolerance(rtol=1e-9)
NAMES = ["a.weight", "b.weight", "c.weight", "d.weight"]


class Counting(TensorsCheckpoint):
    """Weights in memory that count how often each is read, and can hold a reader up."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors, label="counting")
        self.reads: Counter[str] = Counter()
        self.hold = lambda: None

    def view(self, name: str) -> None:
        self.hold()
        self.reads[name] += 1
        return super().view(name)


def weights(fill: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), fill + i) for i, name in enumerate(NAMES)}


@pytest.fixture
def pair() -> ModelPair:
    return open_pair(Counting(weights(1.0)), Counting(weights(1.5)))


def reads(pair: ModelPair) -> dict[str, int]:
    assert pair.base.reads == pair.tuned.reads
    return dict(pair.base.reads)


def test_what_was_counted_is_not_read_again(pair: ModelPair) -> None:
    for _ in range(2):
        for tolerance in DEFAULT_TOLERANCES:
            assert gather(pair, range(4), tolerance).updated(tolerance).tolist() == [6] * 4
    assert reads(pair) == dict.fromkeys(NAMES, 1)


def test_only_the_tensors_asked_for_are_read(pair: ModelPair) -> None:
    known = gather(pair, [1, 2], SAME_BITS)
    assert known.scanned.tolist() == [1, 2]
    assert known.integers[:, 0].tolist() == [0, 6, 6, 0]
    gather(pair, [3, 1], SAME_BITS)
    assert reads(pair) == {NAMES[1]: 1, NAMES[2]: 1, NAMES[3]: 1}
    assert known.scanned.tolist() == [1, 2, 3]


def test_a_tensor_asked_for_twice_counts_once(pair: ModelPair) -> None:
    assert gather(pair, [2, 2, 2], SAME_BITS).integers[:, 0].tolist() == [0, 0, 6, 0]
    assert reads(pair) == {NAMES[2]: 1}


def test_declared_tolerances_are_counted_in_the_first_reading(pair: ModelPair) -> None:
    declare(pair, [WIDE, SAME_BITS])
    declare(pair, [NARROW, WIDE])
    assert ledger(pair).declared == (*DEFAULT_TOLERANCES, WIDE, NARROW)
    for tolerance, updated in ((NARROW, 6), (WIDE, 0), (SAME_BITS, 6), (PAPER, 6)):
        assert gather(pair, range(4), tolerance).updated(tolerance).tolist() == [updated] * 4
    assert reads(pair) == dict.fromkeys(NAMES, 1)


def test_a_new_tolerance_reads_again_only_what_it_lacks(pair: ModelPair) -> None:
    gather(pair, [0, 1], WIDE)
    assert reads(pair) == {NAMES[0]: 1, NAMES[1]: 1}
    gather(pair, range(4), SAME_BITS)
    assert reads(pair) == dict.fromkeys(NAMES, 1)
    assert gather(pair, [1, 2], WIDE).updated(WIDE).tolist() == [0, 0, 0, -1]
    assert reads(pair) == dict.fromkeys(NAMES, 1) | {NAMES[2]: 2}
    assert gather(pair, range(4), SAME_BITS).integers[:, 0].tolist() == [6] * 4


def test_sums_and_peaks_are_kept_for_each_tensor(pair: ModelPair) -> None:
    known = gather(pair, range(4), SAME_BITS)
    values = np.arange(4) + 1.0
    expected = 6 * np.stack([np.full(4, 0.25), values**2, (values + 0.5) ** 2], axis=1)
    np.testing.assert_allclose(known.sums, expected)
    assert known.peaks.tolist() == [0.5] * 4


def test_two_threads_that_ask_at_once_read_once(pair: ModelPair) -> None:
    first_reads, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        first_reads.set()
        assert go_on.wait(60)

    pair.base.hold = hold
    found: list[list[int]] = []

    def ask() -> None:
        found.append(gather(pair, range(4), SAME_BITS).integers[:, 0].tolist())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert first_reads.wait(60)
    for thread in threads[1:]:
        thread.start()
    assert found == []
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [[6] * 4] * 3
    assert reads(pair) == dict.fromkeys(NAMES, 1)


def test_each_pair_has_a_ledger_of_its_own(pair: ModelPair) -> None:
    other = open_pair(weights(0.0), weights(0.0))
    assert ledger(pair) is ledger(pair)
    assert gather(pair, [0], SAME_BITS) is not gather(other, [0], SAME_BITS)
    assert ledger(other).integers[0, 0] == 0


def test_a_place_that_is_taken_is_said(pair: ModelPair) -> None:
    pair.memory["scan"] = "something else"
    with pytest.raises(TypeError, match="is taken by str"):
        ledger(pair)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for fill, path in enumerate(found):
        save_file(weights(float(fill)), path)
    return found


def rewrite(path: Path, fill: float) -> None:
    """Save other values, of the same size, into the file; the clock of its stamp must tick."""
    other = path.with_name(f"{path.name}.new")
    save_file(weights(fill), other)
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.write_bytes(other.read_bytes())


def test_a_file_that_changed_since_it_was_opened_is_an_error(paths: list[Path]) -> None:
    pair = open_pair(*paths)
    rewrite(paths[1], 5.0)
    with pytest.raises(
        CheckpointError, match=r"tuned\.safetensors changed after the pair was opened"
    ):
        gather(pair, range(4), SAME_BITS)
    assert ledger(pair).scanned.size == 0


def test_a_file_that_changed_since_it_was_counted_is_an_error(paths: list[Path]) -> None:
    pair = open_pair(*paths)
    gather(pair, range(4), SAME_BITS)
    rewrite(paths[0], 5.0)
    with pytest.raises(CheckpointError, match=r"base\.safetensors changed"):
        gather(pair, range(4), SAME_BITS)


def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_is_kept(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(*paths)
    scan = gathering.scan

    def change_after(*arguments: object) -> object:
        counted = scan(*arguments)
        rewrite(paths[1], 5.0)
        return counted

    monkeypatch.setattr(gathering, "scan", change_after)
    with pytest.raises(CheckpointError, match=r"tuned\.safetensors changed"):
        gather(pair, range(4), SAME_BITS)
    assert ledger(pair).scanned.size == 0


def test_a_file_that_shrinks_while_it_is_read_names_the_file(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(*paths)
    original = comparing.Compare.open

    def shrink(self: comparing.Compare) -> object:
        with open(paths[1], "r+b") as file:
            file.truncate(paths[1].stat().st_size - 4)
        return original(self)

    monkeypatch.setattr(comparing.Compare, "open", shrink)
    with pytest.raises(CheckpointError, match=r"tuned\.safetensors ends at byte .* cut short"):
        gather(pair, range(4), SAME_BITS)


def test_a_disk_error_names_the_file(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pytest_subnet.checkpoints.files.read_some", broken)
    monkeypatch.setattr(comparing, "_HAS_PREAD", False)
    with pytest.raises(
        CheckpointError, match=r"cannot read .*base\.safetensors: Input/output error"
    ):
        gather(open_pair(*paths), range(4), SAME_BITS)


def test_an_error_in_one_scan_leaves_the_next_its_chance(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise CheckpointError("gone")

    pair.base.hold = fail
    with pytest.raises(CheckpointError, match="gone"):
        gather(pair, range(4), SAME_BITS)
    pair.base.hold = lambda: None
    assert gather(pair, range(4), SAME_BITS).integers[:, 0].tolist() == [6] * 4


def test_every_byte_of_the_files_is_read_once(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[str, int]] = Counter()
    original = FileReader.read_into

    def note(self: FileReader, path: str, offset: int, buffer: memoryview) -> None:
        read.update((path, offset + byte) for byte in range(len(buffer)))
        original(self, path, offset, buffer)

    monkeypatch.setattr(comparing, "_HAS_PREAD", False)
    pair = open_pair(*paths)
    monkeypatch.setattr(FileReader, "read_into", note)
    for tolerance in DEFAULT_TOLERANCES:
        for row in (2, 0, 1, 3):
            gather(pair, [row], tolerance)
    assert set(read.values()) == {1}
    assert len(read) == 2 * 4 * 24


def test_progress_is_made_by_the_bytes_of_both_sides(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Bar:
        def __init__(self, nbytes: int, what: str) -> None:
            assert (nbytes, what) == (192, "comparing")

        def __enter__(self) -> Callable[[int], None]:
            return seen.append

        def __exit__(self, *_: object) -> None:
            seen.append(0)

    monkeypatch.setattr(progress, "bar", Bar)
    gather(pair, range(4), SAME_BITS)
    assert seen == [192, 0]


def test_a_pair_without_tensors_has_nothing_to_count() -> None:
    pair = open_pair({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    assert gather(pair, [], SAME_BITS).integers.shape == (0, 4)


def test_opening_reads_no_data(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(FileReader, "read_into", never)
    assert len(open_pair(open_checkpoint(paths[0]), paths[1]).tensors) == 4


WRITES = {
    "data": lambda tensor: tensor.data.add_(1),
    "numpy": lambda tensor: tensor.detach().numpy().__iadd__(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_that_torch_does_not_tell_of_is_seen(
    write: Callable[[torch.Tensor], object],
) -> None:
    base, tuned = torch.zeros(4), torch.zeros(4)
    pair = open_pair({"w": base}, {"w": tuned})
    assert gather(pair, [0], SAME_BITS).integers[0, 0] == 0
    write(tuned)
    assert gather(pair, [0], SAME_BITS).integers[0, 0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_subnormals_count_where_they_are_flushed_to_zero(dtype: torch.dtype) -> None:
    base, tuned = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    tuned.view(torch.uint8)[0] = 1
    pair = open_pair({"w": base}, {"w": tuned})
    nothing = Tolerance(atol=0.0)
    assert torch.set_flush_denormal(True)
    try:
        counted = gather(pair, [0], nothing)
    finally:
        torch.set_flush_denormal(False)
    assert counted.updated(nothing)[0] == 1
    assert counted.peaks[0] == tuned[0].double().item() > 0
