"""Kills runs that write baselines, at random moments, and looks at the file each of them left.

python killed_writers.py KILLS SEED prints, as JSON, how many were killed and what was found.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import pytest_subnet.gating.baselines  # noqa: F401 - so that no child has to import it
from pytest_subnet.gating.baseline_file import BaselineFile

TESTS = 12
SOURCE = f"""
import os
import pytest

class Result:
    fingerprints = {{"base": "0" * 32}}

    def __init__(self, finding):
        self.finding = finding

    def to_dict(self):
        return {{"finding": self.finding, "number": int(os.environ["GENERATION"])}}

@pytest.mark.parametrize("number", range({TESTS}))
def test_all(subnet_baseline, number):
    for finding in ("one", "other"):
        subnet_baseline.check(Result(finding), within={{"number": 0}})
"""
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--subnet-write-baselines")


def start(generation: int) -> int:
    """A process that runs pytest; its id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ["GENERATION"] = str(generation)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main([*OPTIONS, "test_all.py"])
    os._exit(int(code))


def look(file: BaselineFile, newest: int) -> Counter[int]:
    """Which generations the file holds, test by test; raises if it is not whole."""
    tests = file.read()
    found: Counter[int] = Counter()
    assert len(tests) == TESTS
    for entries in tests.values():
        assert entries.keys() == {"one", "other"}
        (generation,) = {entry.numbers["number"] for entry in entries.values()}
        assert generation <= newest
        found[int(generation)] += 1
    return found


def main(kills: int, seed: int) -> None:
    chance = random.Random(seed)
    Path("test_all.py").write_text(SOURCE)
    file = BaselineFile(Path("subnet_baselines/test_all.json"), "test_all.json", "")
    began = time.monotonic()
    pid = start(0)
    assert os.waitpid(pid, 0)[1] == 0
    whole = time.monotonic() - began
    assert look(file, 0) == {0: TESTS}
    generation = killed = mixed = 0
    while killed < kills:
        generation += 1
        pid = start(generation)
        time.sleep(chance.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == signal.SIGKILL:
            killed += 1
        else:  # it was done before: the machine has become faster
            whole *= 0.9
        found = look(file, generation)
        mixed += 0 < found[generation] < TESTS
    pid = start(generation + 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert look(file, generation + 1) == {generation + 1: TESTS}
    print(json.dumps({"killed": killed, "between two tests": mixed}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
