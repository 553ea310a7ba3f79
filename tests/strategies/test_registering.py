"""Hypothesis knows the package's types, and a test suite that does not use them pays nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pytest_subnet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "torch", "numba", "pytest_subnet.strategies", "pytest_subnet.pairs")


@pytest.fixture
def installed(tmp_path):
    """Run Python where the entry point is installed, as the project's file states it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ((name, value),) = settings["project"]["entry-points"]["hypothesis"].items()
    info = tmp_path / "subnet_entry_point-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: subnet-entry-point\nVersion: 1.0")
    (info / "entry_points.txt").write_text(f"[hypothesis]\n{name} = {value}\n")
    package = str(Path(pytest_subnet.__file__).parents[1])

    def run(code, **environment):
        path = os.pathsep.join([str(tmp_path), package, os.environ.get("PYTHONPATH", "")])
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.strip()

    return run


def test_types_that_are_used_after_hypothesis_was_imported_are_drawn(installed):
    code = """
from hypothesis import find, given, settings, strategies as st
from pytest_subnet import ModelPair, Trajectory, UpdateMask

print(*(find(st.from_type(each), lambda drawn: True) for each in (ModelPair, UpdateMask)), sep="; ")
print("steps=" in repr(st.from_type(Trajectory)))

@settings(max_examples=3, database=None, deadline=None)
@given(...)
def test(pair: ModelPair):
    assert isinstance(pair, ModelPair)

test()
"""

    assert installed(code).splitlines() == [
        "<ModelPair drawn model -> the same values: 1 tensor>; "
        "<UpdateMask drawn: 0 of 1 entries of 1 tensor (density 0)>",
        "True",
    ]


def test_types_that_were_used_before_hypothesis_was_imported_are_drawn(installed):
    code = """
from pytest_subnet import ModelPair, UpdateMask
from hypothesis import strategies as st
print(st.from_type(ModelPair), st.from_type(UpdateMask))
"""

    assert installed(code) == "model_pairs() update_masks()"


def test_nothing_heavy_is_imported_for_a_suite_that_only_uses_hypothesis(installed):
    code = f"""
import sys
from hypothesis import strategies as st
st.from_type(list[int]).validate()
print("pytest_subnet.registering" in sys.modules, [m for m in {HEAVY} if m in sys.modules])
"""

    assert installed(code) == "True []"


def test_what_a_mask_could_stand_for_is_not_answered_with_masks(installed):
    code = """
import collections.abc
from typing import Protocol, runtime_checkable
from hypothesis import strategies as st
from hypothesis.errors import SmallSearchSpaceWarning
from pytest_subnet import UpdateMask

@runtime_checkable
class Dense(Protocol):
    def strata(self, name): ...

assert issubclass(UpdateMask, Dense) and issubclass(UpdateMask, collections.abc.Collection)
print("update_masks" in repr(st.from_type(collections.abc.Collection)))
try:
    st.from_type(Dense).validate()
except SmallSearchSpaceWarning:
    print("not known")
"""

    assert installed(code).splitlines() == ["False", "not known"]
