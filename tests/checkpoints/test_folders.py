"""A trainer's output folder: which of its subfolders is the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_subnet import CheckpointError
from pytest_subnet.checkpoints.folders import model_directory, whole_weights

if TYPE_CHECKING:
    from pathlib import Path


def write(root: Path, *names: str) -> Path:
    """Files, empty or with what stands behind a `=`; folders where a name ends with `/`."""
    for name in names:
        path, _, text = name.partition("=")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).write_text(text)
    return root


def found(root: Path) -> str | None:
    """The subfolder, as a path in `root`."""
    inner = model_directory(root, sorted(path.name for path in root.iterdir()))
    return None if inner is None else inner.relative_to(root).as_posix()


def refused(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        found(root)
    text = str(caught.value)
    assert text.isprintable()
    return text


SHARD = "model_world_size_1_rank_0.pt"
LATEST = "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    ("names", "inner"),
    [
        ([f"actor/{SHARD}", "actor/huggingface/config.json", "data.pt"], "actor"),
        (["actor/huggingface/model.safetensors", "data.pt"], "actor/huggingface"),
        ([f"actor/{SHARD}", "actor/huggingface/model.safetensors"], "actor/huggingface"),
        ([f"actor/{SHARD}", f"critic/{SHARD}"], "actor"),
        ([f"policy/{SHARD}", f"critic/{SHARD}", "trainer_state.pt"], "policy"),
        (["actor/huggingface/config.json"], None),
        (["huggingface/config.json", "huggingface/model.safetensors"], "huggingface"),
        (["huggingface/config.json"], None),
        (["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"], "pytorch_model_fsdp_0"),
        (["pytorch_model_fsdp_0"], None),
        (["checkpoint-500/model.safetensors", "runs/"], "checkpoint-500"),
        (["step-3/.metadata"], "step-3"),
        (["global_step_40/actor/"], "global_step_40"),
        (["global_step_40/", "global_step_100/", f"{LATEST}=40"], "global_step_40"),
        (["global_step_9/", "global_step_10/", f"{LATEST}=10\n"], "global_step_10"),
        (["iter_0000010/", "iter_0000020/", f"{LATEST}=10"], "iter_0000010"),
        (["global_step_4/", "global_step_5/", "latest_ckpt_global_step.txt=4"], "global_step_4"),
        (["checkpoint-best/", "checkpoint-", "notes.txt"], None),
        (["checkpoint-5"], None),
        ([], None),
    ],
)
def test_the_subfolder_that_is_the_model(
    tmp_path: Path, names: list[str], inner: str | None
) -> None:
    assert found(write(tmp_path, *names)) == inner


def test_several_steps_are_listed_in_their_order(tmp_path: Path) -> None:
    write(tmp_path, *(f"checkpoint-{step}/" for step in (1000, 500, 9, 10)), "trainer_state.json")
    assert refused(tmp_path) == (
        f"{tmp_path} holds 4 checkpoints of a run: checkpoint-9, checkpoint-10, checkpoint-500, "
        f"checkpoint-1000; pass one of them, as {tmp_path / 'checkpoint-1000'}, or all to "
        "open_trajectory"
    )


def test_several_steps_without_the_file_that_names_one(tmp_path: Path) -> None:
    write(tmp_path, *(f"global_step_{step}/" for step in range(8, 15)))
    assert refused(tmp_path).startswith(
        f"{tmp_path} holds 7 checkpoints of a run: global_step_8, global_step_9, global_step_10, "
        "global_step_11, global_step_12, … 2 more; pass one of them"
    )


def test_two_models(tmp_path: Path) -> None:
    write(tmp_path, f"actor/{SHARD}", "huggingface/model.safetensors")
    assert refused(tmp_path) == (f"{tmp_path} holds 2 models: actor, huggingface; pass one of them")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("../../elsewhere", "../../elsewhere"),
        ("/etc", "/etc"),
        ("40/../../elsewhere", "40/../../elsewhere"),
        ("evil\x1b[2J", "evil\\x1b[2J"),
        ("", "nothing"),
        ("-1", "-1"),
        ("٤٠", "�" * 4),
        ("9" * 5000, "9" * 64),
    ],
)
def test_file_that_names_no_step(tmp_path: Path, text: str, shown: str) -> None:
    root = write(tmp_path / "run", "global_step_40/", f"{LATEST}={text}")
    write(tmp_path / "elsewhere", "model.safetensors")
    assert refused(root) == (
        f"{root / LATEST} says {shown}, which is not one step of this folder: there are "
        "global_step_40; pass the folder of one step"
    )


def test_step_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, f"{LATEST}=41")
    assert refused(tmp_path) == (
        f"{tmp_path / LATEST} says 41, which is not one step of this folder: there are none; pass "
        "the folder of one step"
    )


def test_step_that_is_there_twice(tmp_path: Path) -> None:
    write(tmp_path, "global_step_40/", "iter_0000040/", f"{LATEST}=40")
    assert refused(tmp_path) == (
        f"{tmp_path / LATEST} says 40, which is not one step of this folder: there are both "
        "global_step_40 and iter_0000040; pass the folder of one step"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_pipe_instead_of_the_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LATEST)
    assert "is a pipe or a device, not a file" in refused(tmp_path)


def test_whole_weights() -> None:
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert whole_weights(names) == names
    assert whole_weights(["pytorch_model.bin"]) == ["pytorch_model.bin"]
    others = ["._model.safetensors", "optimizer.bin", "training_args.bin", "rng_state.pth", SHARD]
    assert whole_weights(others) == []
