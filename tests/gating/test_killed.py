"""`kill -9` while baselines are written leaves each test's entries whole, old or new."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_writers.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_a_whole_file(tmp_path, monkeypatch, kills):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its own file would be torn

    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(kills), "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["killed"] == kills
