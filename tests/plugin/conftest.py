"""A tiny pair of checkpoints, and a directory in which pytest is run on it."""

from __future__ import annotations

import shutil
import sys

# A run in this process forgets what it was the first to import, and neither numpy nor a class that
# others test for can come twice.
import hypothesis.strategies  # noqa: F401
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaForCausalLM  # noqa: F401

import pytest_subnet
import pytest_subnet.scan.mask_kernel
import pytest_subnet.scan.numba_kernel
import pytest_subnet.scan.torch_kernel
from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.scan import gathering

for _name in pytest_subnet.__all__:
    getattr(pytest_subnet, _name)

_OUTER_RUN = ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "NO_COLOR", "FORCE_COLOR", "PY_COLORS")
_SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.norm.weight": (4,),
}
PAIR = ("--subnet-base=base", "--subnet-tuned=tuned")


def save(directory, tensors):
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`base` and `tuned`: of 84 entries 4 moved in layer 0 and 8 in layer 1, 85.71 % did not."""
    root = tmp_path_factory.mktemp("checkpoints")
    base = {name: np.ones(shape, np.float32) for name, shape in _SHAPES.items()}
    tuned = {name: weights.copy() for name, weights in base.items()}
    tuned["model.layers.0.self_attn.q_proj.weight"][0] += 0.5
    tuned["model.layers.1.mlp.up_proj.weight"][:2] += 0.5
    save(root / "base", base)
    save(root / "tuned", tuned)
    # Numba's compiler, too, registers itself once: with data in files and in memory.
    in_memory = ({name: torch.from_numpy(w) for name, w in side.items()} for side in (base, tuned))
    for pair in (open_pair(root / "base", root / "tuned"), open_pair(*in_memory)):
        assert update_sparsity(pair).updated == 12
    return root


# unraisableexception collects garbage five times at the end of each run: seconds, in this process.
@pytest.fixture
def project(pytester, checkpoints, monkeypatch, pytestconfig):
    """Runs pytest in a directory that holds `base` and `tuned`, away from the outer environment."""
    for name in _OUTER_RUN:
        monkeypatch.delenv(name, raising=False)
    inside = pytestconfig.getoption("--inside")
    monkeypatch.setenv("PYTEST_ADDOPTS", f"{inside} -p no:unraisableexception")
    monkeypatch.setenv("COLUMNS", "120")
    # A test file that is written again within a second, as long as before, is not taken as cached.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name in ("base", "tuned"):
        shutil.copytree(checkpoints / name, pytester.path / name)
    return pytester


@pytest.fixture
def run_apart(project, pytestconfig, monkeypatch):
    """Runs pytest in a process of its own, with the plugins that these tests need and no others.

    A test that asks for workers is skipped where `--inside` takes xdist away.
    """
    unneeded = ("hypothesispytest", "anyio", "cacheprovider")
    arguments = [part for name in unneeded for part in ("-p", f"no:{name}")]

    def run_apart(*more):
        if "no:xdist" in pytestconfig.getoption("--inside") and _asks_for_workers(more):
            pytest.skip("without xdist inside")
        monkeypatch.setenv("PYTEST_ADDOPTS", pytestconfig.getoption("--inside"))
        return project.runpytest_subprocess(*arguments, *more)

    return run_apart


def _asks_for_workers(arguments):
    return any(str(each).startswith("-n") for each in arguments)


@pytest.fixture
def pair_options():
    """The options that name the pair of `project`."""
    return PAIR


@pytest.fixture
def save_checkpoint(project):
    """Writes tensors, by name, as a checkpoint into a directory of the project."""
    return lambda name, tensors: save(project.path / name, tensors)


@pytest.fixture
def scans(monkeypatch):
    """What runs in this process read: the pair's name, and how many of its tensors."""
    found = []
    scan = gathering.scan

    def counted(pair, rows, tolerances):
        found.append((pair.label, len(rows)))
        return scan(pair, rows, tolerances)

    monkeypatch.setattr(gathering, "scan", counted)
    return found


@pytest.fixture
def gate(project):
    """A test file with one gate that holds and one that does not."""
    return project.makepyfile(
        test_gate="""
        from pytest_subnet import assert_update_sparsity

        def test_holds(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)

        def test_fails(model_pair):
            assert_update_sparsity(model_pair, at_least=0.9, atol=1e-5)
        """
    )
