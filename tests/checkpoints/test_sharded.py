"""Shards and their index: everything they can disagree about."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from pytest_subnet import open_checkpoint
from pytest_subnet.checkpoints.sharded import series

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Refusal = Callable[[Any], str]

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(4)}


@pytest.fixture
def root(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Two shards and an index, as huggingface_hub writes them."""
    save_torch_state_dict(weights, tmp_path, max_shard_size=2 * 8 * 8 * 4)
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, FIRST, SECOND}
    return tmp_path


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the weight map of the index in `root`."""
    index = json.loads((root / INDEX).read_text())
    change(index["weight_map"])
    (root / INDEX).write_text(json.dumps(index))


def test_reads_what_the_hub_library_wrote(root: Path, weights: dict[str, torch.Tensor]) -> None:
    for source in (root, root / INDEX):
        checkpoint = open_checkpoint(source)
        assert sorted(checkpoint.names()) == sorted(weights)
        assert all(torch.equal(checkpoint.read(name), weights[name]) for name in weights)


def test_each_tensor_is_read_from_its_shard(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    for shard in (FIRST, SECOND):
        for name in load_file(root / shard):
            (extent,) = checkpoint.extents(name, 0, 4) or ()
            assert extent.path == str(root / shard)


def test_missing_shard(root: Path, refusal: Refusal) -> None:
    (root / SECOND).unlink()
    assert refusal(root) == (
        f"{root / INDEX} lists 2 shards, 1 missing: {SECOND}; copy or download them into {root}"
    )


def test_shard_that_is_a_link_to_nothing_is_missing(root: Path, refusal: Refusal) -> None:
    (root / FIRST).unlink()
    (root / FIRST).symlink_to(root / "blobs" / "0f")
    assert f"1 missing: {FIRST}" in refusal(root)


def test_shard_behind_a_link_is_read(root: Path, weights: dict[str, torch.Tensor]) -> None:
    (root / "blobs").mkdir()
    shutil.move(root / FIRST, root / "blobs" / "0f")
    (root / FIRST).symlink_to(root / "blobs" / "0f")  # as in the hub's cache
    checkpoint = open_checkpoint(root)
    assert all(torch.equal(checkpoint.read(name), weights[name]) for name in weights)


def test_directory_in_place_of_a_shard(root: Path, refusal: Refusal) -> None:
    (root / FIRST).unlink()
    (root / FIRST).mkdir()
    assert refusal(root) == (f"{root / FIRST} is a directory, not a file; put the file there")


def test_tensor_in_a_shard_but_not_in_the_index(root: Path, refusal: Refusal) -> None:
    rewrite(root, lambda weight_map: weight_map.pop("layers.1.weight"))
    assert refusal(root) == (
        f"{root / FIRST} holds layers.1.weight, which the index {INDEX} does not place there; "
        "save the checkpoint again"
    )


def test_tensor_in_the_index_but_not_in_its_shard(root: Path, refusal: Refusal) -> None:
    rewrite(root, lambda weight_map: weight_map.update(ghost=FIRST))
    assert refusal(root) == (
        f"{root / INDEX} says that {FIRST} holds ghost, but it does not; save the checkpoint again"
    )


def test_tensor_in_two_shards(root: Path, refusal: Refusal) -> None:
    tensors = load_file(root / SECOND)
    save_file(tensors | {"layers.0.weight": torch.zeros(8, 8)}, root / SECOND)
    assert refusal(root) == (
        f"{root / SECOND} holds layers.0.weight, which the index {INDEX} does not place there; "
        "save the checkpoint again"
    )


def test_index_that_swaps_two_tensors(root: Path, refusal: Refusal) -> None:
    def swap(weight_map: dict[str, str]) -> None:
        weight_map["layers.0.weight"], weight_map["layers.3.weight"] = SECOND, FIRST

    rewrite(root, swap)
    assert refusal(root).startswith(f"{root / INDEX} says that ")


def test_name_that_the_index_has_twice(root: Path, refusal: Refusal) -> None:
    text = (root / INDEX).read_text()
    entry = f'"layers.0.weight": "{FIRST}",'
    assert entry in text
    (root / INDEX).write_text(text.replace(entry, entry + entry))
    assert refusal(root) == (
        f"{root / INDEX} lists layers.0.weight twice; which one counts cannot be known, "
        "save it again"
    )


@pytest.mark.parametrize(
    ("shard", "shown"),
    [
        ("../model.safetensors", "../model.safetensors"),
        ("/etc/model.safetensors", "/etc/model.safetensors"),
        ("a/../model.safetensors", "a/../model.safetensors"),
        ("..\\model.safetensors", "..\\model.safetensors"),
        ("C:model.safetensors", "C:model.safetensors"),
        ("m\0.safetensors", "m\\x00.safetensors"),
        ("..", ".."),
        (".", "."),
        ("", ""),
    ],
)
def test_index_that_points_outside_its_directory(
    root: Path, refusal: Refusal, shard: str, shown: str
) -> None:
    shutil.copy(root / FIRST, root.parent / "model.safetensors")  # there to be found
    rewrite(root, lambda weight_map: weight_map.update({"layers.0.weight": shard}))
    assert refusal(root) == (
        f"{root / INDEX} points outside its directory: layers.0.weight in {shown}; "
        "a shard is a file beside its index, this checkpoint was not written by a trainer"
    )


@pytest.mark.parametrize(
    ("shard", "shown"),
    [
        (None, "None"),
        (1, "1"),
        ([FIRST], f"['{FIRST}']"),
        ("config.json", "config.json"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    ],
)
def test_index_that_names_what_is_no_shard(
    root: Path, refusal: Refusal, shard: Any, shown: str
) -> None:
    rewrite(root, lambda weight_map: weight_map.update({"layers.0.weight": shard}))
    assert refusal(root) == (
        f"{root / INDEX} lists layers.0.weight in {shown}, which is no .safetensors file; "
        "save the checkpoint again"
    )


@pytest.mark.parametrize("weight_map", [None, {}, [], "all"])
def test_index_without_a_weight_map(root: Path, refusal: Refusal, weight_map: Any) -> None:
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(root) == f"{root / INDEX} has no weight_map, or an empty one; save it again"


@pytest.mark.parametrize("name", ["half\ud800.safetensors", "\udcff.safetensors"])
def test_shard_name_that_is_not_unicode_is_missing_and_escaped(
    root: Path, refusal: Refusal, name: str
) -> None:
    rewrite(root, lambda weight_map: weight_map.update({"layers.0.weight": name}))
    escaped = name.encode("unicode_escape").decode()
    assert f"1 missing: {escaped}; copy" in refusal(root)


def test_shard_name_that_no_system_takes(root: Path, refusal: Refusal) -> None:
    rewrite(root, lambda w: w.update({"layers.0.weight": "x" * 5000 + ".safetensors"}))
    assert "1 missing: xxx" in refusal(root)


def test_part_of_the_series_that_the_index_leaves_out(root: Path, refusal: Refusal) -> None:
    def forget(weight_map: dict[str, str]) -> None:
        for name in ("layers.2.weight", "layers.3.weight"):
            del weight_map[name]

    rewrite(root, forget)
    assert refusal(root) == (
        f"{root / INDEX} does not list {SECOND}, which belongs to the same series; its tensors "
        "would be left out, save the checkpoint again or remove the file"
    )
    (root / SECOND).unlink()
    assert sorted(open_checkpoint(root).names()) == ["layers.0.weight", "layers.1.weight"]


def test_files_of_another_save_are_left_alone(root: Path) -> None:
    for name in ("model-00001-of-00003.safetensors", "consolidated.safetensors", "notes.txt"):
        (root / name).write_bytes(b"not read")
    assert len(open_checkpoint(root).names()) == 4


def test_shards_with_names_of_their_own(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    shards = {name: f"{name}.safetensors" for name in weights}
    for name, shard in shards.items():
        save_file({name: weights[name]}, tmp_path / shard)
    (tmp_path / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert sorted(open_checkpoint(tmp_path).names()) == sorted(weights)


def test_series_is_known_by_its_name() -> None:
    assert series(FIRST) == series(SECOND) == ("model", 2, ".safetensors")
    assert series("pytorch_model-00001-of-00011.bin") == ("pytorch_model", 11, ".bin")
    assert series("model.safetensors") is None
    assert series("model-of-00002.safetensors") is None
