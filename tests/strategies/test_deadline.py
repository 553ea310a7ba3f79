"""A test that measures what it draws is within Hypothesis's deadline, first example included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

MEASURED = """
from hypothesis import given, settings
from pytest_subnet import assert_finite, update_sparsity
from pytest_subnet.strategies import model_pairs

@settings(database=None, derandomize=True)
@given(model_pairs())
def test(pair):
    assert update_sparsity(pair).updated >= update_sparsity(pair, atol=1e-5).updated
    assert_finite(pair)

test()
"""
DRAWN = """
import sys
from pytest_subnet.strategies import model_pairs
model_pairs()
print("numba" in sys.modules)
"""


@pytest.fixture
def fresh(tmp_path):
    """Run Python in a process that has compiled nothing; what it compiles is kept in `cache`."""

    def run(code, cache):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / cache)} if cache else None
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_kernels_are_loaded_in_the_draw(fresh):
    finished = fresh(MEASURED, cache=None)

    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_kernels_are_compiled_in_the_draw(fresh):
    finished = fresh(MEASURED, cache="empty")

    assert finished.returncode == 0, finished.stderr


def test_nothing_is_compiled_for_a_test_that_is_only_collected(fresh):
    finished = fresh(DRAWN, cache=None)

    assert finished.stdout == "False\n", finished.stderr
