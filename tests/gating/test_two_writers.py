"""Processes that record in one file at the same time: nobody's entry is lost."""

import json
import subprocess
import sys

import pytest

from pytest_subnet.errors import SubnetError
from pytest_subnet.gating import baseline_file
from pytest_subnet.gating.baseline_file import BaselineFile, Entry

EACH = 40
WRITER = """
import sys
from pathlib import Path
from pytest_subnet.gating.baseline_file import BaselineFile, Entry

file = BaselineFile(Path("test_all.json"), "test_all.json", "")
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    entry = Entry("one", {"number": number}, {}, {}, {"base": "0" * 32}, {})
    file.merge(f"test_{sys.argv[1]}[{number}]", {"one": entry})
"""


def test_no_entry_is_lost(tmp_path):
    command = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen(
            [*command, name, str(EACH)],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b", "c")
    ]
    for each in writers:
        assert each.stdout.readline() == "ready\n"
    for each in writers:
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in writers:
        each.communicate()
        assert each.returncode == 0

    tests = json.loads((tmp_path / "test_all.json").read_text())["tests"]
    assert len(tests) == 3 * EACH
    assert [path.name for path in tmp_path.iterdir()] == ["test_all.json"]


def test_one_that_never_ends_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline_file, "_PATIENCE", 0)
    file = BaselineFile(tmp_path / "test_all.json", "test_all.json", "")
    entry = Entry("one", {}, {}, {}, {}, {})

    with file._turn(), pytest.raises(SubnetError) as caught:
        file.merge("test", {"one": entry})

    assert str(caught.value) == (
        "cannot write test_all.json: another process has been recording in it for 0 seconds; end "
        "it, and record again"
    )
    assert file.merge("test", {"one": entry}) == {}
