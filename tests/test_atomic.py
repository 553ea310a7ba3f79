"""A file is there whole, or as it was before."""

import signal
import subprocess
import sys
import time

import pytest

from pytest_subnet.atomic import write_text

WRITES_FOR_EVER = """
import sys
from pathlib import Path
from pytest_subnet.atomic import write_text

path = Path(sys.argv[1])
for number in range(1_000_000):
    write_text(path, f"{number % 10}" * 100_000 + "\\n")
    if number == 0:
        print("ready", flush=True)
"""


def names_in(directory):
    return [path.name for path in directory.iterdir()]


def test_a_file_is_made_as_an_editor_makes_it(tmp_path):
    path = tmp_path / "out.json"

    write_text(path, "größer\n")

    assert path.read_bytes() == "größer\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert names_in(tmp_path) == ["out.json"]


def test_what_was_there_is_replaced(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("something longer")

    write_text(path, "new")

    assert path.read_text() == "new"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")

    with pytest.raises(UnicodeEncodeError):
        write_text(path, "lone \ud800 surrogate")

    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["out.json"]


def test_a_name_that_is_taken_by_a_directory_is_left_alone(tmp_path):
    (tmp_path / "out.json").mkdir()

    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "out.json", "new")

    assert names_in(tmp_path) == ["out.json"]


def test_a_long_name_is_no_hindrance(tmp_path):
    path = tmp_path / ("x" * 250)

    write_text(path, "new")

    assert path.read_text() == "new"


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "out.json"
    for delay in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITES_FOR_EVER, path], stdout=subprocess.PIPE
        )
        with writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay / 100)
            writer.send_signal(signal.SIGKILL)

        text = path.read_text()
        assert text == text[0] * 100_000 + "\n"
