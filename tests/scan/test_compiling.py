"""The cache of compiled code can only help: whatever is wrong with it, the results are the same."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import config

import pytest_subnet
from pytest_subnet.scan import compiling

MODULE = """
from typing import NamedTuple

from numba.extending import intrinsic

from pytest_subnet.scan.compiling import compiled


class Lane(NamedTuple):
    one: int


@intrinsic
def twice(typing_context, number):
    def generate(context, builder, signature, args):
        return builder.add(args[0], args[0])

    return number(number), generate


@compiled()
def calculate(number, lane):
    return twice(number) + lane.one
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds a module with one compiled function, and its cache."""
    (tmp_path / "tiny.py").write_text(MODULE)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def calculate(directory: Path) -> tuple[int, bool]:
    """What the function gives in a module that is loaded anew, and whether it was compiled."""
    spec = importlib.util.spec_from_file_location("tiny", directory / "tiny.py")
    module = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        result = module.calculate(3, module.Lane(1))
        return result, not module.calculate.stats.cache_hits
    finally:
        del sys.modules["tiny"]


def compiled_files(directory: Path) -> list[Path]:
    return [file for file in (directory / "cache").rglob("*") if file.is_file()]


def test_what_was_compiled_is_kept(directory: Path) -> None:
    assert calculate(directory) == (7, True)
    assert calculate(directory) == (7, False)
    assert len(compiled_files(directory)) == 1


@pytest.mark.parametrize("damage", ["emptied", "cut short", "overwritten"])
def test_a_damaged_file_is_compiled_again_and_mended(directory: Path, damage: str) -> None:
    calculate(directory)
    (file,) = compiled_files(directory)
    data = file.read_bytes()
    damaged = {"emptied": b"", "cut short": data[:-100], "overwritten": b"garbage" * 99}
    file.write_bytes(damaged[damage])
    assert calculate(directory) == (7, True)
    assert calculate(directory) == (7, False)


def test_a_module_that_was_edited_is_compiled_again(directory: Path) -> None:
    calculate(directory)
    (directory / "tiny.py").write_text(MODULE.replace("+ lane.one", "+ lane.one + lane.one"))
    assert calculate(directory) == (8, True)


def test_each_signature_has_a_file_of_its_own(directory: Path) -> None:
    (directory / "tiny.py").write_text(f"{MODULE}\ncalculate(True, Lane(1))\n")
    assert calculate(directory) == (7, True)
    assert len(compiled_files(directory)) == 2


def run(script: str, directory: Path, **environment: str) -> tuple[str, str]:
    """What a process that starts in `directory` prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.stdout, done.stderr


UNDER_ANOTHER_NAME = """
import importlib.util
spec = importlib.util.spec_from_file_location("other", "tiny.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.calculate(3, module.Lane(1)))
"""


@pytest.mark.slow
def test_code_compiled_under_another_module_name_breaks_no_later_process(directory: Path) -> None:
    for script in (UNDER_ANOTHER_NAME, "from tiny import *; print(calculate(3, Lane(1)))"):
        assert run(script, directory, NUMBA_CACHE_DIR=str(directory / "cache")) == ("7\n", "")
    assert calculate(directory) == (7, False)


def test_a_numba_that_looks_different_inside_is_used_without_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changed(_: object) -> None:
        raise AttributeError("no longer there")

    monkeypatch.setattr(compiling, "_Cache", changed)

    @compiling.compiled()
    def double(number: int) -> int:
        return number * 2

    assert double(3) == 6


def test_what_cannot_be_saved_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling._OneFileEach, "save", full)

    @compiling.compiled()
    def triple(number: int) -> int:
        return number * 3

    assert triple(3) == 9


COUNT = """
import numpy as np
from pytest_subnet.scan import PAPER
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.kernels import choose_kernel
kernel, counters = choose_kernel(None), Counters(1, [PAPER])
sides = (np.array([1, 2, 3, 4], np.uint16), np.array([1, 2, 16000, 5], np.uint16))
kernel(*(side.view(np.uint8) for side in sides), "bfloat16", np.array([0, 4]), counters)
print(type(kernel).__name__, counters.integers.tolist())
"""
COUNTED = "NumbaKernel [[2, 0, 0, 0, 1]]\n"


@pytest.mark.slow
def test_where_nothing_can_be_written_the_kernel_is_compiled_in_memory(tmp_path: Path) -> None:
    package = tmp_path / "pytest_subnet"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(pytest_subnet.__file__).parent, package, ignore=ignored)
    (package / "scan" / "__pycache__").write_text("a file where a directory should be")
    nowhere = tmp_path / "no directory"
    nowhere.write_text("")
    script = "import pytest_subnet; print(pytest_subnet.__file__)" + COUNT
    printed = run(
        script,
        tmp_path,
        NUMBA_CACHE_DIR=str(nowhere / "cache"),
        HOME=str(nowhere),
        XDG_CACHE_HOME=str(nowhere),
        LOCALAPPDATA=str(nowhere),
    )
    assert printed == (f"{package / '__init__.py'}\n{COUNTED}", "")


WITHOUT_NUMBA = """
import logging, sys
sys.modules["numba"] = None
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
from pytest_subnet.scan.kernels import choose_kernel
choose_kernel(None), choose_kernel("cpu")
"""


@pytest.mark.slow
def test_without_numba_torch_gives_the_same_integers_and_one_warning(tmp_path: Path) -> None:
    printed, logged = run(WITHOUT_NUMBA + COUNT, tmp_path)
    assert printed == COUNTED.replace("Numba", "Torch")
    (warning,) = logged.splitlines()
    assert warning.startswith("WARNING pytest_subnet comparing with torch, several times slower: ")
    assert warning.endswith("install a numba that supports this Python")
