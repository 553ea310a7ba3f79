"""What the tests of findings share: pairs of real files, and failures held to their whole text."""

from __future__ import annotations

import json
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import open_pair
from pytest_subnet.recording import recording_to

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def base():
    """Four bfloat16 tensors of ones, 100 entries."""
    shapes = {EMBED: (8, 4), UP: (4, 8), DOWN: (8, 4), NORM: (4,)}
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture
def tuned(base):
    """The same weights in other storage, to be changed by a test."""
    return {name: tensor.clone() for name, tensor in base.items()}


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes a checkpoint to a directory named as given, which messages then show."""
    monkeypatch.chdir(tmp_path)

    def write(tensors, name, config=None):
        Path(name).mkdir(exist_ok=True)
        save_file(tensors, Path(name, "model.safetensors"), metadata={"format": "pt"})
        if config is not None:
            Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return name

    return write


@pytest.fixture
def pair_of(save):
    """Writes two checkpoints, `base` and `tuned`, and opens them as a pair."""

    def make(base, tuned, *, config=None, **options):
        return open_pair(save(base, "base", config), save(tuned, "tuned", config), **options)

    return make


@pytest.fixture
def fails_with():
    """Holds a failed assertion to its whole text."""

    @contextmanager
    def check(text):
        with pytest.raises(AssertionError) as caught:
            yield
        assert str(caught.value) == textwrap.dedent(text).strip("\n")

    return check


@pytest.fixture
def recorded():
    """The results that were recorded so far."""
    results = []
    with recording_to(results.append):
        yield results
