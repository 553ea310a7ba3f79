"""Safetensors files: what is read is what the format's own library reads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_subnet import Checkpoint, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]


@pytest.fixture
def path(tmp_path: Path, storable: Tensors) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(storable, path)
    return path


@pytest.fixture
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_reads_what_the_library_loads(checkpoint: Checkpoint, path: Path, same_bits: Same) -> None:
    theirs = load_file(path)
    assert sorted(checkpoint.names()) == sorted(theirs)
    for name, tensor in theirs.items():
        assert same_bits(checkpoint.read(name), tensor)


def test_reads_fp8_scales_that_the_library_reads_but_does_not_write(
    tmp_path: Path, write_raw: Callable[..., Path], same_bits: Same
) -> None:
    header = {"s": {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [0, 6]}}
    path = write_raw(tmp_path / "model.safetensors", header, bytes([0, 1, 127, 128, 254, 255]))
    with safe_open(path, "pt") as theirs:
        assert same_bits(open_checkpoint(path).read("s"), theirs.get_tensor("s"))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(1, 3), slice(0, 0), slice(4, 9), slice(-2, None), slice(3, 1)]
)
def test_reads_the_rows_that_the_library_slices(
    checkpoint: Checkpoint, path: Path, same_bits: Same, rows: slice
) -> None:
    with safe_open(path, "pt") as theirs:
        for name in theirs.offset_keys():
            whole = theirs.get_tensor(name)
            if whole.dim():
                assert same_bits(checkpoint.read(name, rows), whole[rows])


def test_what_is_read_is_a_copy(checkpoint: Checkpoint, path: Path) -> None:
    before = path.read_bytes()
    checkpoint.read("of_float32.weight").zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("start", "count"), [(0, 30), (0, 1), (29, 1), (7, 13), (30, 0)])
def test_reads_any_range_of_bytes(
    checkpoint: Checkpoint, storable: Tensors, start: int, count: int
) -> None:
    buffer = bytearray(count)
    checkpoint.read_into("of_bfloat16.weight", start, memoryview(buffer))
    whole = bytes(storable["of_bfloat16.weight"].reshape(-1).view(torch.uint8).tolist())
    assert buffer == whole[start : start + count]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 31), (30, 1), (31, 0), (100, 1)])
def test_never_reads_into_the_tensor_beyond(checkpoint: Checkpoint, start: int, count: int) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: checkpoint.read_into("of_bfloat16.weight", start, memoryview(bytearray(count))),
        lambda: checkpoint.extents("of_bfloat16.weight", start, count),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == (
            f"of_bfloat16.weight of {checkpoint.label} has 30 bytes; "
            f"bytes {start} to {start + count} were asked for"
        )


def test_extents_are_where_the_bytes_lie(checkpoint: Checkpoint, path: Path) -> None:
    raw = path.read_bytes()
    for name in checkpoint.names():
        nbytes = checkpoint.info(name).nbytes
        buffer = bytearray(nbytes)
        checkpoint.read_into(name, 0, memoryview(buffer))
        (extent,) = checkpoint.extents(name, 0, nbytes) or ()
        assert raw[extent.offset : extent.offset + extent.nbytes] == buffer
        assert (extent.path, extent.nbytes) == (str(path), nbytes)


def test_unknown_name_is_an_error_with_the_nearest(checkpoint: Checkpoint) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: checkpoint.info("of_bfloat16.wait"),
        lambda: checkpoint.read("of_bfloat16.wait"),
        lambda: checkpoint.read_into("of_bfloat16.wait", 0, memoryview(bytearray(1))),
        lambda: checkpoint.extents("of_bfloat16.wait", 0, 1),
        lambda: checkpoint.fingerprint("of_bfloat16.wait"),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{checkpoint.label} has no tensor of_bfloat16.wait; did you mean of_bfloat16.weight?"
        )


def test_file_without_tensors_is_refused(
    tmp_path: Path, write_raw: Callable[..., Path], refusal: Callable[[Any], str]
) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    assert refusal(path) == f"{path} holds no tensors; was the model saved empty?"


def test_identity_changes_when_the_file_does(checkpoint: Checkpoint, path: Path) -> None:
    before = checkpoint.identity()
    assert checkpoint.identity() == open_checkpoint(path).identity() == before
    os.utime(path, ns=(0, 0))
    assert checkpoint.identity() != before


def test_identity_tells_two_files_with_the_same_content_apart(path: Path) -> None:
    copy = path.with_name("copy.safetensors")
    copy.write_bytes(path.read_bytes())
    assert open_checkpoint(copy).identity() != open_checkpoint(path).identity()
    assert open_checkpoint(copy).fingerprint() == open_checkpoint(path).fingerprint()


def test_identity_changes_when_the_index_does(tmp_path: Path, storable: Tensors) -> None:
    save_torch_state_dict(storable, tmp_path, max_shard_size=200)
    checkpoint = open_checkpoint(tmp_path)
    before = checkpoint.identity()
    os.utime(tmp_path / "model.safetensors.index.json", ns=(0, 0))
    assert checkpoint.identity() != before


def test_file_that_changed_after_it_was_opened_is_not_read(
    checkpoint: Checkpoint, path: Path
) -> None:
    path.write_bytes(path.read_bytes())
    for attempt in (lambda: checkpoint.read("of_float32.weight"), checkpoint.fingerprint):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{path} changed after it was opened; wait until it is written, then open it again"
        )


def test_file_that_was_removed_after_it_was_opened(checkpoint: Checkpoint, path: Path) -> None:
    path.unlink()
    for attempt in (lambda: checkpoint.read("of_float32.weight"), checkpoint.identity):
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
            attempt()


def test_file_that_was_cut_short_after_it_was_opened(checkpoint: Checkpoint, path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="before the data its header lists"):
        checkpoint.read(checkpoint.names()[-1])


def test_fingerprint_does_not_depend_on_the_number_of_files(
    tmp_path: Path, path: Path, storable: Tensors
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    save_torch_state_dict(storable, shards, max_shard_size=200)
    assert len(list(shards.glob("*.safetensors"))) > 3
    single, sharded = open_checkpoint(path), open_checkpoint(shards)
    assert single.fingerprint() == sharded.fingerprint()
    assert all(single.fingerprint(n) == sharded.fingerprint(n) for n in storable)


def test_reads_what_transformers_saves(tmp_path: Path, same_bits: Same) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for size in ("1GB", "20KB"):
        root = tmp_path / size
        model.save_pretrained(root, max_shard_size=size)
        checkpoint = open_checkpoint(root)
        state = model.state_dict()
        assert set(state) - set(checkpoint.names()) == {"lm_head.weight"}
        assert all(same_bits(checkpoint.read(n), state[n]) for n in checkpoint.names())
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.fingerprint() == open_checkpoint(model).fingerprint()
    assert len(list(root.glob("*.safetensors"))) > 1


def test_neither_torch_nor_transformers_is_imported(path: Path) -> None:
    code = """if True:
        import sys
        from pytest_subnet import open_checkpoint
        checkpoint = open_checkpoint(sys.argv[1])
        checkpoint.fingerprint()
        checkpoint.identity()
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
    """
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    imported = set(run.stdout.split())
    assert "xxhash" in imported
    assert not imported & {
        "torch", "transformers", "safetensors", "numpy", "huggingface_hub", "pytest", "tqdm",
    }  # fmt: skip


def test_repr_says_what_and_how_many(checkpoint: Checkpoint, path: Path) -> None:
    assert repr(checkpoint) == f"<SafetensorsCheckpoint {path}: {len(checkpoint.names())} tensors>"
