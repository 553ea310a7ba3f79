"""DeepSpeed ZeRO directories: recognised, and answered with the command to run first."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.deepspeed import open_directory, recognises, refuse_ungathered

if TYPE_CHECKING:
    from pathlib import Path

AFTER = (
    "which needs deepspeed, then pass {}: it holds float32 masters, which are to be compared with "
    "as_dtype= the dtype that is served"
)


def write_zero(root: Path, *, stage: int = 2, world: int = 2, step: int = 10) -> Path:
    """The files of a run with ZeRO, under the names that DeepSpeed gives them."""
    tag = root / f"global_step{step}"
    tag.mkdir(parents=True)
    (root / "latest").write_text(tag.name)
    (root / "zero_to_fp32.py").write_text("# written by DeepSpeed\n")
    for rank in range(world):
        torch.save({}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save({}, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save({"module": {}}, tag / "mp_rank_00_model_states.pt")
    return root


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refused(directory: Path, label: str = "run") -> str:
    assert recognises(names_in(directory))
    with pytest.raises(CheckpointError) as caught:
        open_directory(directory, label)
    text = str(caught.value)
    assert text.isprintable()
    return text


@pytest.mark.parametrize(("stage", "models"), [(1, "1 model shard"), (3, "2 model shards")])
def test_message_is_the_command(tmp_path: Path, stage: int, models: str) -> None:
    root = write_zero(tmp_path / "checkpoint", stage=stage)
    assert refused(root) == (
        "run is a DeepSpeed ZeRO checkpoint, with 2 optimizer shards and "
        f"{models} in global_step10/; run `cd {root} && python zero_to_fp32.py . out "
        f"--safe_serialization --tag global_step10`, {AFTER.format(root / 'out')}"
    )


def test_latest_says_which_step_counts(tmp_path: Path) -> None:
    for step in (9, 10, 20):
        write_zero(tmp_path, step=step)
    (tmp_path / "latest").write_text("global_step9\n")
    assert "--safe_serialization --tag global_step9`" in refused(tmp_path)
    (tmp_path / "latest").unlink()
    assert "--safe_serialization --tag global_step20`" in refused(tmp_path)


def test_step_with_a_name_of_its_own(tmp_path: Path) -> None:
    (write_zero(tmp_path) / "global_step10").rename(tmp_path / "best one")
    (tmp_path / "latest").write_text("best one")
    assert "--safe_serialization --tag 'best one'`" in refused(tmp_path)


def test_command_is_quoted_for_the_shell(tmp_path: Path) -> None:
    root = write_zero(tmp_path / "my run; rm -rf $HOME `x` 'y'")
    text = refused(root)
    command = text.partition("run `")[2].partition("`, which needs")[0]
    assert shlex.split(command) == [
        *("cd", str(root), "&&", "python", "zero_to_fp32.py", ".", "out"),
        *("--safe_serialization", "--tag", "global_step10"),
    ]


def test_directory_of_a_long_path_is_not_shortened(tmp_path: Path) -> None:
    root = write_zero(tmp_path / ("a" * 200) / ("b" * 200))
    assert f"cd {root} && python" in refused(root)


def test_folder_of_one_step(tmp_path: Path) -> None:
    step = write_zero(tmp_path) / "global_step10"
    assert f"run `cd {tmp_path} && python zero_to_fp32.py . out --safe_serialization --tag " in (
        refused(step)
    )
    assert AFTER.format(tmp_path / "out") in refused(step)


def test_without_its_script(tmp_path: Path) -> None:
    (write_zero(tmp_path) / "zero_to_fp32.py").unlink()
    assert (
        f"run `cd {tmp_path} && python -m deepspeed.utils.zero_to_fp32 . out --safe_serialization "
        "--tag global_step10`"
    ) in refused(tmp_path)


def test_without_optimizer_shards(tmp_path: Path) -> None:
    write_zero(tmp_path, world=0)
    assert refused(tmp_path) == (
        "run is a DeepSpeed ZeRO checkpoint, with 1 model shard in global_step10/; its weights are "
        "put together from optimizer shards (*_optim_states.pt), which are missing: on multi-node "
        "runs each node keeps its own, copy those of all nodes there"
    )


def test_script_alone(tmp_path: Path) -> None:
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert refused(tmp_path).startswith(
        "run is a DeepSpeed ZeRO checkpoint, with no shards and no folder of a step; its weights"
    )


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "..", ".", "a\\b", "C:x", "x" * 500])
def test_latest_that_leads_elsewhere(tmp_path: Path, tag: str) -> None:
    (write_zero(tmp_path) / "latest").write_text(tag)
    text = refused(tmp_path)
    assert text.startswith(f"{tmp_path / 'latest'} points outside its directory: {tag[:200]}")
    assert "python" not in text


def test_latest_that_names_no_folder(tmp_path: Path) -> None:
    (write_zero(tmp_path) / "latest").write_text("evil\x1b[2J`id`")
    assert refused(tmp_path) == (
        f"{tmp_path / 'latest'} names evil\\x1b[2J`id`, but DeepSpeed's folder of that name is not "
        "beside it; there is global_step10, latest, zero_to_fp32.py: was the save, or the copy, "
        "cut short?"
    )


@pytest.mark.parametrize(
    ("present", "known"),
    [
        (["global_step10", "latest"], True),
        (["config.json", "zero_to_fp32.py"], True),
        (["mp_rank_00_model_states.pt"], True),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], True),
        (["global_step10", "latest", "model.safetensors", "zero_to_fp32.py"], False),
        (["global_step10", "latest", "pytorch_model.bin"], False),
        (["global_step10", "latest", "optimizer.bin", "training_args.bin"], True),
        (["global_step_10", "latest"], False),
        (["global_step10"], False),
        (["checkpoint-10", "latest"], False),
        ([], False),
    ],
)
def test_names_that_are_recognised(present: list[str], known: bool) -> None:
    assert recognises(present) == known


def test_whole_weights_count(tmp_path: Path) -> None:
    write_zero(tmp_path)
    save_file({"a": torch.ones(2), "none": torch.ones(0, 3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    refuse_ungathered(tmp_path, names_in(tmp_path), checkpoint)
    assert checkpoint.names() == ["a", "none"]


def test_weights_that_zero_3_left_empty(tmp_path: Path) -> None:
    write_zero(tmp_path, stage=3)
    tensors = {"a.weight": torch.empty(0), "b.weight": torch.empty(0), "norm": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        refuse_ungathered(tmp_path, names_in(tmp_path), checkpoint)
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'} was saved by ZeRO-3 without gathering: 2 of 3 tensors "
        "are empty, among them a.weight; the weights are in its DeepSpeed ZeRO checkpoint, with 2 "
        f"optimizer shards and 2 model shards in global_step10/; run `cd {tmp_path} && python "
        "zero_to_fp32.py . out --safe_serialization --tag global_step10`, "
        f"{AFTER.format(tmp_path / 'out')}"
    )


def test_empty_tensors_elsewhere_are_not_asked_about(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0)}, tmp_path / "model.safetensors")
    refuse_ungathered(tmp_path, names_in(tmp_path), open_checkpoint(tmp_path))
