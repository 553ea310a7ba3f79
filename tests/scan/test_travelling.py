"""What may leave this machine: units that name files by absolute paths, and byte ranges."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, open_checkpoint, open_pair
from pytest_subnet.checkpoints.base import Extent, TensorInfo
from pytest_subnet.checkpoints.remote.urls import RemoteFile
from pytest_subnet.scan.travelling import FileRanges, device_there, paths_of, to_travel
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int16)}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints of `WEIGHTS` in the working directory."""
    for name in ("base", "tuned"):
        save_file({"a": WEIGHTS["a"] + (name == "tuned"), "b": WEIGHTS["b"]}, tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_units_mean_the_same_in_any_directory(saved: Path) -> None:
    pair = open_pair("base.safetensors", "tuned.safetensors")
    known = cut(pair, range(2))
    relative = [
        unit._replace(base=tuple(each._replace(path="base.safetensors") for each in unit.base))
        for unit in known
    ]
    there = [pickle.loads(pickle.dumps(to_travel(pair, unit))) for unit in relative]
    assert there == known
    both = {str(saved / "base.safetensors"), str(saved / "tuned.safetensors")}
    assert [paths_of(unit) for unit in there] == [both, both]


def test_ranges_are_the_checkpoint_wherever_it_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint("base.safetensors")
    ranges = FileRanges.of(checkpoint, ["a", "b"])
    monkeypatch.chdir("/")
    there = pickle.loads(pickle.dumps(ranges))
    assert there.label == checkpoint.label
    assert there.names() == ["a", "b"]
    assert there.identity() == ranges.identity()
    assert there.paths_of("a") == {str(saved / "base.safetensors")}
    for name, tensor in WEIGHTS.items():
        assert there.info(name) == checkpoint.info(name)
        assert torch.equal(there.read(name), tensor)
    assert torch.equal(there.read("a", slice(1, 2)), WEIGHTS["a"][1:])
    with pytest.raises(CheckpointError, match="has no tensor c"):
        there.info("c")


def test_ranges_run_across_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"..abc")
    (tmp_path / "two").write_bytes(b"defgh")
    extents = (Extent(str(tmp_path / "one"), 2, 3), Extent(str(tmp_path / "two"), 0, 5))
    ranges = FileRanges("x", {"n": TensorInfo("n", (8,), "uint8", 8)}, {"n": extents})
    for start in range(9):
        for end in range(start, 9):
            buffer = bytearray(end - start)
            ranges.read_into("n", start, memoryview(buffer))
            assert buffer == b"abcdefgh"[start:end]
    with pytest.raises(CheckpointError, match="has 8 bytes"):
        ranges.read_into("n", 5, memoryview(bytearray(4)))


def test_an_address_travels_as_it_was_opened() -> None:
    file = RemoteFile("https://host/w?token=s3cret", 8, 'etag "5f3c"')
    ranges = FileRanges("x", {"n": TensorInfo("n", (8,), "uint8", 8)}, {"n": (Extent(file, 0, 8),)})
    (there,) = pickle.loads(pickle.dumps(FileRanges.of(ranges, ["n"]))).extents("n", 0, 8)
    assert (there.path.address, there.path.version) == (file.address, file.version)
    assert "s3cret" not in repr(there)
    assert ranges.paths_of("n") == set()  # no node need have it


def test_what_is_in_no_file_does_not_travel() -> None:
    with pytest.raises(CheckpointError, match="a of dict of tensors is in no file"):
        FileRanges.of(open_checkpoint(dict(WEIGHTS)), ["a"])


@pytest.mark.parametrize(
    ("here", "there"), [(None, None), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:3", "cuda")]
)
def test_a_task_sees_the_gpu_it_was_given_as_the_first(here: str | None, there: str | None) -> None:
    assert device_there(here) == there
