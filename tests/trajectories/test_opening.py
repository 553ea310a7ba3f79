"""Opening a run: the order of its checkpoints, and one clear error for each way to go wrong."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, PairMismatchError
from pytest_subnet.trajectories import open_trajectory


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes checkpoints of one number each, by name, into the directory `run`."""
    monkeypatch.chdir(tmp_path)

    def write(*names):
        for number, name in enumerate(names):
            directory = Path("run", name)
            directory.mkdir(parents=True)
            save_file({"w": torch.tensor([float(number)])}, directory / "model.safetensors")
        return "run"

    return write


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("step-*", ["step-2", "step-10", "step-100"]),
        ("*", ["v1-step9", "v1-step10", "v2-step0011"]),
        ("*", ["epoch=0-step=90", "epoch=0-step=180", "epoch=1-step=270"]),
        ("global_step*", ["global_step0", "global_step40-merged"]),
        ("ckpt_[0-9]", ["ckpt_1", "ckpt_3"]),
    ],
)
def test_the_order_is_that_of_the_numbers(run, pattern, names):
    trajectory = open_trajectory(run(*sorted(names)), pattern=pattern)
    assert trajectory.names == tuple(names)
    assert [each.label for each in trajectory.checkpoints] == [f"run/{name}" for name in names]
    assert [pair.tuned for pair in trajectory.pairs] == list(trajectory.checkpoints[1:])
    assert {pair.base for pair in trajectory.pairs} == {trajectory.checkpoints[0]}


def test_only_what_matches_is_a_checkpoint(run):
    run("checkpoint-9", "checkpoint-10", "best", ".checkpoint-11", "tmp-checkpoint-12")
    Path("run", "trainer_state.json").write_text("{}")
    assert open_trajectory(Path("run")).names == ("checkpoint-9", "checkpoint-10")


def test_single_files_are_checkpoints_too(run):
    run("step-9", "step-10")
    for number in (9, 10):
        shutil.move(f"run/step-{number}/model.safetensors", f"run/step-{number}.safetensors")
    names = open_trajectory("run", pattern="*.safetensors").names
    assert names == ("step-9.safetensors", "step-10.safetensors")


def test_a_list_is_taken_in_its_order(run):
    run("checkpoint-1", "checkpoint-2", "checkpoint-3")
    order = ["run/checkpoint-3", Path("run/checkpoint-1"), {"w": torch.zeros(1)}]
    assert open_trajectory(order).names == (
        "run/checkpoint-3",
        "run/checkpoint-1",
        "dict of tensors",
    )


def test_the_start_can_be_put_before_a_run(run):
    run("checkpoint-1", "checkpoint-2", "base")
    trajectory = open_trajectory(["run/base", *open_trajectory("run").checkpoints])
    assert trajectory.label == "run/base … run/checkpoint-2, 3 checkpoints"
    assert repr(trajectory) == f"<Trajectory {trajectory.label}>"
    two = open_trajectory(open_trajectory("run").checkpoints)
    assert two.label == "run/checkpoint-1 -> run/checkpoint-2, 2 checkpoints"


def test_checkpoints_with_one_label_are_told_apart():
    states = [{"w": torch.full((2,), float(step))} for step in range(3)]
    assert open_trajectory(states).names == tuple(f"dict of tensors #{n}" for n in (1, 2, 3))


def test_names_are_escaped_where_they_are_shown(run):
    trajectory = open_trajectory(run("checkpoint-\x1b[m1", "checkpoint-2"))
    assert trajectory.names[0] == "checkpoint-\x1b[m1"
    assert repr(trajectory) == "<Trajectory checkpoint-\\x1b[m1 -> checkpoint-2, 2 checkpoints>"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["checkpoint-1"],
            "pattern='checkpoint-*' matches 1 entry of run (it holds checkpoint-1), and a "
            "trajectory needs two or more checkpoints; say how they are called with pattern=",
        ),
        (
            ["step-1", "step-2"],
            "pattern='checkpoint-*' matches 0 entries of run (it holds step-1, step-2), and a "
            "trajectory needs two or more checkpoints; say how they are called with pattern=",
        ),
        (
            ["checkpoint-1", "checkpoint-2", "checkpoint-\x1b[last"],
            "checkpoint-\\x1b[last in run has no number, so its place in the run is not known; "
            "choose others with pattern=, or give the checkpoints as a list in order",
        ),
        (
            ["checkpoint-07", "checkpoint-2", "checkpoint-7"],
            "checkpoint-07 and checkpoint-7 in run have the same number, so which came first is "
            "not known; choose with pattern=, or give the checkpoints as a list in order",
        ),
        (
            ["checkpoint-20-loss-0.31", "checkpoint-30-loss-0.27"],
            "checkpoint-20-loss-0.31 and checkpoint-30-loss-0.27 in run have several numbers, "
            "which do not agree on what came first; choose with pattern=, or give the checkpoints "
            "as a list in order",
        ),
        (
            ["checkpoint-9", "checkpoint-10-v2", "checkpoint-11"],
            "checkpoint-9 and checkpoint-10-v2 in run have several numbers, which do not agree on "
            "what came first; choose with pattern=, or give the checkpoints as a list in order",
        ),
        (
            ["checkpoint-0.25", "checkpoint-0.5", "checkpoint-0.75"],
            "checkpoint-0.5 and checkpoint-0.25 in run have several numbers, which do not agree on "
            "what came first; choose with pattern=, or give the checkpoints as a list in order",
        ),
        (
            ["checkpoint-1k", "checkpoint-500"],
            "checkpoint-1k and checkpoint-500 in run count in other units, so which came first is "
            "not known; choose with pattern=, or give the checkpoints as a list in order",
        ),
    ],
)
def test_names_that_give_no_order_are_one_error(run, names, says):
    with pytest.raises(CheckpointError) as caught:
        open_trajectory(run(*names))
    assert str(caught.value) == says


def test_an_empty_directory_is_said(run):
    Path("run").mkdir()
    with pytest.raises(CheckpointError, match=r"matches 0 entries of run \(it is empty\), and"):
        open_trajectory("run")


@pytest.mark.parametrize("source", ["nowhere", ""])
def test_a_directory_that_is_missing_is_said(run, source):
    with pytest.raises(CheckpointError, match=rf"\Ano run at '{source}': there is no such dir"):
        open_trajectory(source)


def test_a_file_is_no_run(run):
    run("checkpoint-1")
    with pytest.raises(CheckpointError, match="is one file, not the directory of a run"):
        open_trajectory("run/checkpoint-1/model.safetensors")


@pytest.mark.parametrize(("count", "were"), [(0, "0 were"), (1, "1 was")])
def test_a_list_of_one_is_no_run(count, were):
    with pytest.raises(CheckpointError, match=f"two or more checkpoints, and {were} given"):
        open_trajectory([{"w": torch.zeros(1)}] * count)


@pytest.mark.parametrize("source", [3, None, {"w": torch.zeros(1)}, {"a", "b"}])
def test_what_is_no_run_at_all_is_a_type_error(source):
    with pytest.raises(TypeError, match="a trajectory is the directory of a run or a sequence"):
        open_trajectory(source)


def test_a_checkpoint_without_weights_is_named(run):
    run("checkpoint-1", "checkpoint-3")
    Path("run", "checkpoint-2").mkdir()
    with pytest.raises(
        CheckpointError,
        match=r"\Acheckpoint 2 of 3 cannot be opened: run/checkpoint-2 has no weights: it is empty",
    ):
        open_trajectory("run")


def test_a_checkpoint_that_was_cut_short_is_named(run):
    run("checkpoint-1", "checkpoint-2", "checkpoint-3")
    os.truncate("run/checkpoint-3/model.safetensors", 20)
    with pytest.raises(
        CheckpointError, match=r"checkpoint 3 of 3 cannot be opened: .*checkpoint-3/model\.safe"
    ):
        open_trajectory("run")


def test_a_checkpoint_of_a_list_that_is_missing_is_named(run):
    run("checkpoint-1", "checkpoint-2")
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint 2 of 3 cannot be opened: no checkpoint at \./run/checkpoint-7: ",
    ):
        open_trajectory(["run/checkpoint-1", "./run/checkpoint-7", "run/checkpoint-2"])


def test_a_checkpoint_that_is_given_twice_is_named(run):
    run("checkpoint-1", "checkpoint-2")
    one, two = "run/checkpoint-1", "run/checkpoint-2"
    for sources, number in (([one, two, two], 3), ([one, one, two], 2), ([one, two, one], 3)):
        with pytest.raises(
            PairMismatchError,
            match=rf"\Acheckpoint {number} of 3 is there twice: run/checkpoint-. #. and run/check",
        ):
            open_trajectory(sources)
    with pytest.raises(PairMismatchError) as caught:
        open_trajectory([one, two, one])
    assert str(caught.value) == (
        "checkpoint 3 of 3 is there twice: run/checkpoint-1 #1 and run/checkpoint-1 #3 are the "
        "same. Was a path given twice, one a link to the other, or a model kept without a copy "
        "(copy.deepcopy it, or clone each tensor of its state_dict)?"
    )


def test_a_checkpoint_that_is_given_twice_is_found_wherever_it_is(run):
    run("checkpoint-1", "checkpoint-2", "checkpoint-3")
    one, two, three = (f"run/checkpoint-{number}" for number in (1, 2, 3))
    with pytest.raises(
        PairMismatchError,
        match=r"\Acheckpoint 4 of 4 is there twice: run/checkpoint-2 #2 and run/checkpoint-2 #4",
    ):
        open_trajectory([one, two, three, two])


def test_a_checkpoint_that_is_a_link_to_another_is_named_by_both_names(run):
    run("checkpoint-1", "checkpoint-2")
    Path("run", "checkpoint-3\n").mkdir()
    name = "model.safetensors"
    Path("run", "checkpoint-3\n", name).hardlink_to(Path("run", "checkpoint-2", name))
    with pytest.raises(
        PairMismatchError,
        match=r"\Acheckpoint 3 of 3 is there twice: checkpoint-2 and checkpoint-3\\n are the same",
    ):
        open_trajectory("run")


def test_what_a_run_can_be_cast_to(run):
    run("checkpoint-1", "checkpoint-2")
    trajectory = open_trajectory("run", as_dtype="bfloat16")
    assert [tensor.dtype for tensor in trajectory.pairs[0].tensors] == ["bfloat16"]
    with pytest.raises(ValueError, match="as_dtype='bf16' is not one of bfloat16, "):
        open_trajectory("run", as_dtype="bf16")


def test_state_dicts_that_were_not_copied_are_said():
    model = torch.nn.Linear(2, 2)
    start = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(PairMismatchError, match="checkpoint 3 of 3 is there twice"):
        open_trajectory([start, model.state_dict(), model.state_dict()])


def test_decimals_of_one_length_are_in_order(run):
    assert open_trajectory(run("checkpoint-0.75", "checkpoint-0.25", "checkpoint-0.50")).names == (
        "checkpoint-0.25",
        "checkpoint-0.50",
        "checkpoint-0.75",
    )


def test_a_pattern_that_is_no_string_is_an_error(run):
    with pytest.raises(TypeError, match=r"pattern takes a glob such as 'step-\*', not int"):
        open_trajectory(run("checkpoint-1", "checkpoint-2"), pattern=5)
