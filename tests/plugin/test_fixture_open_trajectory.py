"""The fixture open_trajectory: the checkpoints of a run, read once in a session."""

import numpy as np
import pytest

import pytest_subnet.findings.dynamics.finding  # noqa: F401 - what a run in this process imports it forgets
from pytest_subnet.scan import following


@pytest.fixture
def run(save_checkpoint):
    """`run/checkpoint-9`, `-10` and `-100`: of 8 entries 2, then another one moves."""
    states = {"9": [0] * 8, "10": [1, 1] + [0] * 6, "100": [1, 1, 1] + [0] * 5}
    for number, values in states.items():
        save_checkpoint(f"run/checkpoint-{number}", {"w.weight": np.float32([values, values])})
    return "run"


@pytest.fixture
def passes(monkeypatch):
    """What runs in this process read: the trajectory's name and its tolerances."""
    found = []
    read = following._read

    def counted(trajectory, rows, tolerances):
        found.append((trajectory.label, [str(each) for each in tolerances]))
        return read(trajectory, rows, tolerances)

    monkeypatch.setattr(following, "_read", counted)
    return found


def test_a_run_is_read_once_whatever_it_is_asked(project, run, passes):
    project.makepyfile(
        """
        from pathlib import Path
        from pytest_subnet import assert_step_sparsity, assert_update_dynamics

        def test_order(open_trajectory):
            names = open_trajectory("run").names
            assert names == ("checkpoint-9", "checkpoint-10", "checkpoint-100")

        def test_steps(open_trajectory):
            result = assert_step_sparsity(open_trajectory("run"), at_least=0.75)
            assert [step.stepped for step in result.steps] == [4, 2]

        def test_parts(open_trajectory, pytestconfig):
            trajectory = open_trajectory(pytestconfig.rootpath / "run")
            assert trajectory is open_trajectory(Path("run"))
            assert_update_dynamics(trajectory, max_final=0.375, atol=1e-5)
            assert_update_dynamics(trajectory, max_final=0.375, rtol=1e-3)
        """
    )
    project.makeini("[pytest]\nsubnet_tolerances = rtol=1e-3\n")
    project.runpytest().assert_outcomes(passed=3)
    label = "checkpoint-9 … checkpoint-100, 3 checkpoints"
    assert passes == [(label, ["same bits", "atol=1e-05", "rtol=0.001"])]


def test_the_start_is_put_first_by_a_list(project, run):
    project.makepyfile(
        """
        def test_list(open_trajectory, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            run = open_trajectory("run")
            assert open_trajectory("run") is run
            whole = open_trajectory(["base", *run.checkpoints])
            assert whole.names == (
                "base", "run/checkpoint-9", "run/checkpoint-10", "run/checkpoint-100"
            )
            assert open_trajectory("run", pattern="*-1*").names == (
                "checkpoint-10", "checkpoint-100"
            )
        """
    )
    project.runpytest().assert_outcomes(passed=1)


def test_a_run_in_another_dtype_than_its_start_is_cast(project, run, passes, save_checkpoint):
    save_checkpoint("half", {"w.weight": np.zeros((2, 8), np.float16)})
    project.makepyfile(
        """
        import pytest
        from pytest_subnet import PairMismatchError, update_dynamics

        def test_cast(open_trajectory):
            run = ["half", *open_trajectory("run").checkpoints]
            with pytest.raises(PairMismatchError, match="float16 -> float32"):
                update_dynamics(open_trajectory(run))
            cast = open_trajectory(run, as_dtype="float16")
            assert cast is open_trajectory(run, as_dtype="float16")
            assert cast is not open_trajectory(run, as_dtype="float32")
            result = update_dynamics(cast)
            assert (result.final, result.dtype) == (6, "f16")
            assert result.coverage.notes == ("1 tensor cast to float16",)
            for wrong in ("f16", ["float16"]):
                with pytest.raises((TypeError, ValueError), match="as_dtype="):
                    open_trajectory(run, as_dtype=wrong)
        """
    )
    project.runpytest().assert_outcomes(passed=1)
    assert len(passes) == 1


def test_a_run_that_went_on_is_another_one(project, run, save_checkpoint):
    save_checkpoint("later", {"w.weight": np.zeros((2, 8), np.float32)})
    project.makepyfile(
        """
        import shutil
        from pytest_subnet import update_dynamics

        def test_grown(open_trajectory, pytestconfig):
            before = open_trajectory("run")
            assert update_dynamics(before).cancelled == 0
            root = pytestconfig.rootpath
            shutil.copytree(root / "later", root / "run" / "checkpoint-200")
            after = open_trajectory("run")
            assert after is not before
            assert update_dynamics(after).cancelled == 6

        def test_saved_again(open_trajectory, pytestconfig):
            before, root = open_trajectory("run"), pytestconfig.rootpath
            shutil.copy(root / "later/model.safetensors", root / "run/checkpoint-10")
            assert open_trajectory("run") is not before
        """
    )
    project.runpytest().assert_outcomes(passed=2)


def test_the_numbers_are_recorded(project, run):
    project.makepyfile(
        """
        from pytest_subnet import update_dynamics

        def test_records(open_trajectory, request):
            update_dynamics(open_trajectory("run"))
            recorded = dict(request.node.user_properties)
            assert recorded["subnet.update_dynamics.final"] == 0.375
            assert recorded["subnet.update_dynamics.sparsities"] == "0.75; 0.625"
        """
    )
    project.runpytest().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('"./nowhere"', "no run at '*/nowhere': there is no such directory"),
        ('""', "no run at '': there is no such directory *"),
        ('"base"', "pattern='checkpoint-[*]' matches 0 entries of */base *"),
        ('["base", "gone"]', "checkpoint 2 of 2 cannot be opened: no checkpoint at */gone: *"),
        ('["base"]', "a trajectory needs two or more checkpoints, and 1 was given; *"),
    ],
)
def test_what_cannot_be_opened_ends_at_the_line_that_asked(project, source, says):
    project.makepyfile(
        f"""
        def test_asks(open_trajectory):
            open_trajectory({source})
        """
    )
    result = project.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f">       open_trajectory({source.replace('[', '[[]')})",
            f"E       pytest_subnet.errors.CheckpointError: {says}",
        ],
    )
    result.stdout.no_fnmatch_line("*fixtures.py*")
