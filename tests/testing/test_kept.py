"""What is made once: whole or not at all, by one process of several."""

import subprocess
import sys

import pytest

from pytest_subnet.testing.kept import make_once

MAKE = """
    import os, sys, time
    from pathlib import Path
    from pytest_subnet.testing.kept import make_once

    def make(draft):
        with open("calls", "a") as file:
            file.write("made ")
        time.sleep(0.3)
        (draft / "weights").write_text("1 2 3")

    directory = Path("place", "made")
    make_once(directory, make)
    print((directory / "weights").read_text())
"""


@pytest.fixture
def made(tmp_path):
    return tmp_path / "place" / "made"


@pytest.fixture
def calls():
    return []


@pytest.fixture
def make(calls):
    """Makes two files, and remembers where."""

    def make(draft):
        calls.append(draft)
        (draft / "weights").write_text("1 2 3")
        (draft / "below").mkdir()
        (draft / "below" / "config").write_text("{}")

    return make


def test_it_is_made_once(made, make, calls):
    for _ in range(3):
        make_once(made, make)
    assert len(calls) == 1
    assert (made / "weights").read_text() == "1 2 3"
    assert (made / "below" / "config").read_text() == "{}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: (made / "weights").write_text("1 2 4"),
        lambda made: (made / "weights").unlink(),
        lambda made: (made / "below" / "more").write_text("x"),
        lambda made: (made / "contents.json").unlink(),
        lambda made: (made / "contents.json").write_bytes(b"\xff"),
        lambda made: (made / "contents.json").write_text("[" * 100_000),
        lambda made: (made / "contents.json").write_text("[]"),
    ],
)
def test_what_was_written_to_is_made_anew(made, make, calls, damage):
    make_once(made, make)
    damage(made)
    make_once(made, make)
    make_once(made, make)
    assert len(calls) == 2
    assert {path.name for path in made.rglob("*")} == {
        "weights",
        "below",
        "config",
        "contents.json",
    }


def test_a_file_in_its_place_gives_way(made, make):
    made.parent.mkdir()
    made.write_text("in the way")
    make_once(made, make)
    assert (made / "weights").read_text() == "1 2 3"


def test_a_make_that_fails_leaves_nothing_to_be_taken_for_it(made, make, calls):
    def fail(draft):
        make(draft)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(made, fail)
    assert [path.name for path in made.parent.iterdir() if path.suffix != ".lock"] == []

    make_once(made, make)
    assert len(calls) == 2
    assert (made / "weights").exists()


def test_of_several_processes_one_makes_it(tmp_path):
    script = "\n".join(line.removeprefix("    ") for line in MAKE.splitlines())
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == ["1 2 3\n"] * 3
    assert (tmp_path / "calls").read_text() == "made "
