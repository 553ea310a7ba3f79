"""`assert_update_dynamics` and `assert_step_sparsity`: verdicts, and every word of failures."""

import pytest
import torch

from pytest_subnet import SelectionError
from pytest_subnet.findings.dynamics.finding import (
    assert_step_sparsity,
    assert_update_dynamics,
    update_dynamics,
)
from pytest_subnet.trajectories import open_trajectory

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def run_of(save):
    """Writes `step-0`, `step-2`, … `step-10`: each a number of updated entries of 96, and a norm.

    Entries are updated from the front, so that what is undone is at the end of them.
    """

    def make(*updated, names=None):
        sources = []
        for number, count in enumerate(updated):
            up = torch.ones(96, dtype=torch.bfloat16)
            up[:count] = 2
            state = {UP: up.reshape(8, 12), NORM: torch.ones(4, dtype=torch.bfloat16)}
            sources.append(save(state, names[number] if names else f"step-{2 * number}"))
        return open_trajectory(sources)

    return make


def test_they_hold_and_return_what_was_measured(run_of):
    run = run_of(0, 10, 30, 20)
    assert assert_update_dynamics(run, min_never=0.7) == update_dynamics(run)
    bounds = {"min_never": 0.7, "max_cancelled": 0.1, "max_final": 0.2}  # all of them equal
    assert assert_update_dynamics(run, **bounds).cancelled == 10
    assert assert_step_sparsity(run, at_least=0.8) == update_dynamics(run)
    assert assert_update_dynamics(run, level_by=0.67, band=0.1).steps[1].number == 2


def test_too_few_never(run_of, fails_with):
    run = run_of(0, 10, 30, 20)
    with fails_with("""
        never updated 70.00% is below the required 72.00%
          run        step-0 … step-6, 4 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          never      70 / 100   (70.00%)
          cancelled  10 / 100   (10.00%), or more between checkpoints
          final      20 / 100   (20.00%)
          worst      model.layers.0.mlp.up_proj.weight   68.75% never  (bf16[8,12])
                     model.norm.weight                  100.00% never  (bf16[4])
          usually    a higher learning rate, or more steps than before
          to accept  min_never=0.7
    """):
        assert_update_dynamics(run, min_never=0.72)
    assert_update_dynamics(run, min_never=0.7)


def test_too_many_cancelled_and_too_many_final(run_of, fails_with):
    run = run_of(0, 10, 30, 20)
    with fails_with("""
        cancelled 10.00% is above the allowed 8.00%
          run        step-0 … step-6, 4 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          never      70 / 100   (70.00%)
          cancelled  10 / 100   (10.00%), or more between checkpoints
          final      20 / 100   (20.00%)
          worst      model.layers.0.mlp.up_proj.weight  10.42% cancelled  (bf16[8,12])
                     model.norm.weight                   0.00% cancelled  (bf16[4])
          usually    steps that cancel out: a learning rate that is too high, or a small batch
          to accept  max_cancelled=0.1
    """):
        assert_update_dynamics(run, max_cancelled=0.08)
    with pytest.raises(AssertionError) as caught:
        assert_update_dynamics(run, max_cancelled=0.1, max_final=0.199)
    text = str(caught.value)
    assert text.startswith("final 20.00% is above the allowed 19.90%\n")
    assert text.endswith("\n  to accept  max_final=0.2")
    assert "20.83% final" in text


def test_levelling_off_too_late_and_not_at_all(run_of, fails_with):
    run = run_of(0, 10, 20, 24, 25)
    with fails_with("""
        sparsity levels off at step 3 of 4, step-6; required by 50.00% of the steps
          run        step-0 … step-8, 5 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          never      75 / 100   (75.00%)
          cancelled  0 / 100   (0.00%), or more between checkpoints
          final      25 / 100   (25.00%)
          sparsity   80.00% step-4, 76.00% step-6, 75.00% step-8
          usually    the run is not done, or its learning rate does not decay
          to accept  level_by=0.75, or band=0.05
    """):
        assert_update_dynamics(run, level_by=0.5)
    assert_update_dynamics(run, level_by=0.75)
    assert_update_dynamics(run, level_by=0.5, band=0.05)
    with pytest.raises(AssertionError):
        assert_update_dynamics(run, level_by=0.5, band=0.04)
    with pytest.raises(AssertionError) as caught:
        assert_update_dynamics(run, level_by=1, band=0)
    text = str(caught.value)
    assert text.startswith("sparsity has not levelled off within 0.00%; required by 100.00% of the")
    assert text.endswith("\n  to accept  band=0.01")


@pytest.mark.filterwarnings("ignore::pytest_subnet.VacuousBoundWarning")  # band=1
@pytest.mark.parametrize(
    ("updated", "level_by", "band", "advice"),
    [
        ([0, 10, 96, 1], 0.7, 0.01, "  to accept  band=0.95"),
        ([0, 100, 50, 100], 0.34, 0.0, "  to accept  band=0.5"),
        ([0, 0, 0, 100], 0.9, 0.5, None),  # 1 is no band
        ([0, 0, 50, 100], 0.4, 0.5, "  to accept  level_by=0.67"),
        ([0, 10, 20], 0.3, 1, "  to accept  level_by=0.5"),  # too early for any band
        ([0, 10, 20], 0, 0.01, None),
    ],
)
def test_what_is_advised_holds(updated, level_by, band, advice):
    rows = [torch.tensor([1.0] * count + [0.0] * (100 - count)) for count in updated]
    run = open_trajectory([{UP: row.reshape(10, 10)} for row in rows])
    bounds = {"level_by": level_by, "band": band}
    with pytest.raises(AssertionError) as caught:
        assert_update_dynamics(run, **bounds)
    last = str(caught.value).splitlines()[-1]
    assert (last if "to accept" in last else None) == advice
    if advice is not None:
        keyword, value = advice.split()[-1].split("=")
        assert float(value) < 1
        assert_update_dynamics(run, **bounds | {keyword: float(value)})


def test_two_checkpoints_cannot_level_off(run_of):
    run = run_of(0, 10)
    with pytest.raises(SelectionError) as caught:
        assert_update_dynamics(run, level_by=1.0, band=1.0)
    assert str(caught.value) == (
        "level_by= needs three checkpoints or more, and the run has two (step-0 -> step-2, "
        "2 checkpoints): the last one is within any band of itself; put the model that training "
        "started from first, or leave level_by= out"
    )
    assert_update_dynamics(run, max_final=0.1)
    with pytest.raises(TypeError, match="a Trajectory is needed, got str"):
        assert_update_dynamics("run", level_by=1.0)


def test_a_run_in_which_nothing_moved_fails_whatever_the_bounds(run_of, fails_with):
    run = run_of(7, 7, 7)
    with fails_with("""
        nothing moved: all 3 checkpoints hold the same values
          run        step-0 … step-4, 3 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          usually    a checkpoint was saved again, every step was smaller than half a step of the
                     storage dtype (bf16 without float32 masters), or the learning rate fell to 0
          to accept  allow_identical=True
    """):
        assert_update_dynamics(run, min_never=0)
    assert assert_update_dynamics(run, min_never=1, allow_identical=True).nothing_moved
    assert assert_step_sparsity(run, at_least=1, allow_identical=True).nothing_moved


def test_a_run_that_came_back_to_its_start_did_move(run_of):
    result = assert_update_dynamics(run_of(0, 10, 0), min_never=0.9)
    assert (result.cancelled, result.final, result.nothing_moved) == (10, 0, False)


def test_a_step_that_changes_too_much_is_named(run_of, fails_with):
    run = run_of(0, 10, 40, 42, 60)
    with fails_with("""
        step sparsity 70.00% is below the required 85.00%, at step-4
          run        step-0 … step-8, 5 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          below      2 of 4 steps
          worst      step-4  70.00% unchanged since step-2
                     step-8  82.00% unchanged since step-6
                     step-2  90.00% unchanged since step-0
                     … 1 more
          usually    a higher learning rate, or more optimiser steps between two checkpoints
          to accept  at_least=0.7
    """):
        assert_step_sparsity(run, at_least=0.85)
    assert_step_sparsity(run, at_least=0.7)


def test_a_step_in_which_nothing_moved_is_stalled(run_of, fails_with):
    run = run_of(0, 10, 10, 12, 12)
    with fails_with("""
        2 steps of 4 stalled: nothing moved
          run        step-0 … step-8, 5 checkpoints   (same bits, bf16, 2/2 tensors, 100 entries)
          stalled    step-2 -> step-4, step-6 -> step-8
          usually    a checkpoint was saved again, every step was smaller than half a step of the
                     storage dtype (bf16 without float32 masters), or the learning rate fell to 0
          to accept  allow_identical=True
    """):
        assert_step_sparsity(run, at_least=0)
    assert_step_sparsity(run, at_least=0.9, allow_identical=True)
    with pytest.raises(AssertionError, match=r"\Astep sparsity 90\.00% is below the required 95"):
        assert_step_sparsity(run, at_least=0.95, allow_identical=True)
    assert_update_dynamics(run, max_final=0.12)  # a stalled step is no matter here


def test_what_is_not_finite_is_shown_with_its_checkpoint(save):
    values = [[0.0, 0.0], [float("nan"), 1.0], [float("nan"), float("inf")]]
    run = open_trajectory(
        [save({"w.weight": torch.tensor(each)}, f"step-{n}") for n, each in enumerate(values)]
    )
    with pytest.raises(AssertionError) as caught:
        assert_step_sparsity(run, at_least=0.5)
    assert "\n  not finite 1 in step-1, 2 in step-2\n" in str(caught.value)


def test_names_of_checkpoints_are_escaped(run_of):
    run = run_of(0, 50, 50, 90, names=["a\x1b[2J1", "a\n2", "b\x1b[2J3", "c4"])
    for check in (
        lambda: assert_step_sparsity(run, at_least=0.9),
        lambda: assert_step_sparsity(run, at_least=0.9, allow_identical=True),
        lambda: assert_update_dynamics(run, level_by=0.1),
        lambda: assert_update_dynamics(run, level_by=0.1, band=0.5),
        lambda: assert_update_dynamics(run, min_never=1),
    ):
        with pytest.raises(AssertionError) as caught:
            check()
        assert "\x1b" not in str(caught.value)
        assert "a\n2" not in str(caught.value)
    with pytest.raises(AssertionError, match="b"):
        assert_update_dynamics(run, level_by=0.1)


def test_a_message_can_be_reworded(run_of):
    run = run_of(0, 50)
    for check in (
        lambda message: assert_update_dynamics(run, min_never=0.9, message=message),
        lambda message: assert_step_sparsity(run, at_least=0.9, message=message),
    ):
        with pytest.raises(AssertionError, match=r"\Arun 7: (never|step sparsity)"):
            check(lambda text: f"run 7: {text}")
        with pytest.raises(TypeError):
            check("text")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"band": 0.1}, ValueError),
        ({"min_never": 70}, ValueError),
        ({"max_cancelled": -0.1}, ValueError),
        ({"max_final": True}, TypeError),
        ({"level_by": 1.5}, ValueError),
        ({"level_by": 0.5, "band": None, "max_final": "0.1"}, TypeError),
        ({"min_never": 0.5, "atol": 1e-5, "rtol": 1e-5}, ValueError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(run_of, options, error):
    with pytest.raises(error):
        assert_update_dynamics(run_of(0, 10), **options)


@pytest.mark.parametrize("at_least", [70, -1, float("nan")])
def test_a_bound_of_steps_is_a_fraction(run_of, at_least):
    with pytest.raises(ValueError, match="at_least"):
        assert_step_sparsity(run_of(0, 10), at_least=at_least)


def test_both_sides_of_a_step_matter(run_of):
    """Swapping the order of a run changes its steps, and so its verdict."""
    run = run_of(0, 5, 60)
    assert_step_sparsity(open_trajectory(run.checkpoints[:2]), at_least=0.95)
    with pytest.raises(AssertionError, match="at step-4"):
        assert_step_sparsity(run, at_least=0.95)
    turned = open_trajectory([run.checkpoints[at] for at in (0, 2, 1)])
    with pytest.raises(AssertionError, match=r"40\.00% is below the required 95\.00%, at step-4"):
        assert_step_sparsity(turned, at_least=0.95)
