"""A tiny pair of checkpoints, and the command line on it: in this process, or in its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_subnet.cli import main

_SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.norm.weight": (4,),
}
COMMAND = (sys.executable, "-m", "pytest_subnet.cli")


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint and gives its name."""

    def save(name, tensors):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return name

    return save


@pytest.fixture
def weights():
    """What `base` holds; a test may change it and save it under another name."""
    return {name: np.ones(shape, np.float32) for name, shape in _SHAPES.items()}


@pytest.fixture
def pair(save, weights, tmp_path, monkeypatch):
    """`base` and `tuned` in the working directory: 4 entries moved in layer 0, 8 in layer 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    save("base", weights)
    weights["model.layers.0.self_attn.q_proj.weight"][0] += 0.5
    weights["model.layers.1.mlp.up_proj.weight"][:2] += 0.5
    save("tuned", weights)
    return "base", "tuned"


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives exit code, output and errors."""

    def run(*arguments):
        try:
            code = main([str(each) for each in arguments])
        except SystemExit as left:
            code = left.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture
def environment():
    """The environment without what marks a build server, and with Python's own buffers."""
    marks = ("CI", "GITHUB_ACTIONS", "BUILD_NUMBER", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    return {name: value for name, value in os.environ.items() if name not in marks}


@pytest.fixture
def run_apart(tmp_path, environment):
    """Runs a command in a process of its own, in the directory of the test."""

    def run_apart(*arguments, python=(), **options):
        executable, *module = COMMAND
        options = {"capture_output": True, "env": environment, **options}
        return subprocess.run(
            [executable, *python, *module, *map(str, arguments)],
            **{"cwd": tmp_path, "text": True, "timeout": 60, **options},
        )

    return run_apart


@pytest.fixture
def bash():
    """The shell in which pipes are tried."""
    found = shutil.which("bash")
    if found is None:
        pytest.skip("this system has no bash")
    return found
