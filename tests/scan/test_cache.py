"""Counts of pairs of files are kept for other processes, and believed only where they must hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.numpy import save_file

from pytest_subnet import CheckpointError, open_pair, update_mask
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance, cache, cache_file, gathering
from pytest_subnet.scan.cache_file import packed, packed_size, unpacked
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.gathering import declare, gather, ledger, remember_in
from pytest_subnet.scan.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from pytest_subnet import ModelPair

WIDE = Tolerance(atol=1.0)
ALL = range(4)
CHANGED = [0, 5, 6, 6]


def wait_for_a_tick() -> None:
    time.sleep(cache._TICK_NS / 1e9 + 0.02)


def write_pair(root: Path) -> Path:
    """An integer tensor and three float ones, of which all entries moved; dated long enough ago."""
    for side, fill in (("base", 1.0), ("tuned", 1.5)):
        tensors = {name: np.full((2, 3), fill + i, np.float32) for i, name in enumerate("abc")}
        tensors["a"][0, 0] = np.nan
        (root / side).mkdir()
        save_file({**tensors, "steps": np.full(5, 7)}, root / side / "model.safetensors")
    wait_for_a_tick()
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that no test writes to."""
    return write_pair(tmp_path_factory.mktemp("files"))


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    """A pair to write to."""
    return write_pair(tmp_path)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The directory of the cache."""
    return tmp_path / "kept"


def opened(files: Path, kept: Path, **keywords: object) -> ModelPair:
    """The pair as another process would open it."""
    pair = open_pair(files / "base", files / "tuned", **keywords)
    remember_in(pair, kept)
    return pair


def how(pair: ModelPair) -> tuple[int, int]:
    """How many tensors were read, and how many were taken from the cache."""
    known = ledger(pair)
    return known.read, known.taken


def entry(kept: Path) -> Path:
    (path,) = kept.glob("*.counts")
    return path


def assert_same_counts(one: ModelPair, other: ModelPair) -> None:
    ours, theirs = ledger(one), ledger(other)
    for name in ("scanned", "integers", "sums", "peaks"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.tolerances == theirs.tolerances
    for tolerance in ours.tolerances:
        np.testing.assert_array_equal(ours.updated(tolerance), theirs.updated(tolerance))


def test_what_one_process_counted_another_does_not_read(files: Path, kept: Path) -> None:
    plain = open_pair(files / "base", files / "tuned")
    first, second = opened(files, kept), opened(files, kept)
    for pair in (plain, first, second):
        for tolerance in (SAME_BITS, PAPER):
            gather(pair, ALL, tolerance)

    assert (how(plain), how(first), how(second)) == ((4, 0), (4, 0), (0, 4))
    assert_same_counts(plain, first)
    assert_same_counts(plain, second)
    assert ledger(second).integers[:, 0].tolist() == CHANGED


def test_only_what_is_asked_for_is_taken(files: Path, kept: Path) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    pair = opened(files, kept)

    gather(pair, [1, 2], SAME_BITS)
    assert ledger(pair).scanned.tolist() == [1, 2]
    assert how(pair) == (0, 2)
    gather(pair, [2, 3], SAME_BITS)
    assert how(pair) == (0, 3)


def test_what_two_processes_counted_is_put_together(files: Path, kept: Path) -> None:
    one, other = opened(files, kept), opened(files, kept)
    gather(one, [0, 1], SAME_BITS)
    gather(other, [1, 2], WIDE)
    assert how(other) == (2, 0)  # row 1 had not been counted beyond 1.0
    gather(one, [3], SAME_BITS)

    third = opened(files, kept)
    gather(third, ALL, SAME_BITS)
    assert how(third) == (0, 4)
    gather(third, [1, 2], WIDE)
    assert how(third) == (0, 6)
    gather(third, [0], WIDE)
    assert how(third) == (1, 6)


def test_a_tolerance_that_is_declared_now_and_was_not_then_is_counted(
    files: Path, kept: Path
) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    pair = opened(files, kept)
    declare(pair, [WIDE])

    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)
    assert ledger(pair).updated(WIDE).tolist() == [0, 0, 0, 0]


def test_what_a_mask_read_need_not_be_counted(files: Path, kept: Path) -> None:
    pair = opened(files, kept)
    update_mask(pair)
    assert how(pair) == (3, 0)

    other = opened(files, kept)
    gather(other, ALL, SAME_BITS)
    assert how(other) == (1, 3)
    assert_same_counts(other, gathered(open_pair(files / "base", files / "tuned")))


def gathered(pair: ModelPair) -> ModelPair:
    gather(pair, ALL, SAME_BITS)
    return pair


def touch(path: Path) -> None:
    path.touch()


def touch_and_set_back(path: Path) -> None:
    status = path.stat()
    path.touch()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_over(path: Path) -> None:
    copied = path.with_name("copy")
    shutil.copy2(path, copied)
    copied.replace(path)


def copy_into(path: Path) -> None:
    copied = path.with_name("copy")
    subprocess.run(["cp", "-p", path, copied], check=True)
    subprocess.run(["cp", "-p", copied, path], check=True)
    copied.unlink()


def write_one_byte(path: Path) -> None:
    """The same size, header and date of the last write."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(
    "change", [touch, touch_and_set_back, copy_over, copy_into, write_one_byte]
)
def test_files_that_were_written_to_are_read(
    own_files: Path, kept: Path, side: str, change: Callable[[Path], None]
) -> None:
    gather(opened(own_files, kept), ALL, SAME_BITS)

    change(own_files / side / "model.safetensors")
    wait_for_a_tick()
    pair = opened(own_files, kept)
    gather(pair, ALL, SAME_BITS)

    assert how(pair) == (4, 0)
    assert_same_counts(pair, gathered(open_pair(own_files / "base", own_files / "tuned")))
    assert len(list(kept.glob("*.counts"))) == 2


def test_a_file_that_changes_after_it_was_opened_is_an_error_though_its_counts_are_kept(
    own_files: Path, kept: Path
) -> None:
    gather(opened(own_files, kept), ALL, SAME_BITS)
    pair = opened(own_files, kept)
    touch(own_files / "tuned" / "model.safetensors")

    with pytest.raises(CheckpointError, match="changed after the pair was opened"):
        gather(pair, ALL, SAME_BITS)


def test_a_file_that_changes_while_another_process_is_waited_for_is_an_error(
    own_files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, other = opened(own_files, kept), opened(own_files, kept)

    @contextmanager
    def wait(_: object) -> Iterator[None]:
        monkeypatch.undo()
        gather(other, ALL, SAME_BITS)
        touch(own_files / "tuned" / "model.safetensors")
        yield

    monkeypatch.setattr(cache.ScanCache, "turn", wait)
    with pytest.raises(CheckpointError, match="changed after the pair was opened"):
        gather(pair, ALL, SAME_BITS)
    assert how(pair) == (0, 4)


def test_what_is_known_is_had_without_waiting(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    pair = opened(files, kept)
    monkeypatch.setattr(cache, "_PATIENCE", 3600.0)
    with FileLock(kept / f"{ledger(pair).cache._key}.lock"):
        gather(pair, ALL, SAME_BITS)

    assert how(pair) == (0, 4)


def test_nothing_is_kept_of_a_file_whose_next_write_might_have_the_same_date(
    own_files: Path, kept: Path
) -> None:
    touch(own_files / "tuned" / "model.safetensors")
    pair = opened(own_files, kept)
    gather(pair, ALL, SAME_BITS)

    assert how(pair) == (4, 0)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("ctime_ns", "now_ns", "settled"),
    [
        (1_000_000_001, 1_100_000_000, False),
        (1_000_000_001, 1_100_000_001, True),
        (1_000_000_000, 2_900_000_000, False),  # dates in whole seconds
        (1_000_000_000, 3_000_000_000, True),
        (5_000_000_001, 1_000_000_000, False),  # a server's clock that is ahead
    ],
)
def test_how_long_ago_the_last_write_must_be(
    monkeypatch: pytest.MonkeyPatch, ctime_ns: int, now_ns: int, settled: bool
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    stamp = cache.FileStamp("file", 1, 2, 3, ctime_ns)

    assert cache._settled(((stamp,), ("digest",))) is settled


@pytest.mark.parametrize(
    "keywords",
    [
        {"as_dtype": "bfloat16"},
        {"rename": {"b": "c", "c": "b"}},
        {"device": "cuda"},
    ],
)
def test_the_same_files_compared_otherwise_are_another_pair(
    files: Path, kept: Path, keywords: dict[str, object]
) -> None:
    keys = {opened(files, kept, **each).memory["scan"].cache._key for each in ({}, keywords)}

    assert len(keys) == 2


def test_each_gpu_counts_for_the_others(files: Path, kept: Path) -> None:
    devices = ("cuda", "cuda:0", "cuda:1")
    keys = {opened(files, kept, device=each).memory["scan"].cache._key for each in devices}

    assert len(keys) == 1


@pytest.mark.parametrize("what", ["kernel", "package"])
def test_another_kernel_or_another_release_counts_anew(
    files: Path, kept: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    if what == "kernel":
        monkeypatch.setattr(cache, "KERNEL_VERSION", cache.KERNEL_VERSION + 1)
    else:
        monkeypatch.setattr(cache, "version", lambda package: "99.0")

    pair = opened(files, kept)
    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(3) for name in "abc"}


@pytest.mark.parametrize("source", ["mapping", "module", "tensors"])
def test_what_is_in_memory_is_not_kept(files: Path, kept: Path, source: str) -> None:
    module = torch.nn.Linear(3, 3)
    base, tuned = {
        "mapping": (weights(), weights()),
        "module": (module, torch.nn.Linear(3, 3)),
        "tensors": (
            TensorsCheckpoint(weights(), label="one"),  # which says that nobody else holds them
            TensorsCheckpoint(weights(), label="other"),
        ),
    }[source]
    pair = open_pair(base, tuned)
    remember_in(pair, kept)
    gather(pair, range(len(pair.tensors)), SAME_BITS)

    assert not kept.exists()


STAMP = cache.FileStamp("file", 1, 2, 3, 4)


class Remote(NamedTuple):
    """What stands for a remote file in an identity."""

    address: str
    size: int | None
    version: str | None
    secret: str


REMOTE = Remote("https://host/file", 5_000_000_000, 'etag "abc"', "")


@pytest.mark.parametrize(
    ("identity", "lasts"),
    [
        ((STAMP,), True),
        (((STAMP, STAMP), ("digest",)), True),
        (((128, 128), ("View", (STAMP,))), True),
        (((REMOTE,), ("digest",), ""), True),
        (((STAMP, REMOTE), ("digest",)), True),
        (((REMOTE._replace(version='etag W/"abc"'),), ("digest",)), False),
        (((REMOTE._replace(version="modified yesterday"),), ("digest",)), False),
        (((REMOTE._replace(version='etag "674f2a10-12a05f200"'),), ("digest",)), False),  # nginx
        (((REMOTE._replace(version='etag "12a05f200-5a1b2c3d4e5f6"'),), ("digest",)), False),
        (((REMOTE._replace(version='etag "d41d8cd98f00b204-596"'),), ("digest",)), True),  # s3
        (((REMOTE._replace(size=None),), ("digest",)), False),
        (((REMOTE._replace(version=None), REMOTE), ("digest",)), False),
        ((), False),
        (("digest",), False),
        ((STAMP, ("weight", 140_000_000_000_000, 0)), False),
        ((STAMP, None), False),
        ((STAMP, object()), False),
        (140_000_000_000_000, False),
    ],
)
def test_which_identities_mean_the_same_elsewhere(identity: Hashable, lasts: bool) -> None:
    assert cache._lasts(identity) is lasts


def damaged(data: bytes) -> list[bytes]:
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return [b"", data[:-1], data + b"\0", bytes(flipped), b"\x80\x04N." * 100, data[16:]]


@pytest.mark.parametrize("number", range(6))
def test_a_damaged_file_is_replaced(files: Path, kept: Path, number: int) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    good = entry(kept).read_bytes()
    entry(kept).write_bytes(damaged(good)[number])

    pair = opened(files, kept)
    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)
    assert entry(kept).read_bytes() == good


def test_a_file_of_another_pair_is_not_believed(files: Path, kept: Path) -> None:
    gather(opened(files, kept), ALL, SAME_BITS)
    cast = opened(files, kept, as_dtype="bfloat16")
    entry(kept).rename(kept / f"{ledger(cast).cache._key}.counts")

    gather(cast, ALL, SAME_BITS)
    assert how(cast) == (4, 0)


ENTRIES = np.array([6, 6, 6, 5])


def tally(**changes: object) -> Tally:
    known = Tally(4)
    counted = Counters(4, [PAPER, WIDE])
    counted.integers[:] = [3, 1, 0, 2, 2, -1]
    counted.sums[:], counted.peaks[:] = [0.5, 1.0, np.inf], 0.25
    for name, value in changes.items():
        getattr(counted, name)[2] = value
    known.keep(np.array([0, 2, 3]), counted)
    return known


def test_a_file_holds_all_that_is_known() -> None:
    known = tally()
    data = packed(known, "key")
    again = unpacked(data, "key", ENTRIES)

    assert again is not None
    assert packed(again, "key") == data
    assert again.scanned.tolist() == [0, 2, 3]
    assert again.tolerances == (PAPER, WIDE)
    assert again.missing(np.arange(4), PAPER).tolist() == [1]
    assert again.missing(np.arange(4), WIDE).tolist() == [0, 1, 2, 3]
    assert again.sums[2].tolist() == [0.5, 1.0, np.inf]
    assert abs(len(data) - packed_size(known)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"integers": [7, 0, 0, 0, 0, 0]},  # more than there are entries
        {"integers": [-1, 0, 0, 0, 0, 0]},
        {"integers": [1, 2, 0, 0, 0, 0]},  # more flips than changes
        {"integers": [1, 0, 0, 7, 0, 0]},
        {"integers": [1, 0, 0, 0, 2, 0]},  # further beyond than changed
        {"integers": [1, 0, 0, 0, 0, -2]},
        {"sums": [np.nan, 0, 0]},
        {"sums": [0, -1.0, 0]},
        {"peaks": np.nan},
        {"peaks": -1.0},
    ],
)
def test_counts_that_cannot_be_are_not_believed(changes: dict[str, object]) -> None:
    assert unpacked(packed(tally(**changes), "key"), "key", ENTRIES) is None


def made_up(table: np.ndarray) -> bytes:
    """A file whose digest is right."""
    import io

    written = io.BytesIO()
    np.save(written, table, allow_pickle=True)
    return cache_file._digest("key", written.getvalue()) + written.getvalue()


def header_of(shape: str) -> bytes:
    """A table that says it is of this shape, and holds nothing."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    return cache_file._digest("key", content) + content


FIELDS = cache_file._dtype(["atol=1.0"])


@pytest.mark.parametrize(
    "data",
    [
        made_up(np.zeros(3)),
        made_up(np.array([{"a": 1}], object)),
        made_up(np.zeros((1, 1), FIELDS)),
        made_up(np.zeros(2, FIELDS)),  # row 0 twice
        made_up(np.full(1, 4, FIELDS)),  # a row that the pair does not have
        made_up(np.full(1, -1, FIELDS)),
        made_up(np.zeros(1, cache_file._dtype(["ctol=1.0"]))),
        made_up(np.zeros(1, cache_file._dtype(["atol=nan"]))),
        made_up(np.zeros(1, cache_file._dtype(["atol="]))),
        made_up(np.zeros(1, FIELDS.descr[1:])),
        made_up(np.zeros(1, [*FIELDS.descr[:-1], ("atol=1.0", "<f8")])),
        header_of("(1000000000000000,)"),
        header_of("(10000000000000000000000000,)"),
        header_of("(-1,)"),
        header_of("__import__('os')"),
    ],
)
def test_a_file_that_somebody_made_up_is_not_believed(data: bytes) -> None:
    assert unpacked(data, "key", ENTRIES) is None


@pytest.mark.parametrize("obstacle", ["file", "no permission", "entry is a directory"])
def test_a_directory_that_cannot_be_written_to_is_no_cache(
    files: Path, kept: Path, obstacle: str
) -> None:
    pair = opened(files, kept)
    if obstacle == "file":
        kept.write_text("in the way")
    else:
        kept.mkdir()
        if obstacle == "no permission":
            kept.chmod(0o500)
        else:
            (kept / f"{ledger(pair).cache._key}.counts").mkdir()

    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)
    if obstacle == "entry is a directory":
        assert not list(kept.glob("*.draft"))


def test_a_pipe_in_place_of_the_file_is_not_waited_for(files: Path, kept: Path) -> None:
    pair = opened(files, kept)
    kept.mkdir()
    os.mkfifo(kept / f"{ledger(pair).cache._key}.counts")

    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)
    assert entry(kept).is_file()


def dated(path: Path, content: bytes, age: float) -> Path:
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_oldest_pairs_make_room(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.mkdir()
    monkeypatch.setattr(cache, "MAX_PAIRS", 3)
    old = [dated(kept / f"{age}.counts", b"", age) for age in (10, 30, 20)]
    locks = [dated(kept / f"{age}.lock", b"", age) for age in (10, 30, 20)]
    left = dated(kept / "30.xyz.draft", b"", 40)  # by a process that was killed

    gather(opened(files, kept), ALL, SAME_BITS)
    assert [path.exists() for path in old] == [True, False, True]
    assert [path.exists() for path in locks] == [True, False, True]
    assert not left.exists()


def test_the_largest_size_is_kept_to(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.mkdir()
    monkeypatch.setattr(cache, "MAX_BYTES", 10_000)
    old = [dated(kept / f"{age}.counts", bytes(4_000), age) for age in (10, 30, 20)]

    gather(opened(files, kept), ALL, SAME_BITS)
    assert [path.exists() for path in old] == [True, False, True]

    monkeypatch.setattr(cache, "MAX_BYTES", 10)
    pair = opened(files, kept, as_dtype="bfloat16")
    gather(pair, ALL, SAME_BITS)  # more than all there is room for
    assert not (kept / f"{ledger(pair).cache._key}.counts").exists()


def test_a_large_table_is_not_written_for_each_small_tensor(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_ALWAYS_WRITTEN", 0)
    monkeypatch.setattr(cache, "_WORTH_WRITING", 1)
    pair = opened(files, kept)
    for row in (1, 2, 3):  # 48 bytes are read for 80 to write
        gather(pair, [row], SAME_BITS)
        assert not list(kept.glob("*.counts"))
    monkeypatch.setattr(cache, "_WORTH_WRITING", 0.7)  # with 80 bytes more, 224 for 320
    gather(pair, [0], SAME_BITS)

    other = opened(files, kept)
    gather(other, ALL, SAME_BITS)
    assert how(other) == (0, 4)


def test_nobody_reads_what_is_being_read(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [opened(files, kept) for _ in range(3)]
    started, go_on = threading.Event(), threading.Event()
    scan = gathering.scan

    def slowly(pair: ModelPair, rows: Sequence[int], tolerances: Sequence[Tolerance]) -> Counters:
        started.set()
        assert go_on.wait(60)
        return scan(pair, rows, tolerances)

    monkeypatch.setattr(gathering, "scan", slowly)
    threads = [threading.Thread(target=gather, args=(each, ALL, SAME_BITS)) for each in pairs]
    threads[0].start()
    assert started.wait(60)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(60)

    assert [how(each) for each in pairs] == [(4, 0), (0, 4), (0, 4)]


def test_the_wait_for_another_process_has_an_end(
    files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    pair = opened(files, kept)
    kept.mkdir()
    with FileLock(kept / f"{ledger(pair).cache._key}.lock"):
        gather(pair, ALL, SAME_BITS)

    assert how(pair) == (4, 0)
    assert entry(kept).is_file()


RACE = """
import sys, time
from pathlib import Path
from pytest_subnet import open_pair
from pytest_subnet.scan import SAME_BITS
from pytest_subnet.scan.gathering import gather, ledger, remember_in

root, kept, ready = map(Path, sys.argv[1:])
pair = open_pair(root / "base", root / "tuned")
remember_in(pair, kept)
ready.touch()
while not (ready.parent / "go").exists():
    time.sleep(0.001)
known = gather(pair, range(4), SAME_BITS)
print(known.read, known.taken, known.integers[:, 0].tolist())
"""


@pytest.mark.slow
def test_of_two_processes_that_race_one_reads(files: Path, kept: Path, tmp_path: Path) -> None:
    ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, files, kept, each], stdout=subprocess.PIPE, text=True
        )
        for each in ready
    ]
    deadline = time.monotonic() + 60
    while not all(each.exists() for each in ready):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "go").touch()

    said = sorted(process.communicate(timeout=60)[0].strip() for process in racing)
    assert said == [f"0 4 {CHANGED}", f"4 0 {CHANGED}"]


KILLED = """
import os, sys
from pathlib import Path
from pytest_subnet import open_pair
from pytest_subnet.scan import SAME_BITS, gathering

root, kept = map(Path, sys.argv[1:])
pair = open_pair(root / "base", root / "tuned")
gathering.remember_in(pair, kept)
gathering.scan = lambda *_: os._exit(9)
gathering.gather(pair, range(4), SAME_BITS)
"""


def test_a_process_that_dies_in_its_scan_holds_nobody_up(files: Path, kept: Path) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED, files, kept], check=False)
    assert died.returncode == 9
    assert list(kept.glob("*.lock"))

    pair = opened(files, kept)
    gather(pair, ALL, SAME_BITS)
    assert how(pair) == (4, 0)


class Server(BaseHTTPRequestHandler):
    """Serves ranges of one pair, with a version of the tests' choosing."""

    version: str
    root: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.root / self.path[1:]
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if asked := self.headers["range"]:
            first, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("etag", self.version)
        self.send_header("content-length", str(last + 1 - first))
        if asked:
            self.send_header("content-range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(files: Path) -> Iterator[ThreadingHTTPServer]:
    Server.version, Server.root = '"one"', files
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def remote(server: ThreadingHTTPServer, files: Path, kept: Path) -> tuple[int, int]:
    """How a pair of which one side is remote comes by its counts."""
    url = f"http://127.0.0.1:{server.server_port}/tuned/model.safetensors"
    pair = open_pair(files / "base", url)
    remember_in(pair, kept)
    assert gather(pair, ALL, SAME_BITS).integers[:, 0].tolist() == CHANGED
    return how(pair)


def test_a_remote_file_is_known_by_its_etag(
    server: ThreadingHTTPServer, files: Path, kept: Path
) -> None:
    assert [remote(server, files, kept) for _ in range(2)] == [(4, 0), (0, 4)]
    Server.version = '"two"'
    assert [remote(server, files, kept) for _ in range(2)] == [(4, 0), (0, 4)]
    Server.version = 'W/"three"'  # need not change with every byte
    assert [remote(server, files, kept) for _ in range(2)] == [(4, 0), (4, 0)]
    size = (files / "tuned/model.safetensors").stat().st_size
    Server.version = f'"674f2a10-{size:x}"'  # a date and the size: a copy may have the same
    assert [remote(server, files, kept) for _ in range(2)] == [(4, 0), (4, 0)]
