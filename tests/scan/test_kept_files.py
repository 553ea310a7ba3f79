"""Files that are kept for later runs: believed only if whole, and never too many."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.scan.kept_files import KeptFiles

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = 16


@pytest.fixture
def files(tmp_path: Path) -> KeptFiles:
    """Room for four times 100 bytes and their digests."""
    return KeptFiles(tmp_path / "kept", 4 * (100 + DIGEST))


def age(path: Path, seconds: int) -> None:
    os.utime(path, (1e9 - seconds, 1e9 - seconds))


def test_what_was_stored_is_loaded_by_whoever_looks_there(files: KeptFiles, tmp_path: Path) -> None:
    assert files.load("a") is None
    files.store("a", b"old")
    files.store("a", b"new")
    assert KeptFiles(tmp_path / "kept", 1000).load("a") == b"new"
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["a"]


@pytest.mark.parametrize("at", [0, DIGEST - 1, DIGEST, -1])
def test_one_wrong_byte_is_noticed(at: int, files: KeptFiles, tmp_path: Path) -> None:
    files.store("a", b"0.125")
    data = bytearray((tmp_path / "kept" / "a").read_bytes())
    data[at] ^= 1
    (tmp_path / "kept" / "a").write_bytes(data)
    assert files.load("a") is None


def test_a_file_under_another_name_is_not_believed(files: KeptFiles, tmp_path: Path) -> None:
    files.store("a", b"0.125")
    (tmp_path / "kept" / "a").rename(tmp_path / "kept" / "b")
    assert files.load("b") is None


def test_what_was_used_longest_ago_goes_first(files: KeptFiles, tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        files.store(name, bytes(100))
        age(tmp_path / "kept" / name, 10 - number)
    assert files.load("a") == bytes(100)  # and is the latest now
    files.store("e", bytes(100))
    assert [files.load(name) is not None for name in "abcde"] == [True, False, True, True, True]


def test_what_is_larger_than_all_is_not_kept(files: KeptFiles, tmp_path: Path) -> None:
    files.store("a", bytes(100))
    files.store("b", bytes(4 * (100 + DIGEST) + 1))
    assert (files.load("a"), files.load("b")) == (bytes(100), None)


def test_where_nothing_can_be_written_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("in the way")
    files = KeptFiles(tmp_path / "kept", 1000)
    files.store("a", b"0.125")
    assert files.load("a") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(files: KeptFiles, tmp_path: Path) -> None:
    files.store("b", b"0.125")
    os.mkfifo(tmp_path / "kept" / "a")
    assert files.load("a") is None
