"""From a source to its checkpoint: what a path holds is found out by looking."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import open_checkpoint
from pytest_subnet.checkpoints import hub

if TYPE_CHECKING:
    from collections.abc import Callable

    Refusal = Callable[[Any], str]

TENSORS = {"a": torch.ones(2)}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No test here reaches the hub; what would have is collected."""
    asked: list[str] = []

    def download(repo: str, revision: str | None) -> Path:
        asked.append(f"{repo}@{revision}")
        return Path("hub")

    monkeypatch.setattr(hub, "download", download)
    return asked


@pytest.mark.parametrize("name", ["model.safetensors", "adapter.safetensors"])
def test_directory_with_one_safetensors_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    for source in (tmp_path, str(tmp_path), tmp_path / name, f"{tmp_path}/"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.names() == ["a"]
        assert checkpoint.label == str(source)
        assert checkpoint.directory == tmp_path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pt", "weights.pth"])
def test_directory_with_one_torch_file(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        assert open_checkpoint(source).names() == ["a"]


def test_checkpoint_is_returned_as_it_is() -> None:
    checkpoint = open_checkpoint(TENSORS)
    assert open_checkpoint(checkpoint) is checkpoint


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert open_checkpoint("~").names() == ["a"]
    assert open_checkpoint("~/model.safetensors").names() == ["a"]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "runs" / "one" / "model.safetensors")
    checkpoint = open_checkpoint("runs/one")  # a path that is there is no hub id
    assert checkpoint.label == "runs/one"
    monkeypatch.chdir("/")
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])  # another directory does not lose it


def test_config_beside_the_weights_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.bin"):
        assert open_checkpoint(source).config == {"model_type": "llama"}
    (tmp_path / "config.json").unlink()
    assert open_checkpoint(tmp_path).config == {}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "is not JSON (Expecting property name enclosed in double quotes"),
        (b"[1]", "holds no JSON object; save it again"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
    ],
)
def test_damaged_config_is_an_error(
    tmp_path: Path, refusal: Refusal, raw: bytes, said: str
) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(raw)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'} {said}")


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).names() == ["new"]


def test_usual_name_comes_before_others(tmp_path: Path) -> None:
    save_file({"usual": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert open_checkpoint(tmp_path).names() == ["usual"]


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "._model.bin",
    ],
)
def test_state_of_a_trainer_is_no_weights(tmp_path: Path, refusal: Refusal, name: str) -> None:
    (tmp_path / name).write_bytes(b"not read")
    assert " has no weights: it holds " in refusal(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).names() == ["a"]


def test_no_such_path(tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (
        "nowhere",
        "./a/b",
        "a/b/c",
        "/no/such",
        "~nobody-here/x",
        "nul\0byte",
        "x" * 9999,
    ):
        shown = source.replace("\0", "\\x00")
        shown = shown if len(shown) < 200 else shown[:200] + "…"
        where = "" if source == "/no/such" else f" (looked in {tmp_path})"
        assert refusal(source) == f"no checkpoint at {shown}: there is no such path{where}"


def test_empty_path_is_not_the_current_directory(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert refusal("") == ("the path of the checkpoint is empty; is the variable for it not set?")
    assert open_checkpoint(".").names() == ["a"]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", "org/name@None"),
        ("org/name@main", "org/name@main"),
        ("Org-1/na_me.v2@refs/pr/1", "Org-1/na_me.v2@refs/pr/1"),
    ],
)
def test_hub_id_is_downloaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_hub: list[str],
    source: str,
    asked: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    save_file(TENSORS, tmp_path / "hub" / "model.safetensors")
    checkpoint = open_checkpoint(source)
    assert (checkpoint.names(), checkpoint.label) == (["a"], source)
    assert no_hub == [asked]


def test_empty_directory(tmp_path: Path, refusal: Refusal) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} has no weights: it is empty; looked for *.safetensors, *.bin and *.pt with or "
        "without an index and for *.distcp with .metadata; did the trainer save the model into "
        "another directory?"
    )


def test_directory_without_weights(tmp_path: Path, refusal: Refusal) -> None:
    for name in ("config.json", "log", "evil\x1b[2J", "trace", "b", "c", "d"):
        (tmp_path / name).write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} has no weights: it holds b, c, config.json, d, evil\\x1b[2J, … 2 more; "
        "looked for *.safetensors, *.bin and *.pt with or without an index and for *.distcp with "
        ".metadata; did the trainer save the model into another directory?"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("a.safetensors.index.json", "b.safetensors.index.json"),
        ("model.safetensors.index.json", "model.safetensors"),
        ("a.bin.index.json", "b.bin.index.json"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ],
)
def test_two_checkpoints_in_one_directory(
    tmp_path: Path, refusal: Refusal, names: tuple[str, str]
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds two checkpoints: {', '.join(names)}; "
        "remove the stale one, or pass the file that counts"
    )


@pytest.mark.parametrize(
    ("single", "suffix"), [("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")]
)
def test_one_file_beside_the_shards_of_another_save(
    tmp_path: Path, refusal: Refusal, single: str, suffix: str
) -> None:
    stem = single.partition(".")[0]
    shards = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for name in (single, *shards):
        torch.save(TENSORS, tmp_path / name)
    if suffix == "safetensors":
        save_file(TENSORS, tmp_path / single)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds two checkpoints: {single} and {', '.join(shards)}; "
        "remove the stale one, or pass the file that counts"
    )
    assert open_checkpoint(tmp_path / single).names() == ["a"]


@pytest.mark.parametrize(
    "files",
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_config.json", "adapter_model.bin", "optimizer.pt", "training_args.bin"),
        ("adapter_model.safetensors",),
        ("adapter_model.safetensors.index.json", "adapter_model-00001-of-00002.safetensors"),
        ("adapter_config.json", "README.md"),
    ],
)
def test_adapter_is_not_a_whole_model(
    tmp_path: Path, refusal: Refusal, files: tuple[str, ...]
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} is a PEFT adapter, not a whole model; compare it with its base by "
        "open_pair(base, adapter), or open it on its base with open_adapter(adapter, base)"
    )


def test_an_adapter_that_is_named_is_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path / "adapter_model.safetensors").names() == ["a"]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_a_model(
    tmp_path: Path, refusal: Refusal, weights: str, adapter: str
) -> None:
    for name in (weights, adapter, "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds a model and an adapter: {weights}, {adapter}; which of them counts "
        "cannot be known, merge them (merge_and_unload, then save_pretrained), remove one, or "
        "pass the file that counts"
    )


def test_the_config_of_an_adapter_beside_merged_weights_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names() == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_pipe_in_place_of_the_config_is_not_waited_for(tmp_path: Path, refusal: Refusal) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'} is a pipe or a device")


def test_several_files_and_no_index(tmp_path: Path, refusal: Refusal) -> None:
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds 2 weight files and no index: a.safetensors, b.safetensors; "
        "copy its *.safetensors.index.json beside them, or pass one file"
    )
    assert open_checkpoint(tmp_path / "a.safetensors").names() == ["a"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_one_shard_is_not_the_whole(tmp_path: Path, refusal: Refusal, suffix: str) -> None:
    shard = f"model-00002-of-00003.{suffix}"
    if suffix == "bin":
        torch.save(TENSORS, tmp_path / shard)
    else:
        save_file(TENSORS, tmp_path / shard)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds {shard}, one of 3 shards, and no index; "
        f"copy the others and their *.{suffix}.index.json beside it"
    )
    assert open_checkpoint(tmp_path / shard).names() == ["a"]  # named, it is what is wanted


def test_one_shard_of_one_is_the_whole(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path).names() == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "m.bin"])
def test_directory_in_place_of_a_file(tmp_path: Path, refusal: Refusal, name: str) -> None:
    (tmp_path / name).mkdir()
    assert refusal(tmp_path) == (
        f"{tmp_path / name} is a directory, not a file; put the file there"
    )


@pytest.mark.parametrize("name", ["model.gguf", "model.npz", "model", "config.json"])
def test_file_in_another_format(tmp_path: Path, refusal: Refusal, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert refusal(tmp_path / name) == (
        f"{tmp_path / name} is in no format that can be read; "
        "pass a .safetensors, .bin, .pt or .pth file, an *.index.json, a .metadata or a directory"
    )


@pytest.mark.parametrize(
    "source", [None, 3, [TENSORS], torch.ones(2), b"path", {1, 2}, torch.nn.Linear]
)
def test_source_of_another_type_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError) as caught:
        open_checkpoint(source)
    assert str(caught.value) == (
        "a checkpoint is a path, a hub id, a module or a mapping of tensors, "
        f"not {type(source).__name__}"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a directory that is in use")
def test_a_current_directory_that_was_removed(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refusal("runs/one") == (
        "cannot look for runs/one: the current directory was removed; change to one that is "
        "there, or pass an absolute path"
    )
