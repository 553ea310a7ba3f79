"""Checkpoints that are drawn: read as written in every format, there as long as they must be."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet import open_checkpoint
from pytest_subnet.strategies.checkpoints import checkpoints
from pytest_subnet.strategies.saved_checkpoints import FORMATS, SavedCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "embed.weight": torch.arange(15).reshape(5, 3).bfloat16(),
    "norm.weight": torch.tensor([1.0]),
    "scale": torch.tensor(2.5),
}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_what_was_written(format: str) -> None:
    excepthook = sys.excepthook
    tied = TENSORS | {"head.weight": TENSORS["embed.weight"]}
    saved = SavedCheckpoint(format=format, tensors=tied)
    checkpoint = open_checkpoint(saved.path)
    assert set(checkpoint.names()) == set(saved.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert sys.excepthook is excepthook


def test_the_directory_goes_with_the_checkpoint() -> None:
    saved = SavedCheckpoint(format="bin", tensors=TENSORS)
    path = saved.path
    assert path.is_dir()
    del saved
    assert not path.exists()


def test_a_path_alone_lives_until_the_example_is_over() -> None:
    seen: list[Path] = []

    @settings(max_examples=5, deadline=None, database=None)
    @given(checkpoints(tensors=st.just(TENSORS)).map(lambda saved: saved.path))
    def look(path: Path) -> None:
        gc.collect()
        assert path.is_dir()
        assert not any(each.exists() for each in seen)
        seen.append(path)

    look()
    assert seen
    assert not any(path.exists() for path in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": []}, "formats is empty: there is nothing to draw from"),
        ({"formats": "bin"}, "formats='bin' is neither a strategy nor a list"),
        (
            {"formats": ["gguf"]},
            "formats: 'gguf' is not one of safetensors, sharded, bin, dcp, fsdp",
        ),
        ({"tensors": 3}, "Expected SearchStrategy but got tensors=3 (type=int)"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checkpoints(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^format='gguf' is not one of safetensors, sharded, "):
        SavedCheckpoint(format="gguf", tensors=TENSORS)
