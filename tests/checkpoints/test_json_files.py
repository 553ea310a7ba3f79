"""JSON beside the weights: an index means one thing, a config is taken as it is."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from pytest_subnet import CheckpointError
from pytest_subnet.checkpoints.json_files import read_json

if TYPE_CHECKING:
    from pathlib import Path


def message(path: Path, *, unique: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_json(path, unique=unique)
    return str(caught.value)


def test_reads_what_json_reads(tmp_path: Path) -> None:
    value = {"a": [1, -2, 1.5, None, True], "b": {"é": "\x00"}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value), "utf-8")
    assert read_json(path) == read_json(path, unique=True) == value


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b'{"a":' * 100_000, "maximum recursion depth exceeded"),
        (b'{"a":' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("unique", [False, True])
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes, why: str, unique: bool) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    text = message(path, unique=unique)
    assert text.startswith(f"{path} is not JSON ({why}")
    assert text.endswith("); save it again")


@pytest.mark.parametrize("raw", ["[]", "null", '"text"', "3"])
def test_what_is_no_object_is_refused(tmp_path: Path, raw: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(raw)
    assert message(path) == f"{path} holds no JSON object; save it again"


def test_name_that_occurs_twice_is_refused_where_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"weight_map": {"a": 1, "b": 2, "a": 3}}')
    assert read_json(path) == {"weight_map": {"a": 3, "b": 2}}
    assert message(path, unique=True) == (
        f"{path} lists a twice; which one counts cannot be known, save it again"
    )


def test_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert message(tmp_path / "config.json") == (
        f"{tmp_path / 'config.json'} is a directory, not a file; put the file there"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_pipe_in_its_place_is_refused_before_it_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert message(tmp_path / "config.json") == (
        f"{tmp_path / 'config.json'} is a pipe or a device, not a file; put the file there"
    )
