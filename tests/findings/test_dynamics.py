"""`update_dynamics`: the three parts of an update, its steps, and the result."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from pytest_subnet import PairMismatchError, SelectionError, open_pair, update_sparsity
from pytest_subnet.findings.dynamics.finding import update_dynamics
from pytest_subnet.scan import PAPER
from pytest_subnet.trajectories import open_trajectory

DOCS = Path(__file__).parents[2] / "docs" / "findings"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def run_of(*columns, dtype=torch.float32):
    """A run of one matrix `[2, entries]`, from the values of its first row in each checkpoint."""
    states = []
    for values in columns:
        row = torch.tensor(values, dtype=dtype)
        states.append({UP: torch.stack([row, torch.ones_like(row)])})
    return open_trajectory(states)


@pytest.fixture
def run():
    """Entry by entry: never, final, cancelled, final by way of the start, cancelled at the end."""
    return run_of(
        [0.0, 0, 0, 0, 0],
        [0.0, 1, 1, 1, 0],
        [0.0, 1, 2, 0, 0],
        [0.0, 2, 2, 0, 1],
        [0.0, 2, 0, 3, 0],
    )


def test_the_three_parts_are_all_entries(run):
    result = update_dynamics(run)
    assert (result.never, result.cancelled, result.final) == (1 + 5, 2, 2)
    assert result.never + result.cancelled + result.final == result.numel == 10
    assert (result.never_share, result.cancelled_share, result.final_share) == (0.6, 0.2, 0.2)
    assert result.sparsity == 0.8
    assert result.density == 0.2


def test_each_step_is_against_the_start_and_against_the_one_before(run):
    steps = update_dynamics(run).steps
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert [step.updated for step in steps] == [3, 2, 3, 2]
    assert [step.stepped for step in steps] == [3, 2, 2, 3]
    assert [step.ever for step in steps] == [3, 3, 4, 4]
    assert [step.outside for step in steps] == [1, 1, 2, 2]
    assert [step.outside_share for step in steps] == [1 / 3, 1 / 3, 0.5, 0.5]
    assert [step.sparsity for step in steps] == [0.7, 0.8, 0.7, 0.8]
    assert [step.step_sparsity for step in steps] == [0.7, 0.8, 0.8, 0.7]
    assert [(step.previous, step.name) for step in steps][1] == (run.names[1], run.names[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [{}, {"atol": 1e-5}, {"rtol": 1e-2}])
def test_it_agrees_with_sparsity_and_with_plain_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    states = [{UP: torch.randn(60, 50, generator=generator).to(dtype) * 1e-3}]
    for _ in range(5):
        last = states[-1][UP]
        noise = torch.randn(60, 50, generator=generator, dtype=torch.float64) * 1e-5
        back = torch.rand(60, 50, generator=generator) < 0.2
        states.append({UP: torch.where(back, states[0][UP], (last + noise).to(dtype))})
    result = update_dynamics(open_trajectory(states), **tolerance)
    between = update_sparsity(open_pair(states[0], states[-1]), **tolerance)
    assert result.final == between.updated
    assert result.never + result.cancelled == between.numel - between.updated
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    ever = torch.zeros(60, 50, dtype=torch.bool)
    for step, state in zip(result.steps, states[1:], strict=True):
        before, after = states[0][UP].to(wide), state[UP].to(wide)
        allowed = tolerance.get("atol", 0.0)
        if "rtol" in tolerance:
            limit = torch.tensor(tolerance["rtol"], dtype=wide)
            allowed = limit * torch.maximum(before.abs(), after.abs())
        updated = (after - before).abs() > allowed
        ever |= updated
        assert (step.updated, step.ever) == (int(updated.sum()), int(ever.sum()))
    assert result.never == int((~ever).sum())
    assert result.cancelled > 0


def test_each_tensor_has_its_own_parts():
    states = [{UP: torch.zeros(2, 2), NORM: torch.zeros(3)} for _ in range(3)]
    states[1][UP] += 1
    states[2][NORM][:2] += 1
    result = update_dynamics(open_trajectory(states))
    up, norm = result.per_tensor
    assert (up.name, up.never, up.cancelled, up.final, up.sparsity) == (UP, 0, 4, 0, 1.0)
    assert (norm.name, norm.never, norm.cancelled, norm.final) == (NORM, 1, 0, 2)
    assert (norm.shape, norm.dtype, norm.kind, norm.layer, norm.numel) == (
        (3,),
        "float32",
        "norm",
        None,
        3,
    )
    assert (result.never, result.cancelled, result.final) == (1, 4, 2)


def test_stalled_matrices_are_those_in_which_no_value_moved():
    states = [{"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2), NORM: torch.ones(2)}]
    for change in ({"a.weight": 1e-9}, {"a.weight": -0.0, NORM: 1.0}, {}):
        states.append({name: each.clone() for name, each in states[-1].items()})
        for name, value in change.items():
            states[-1][name][0] = value
    states[2]["a.weight"][:] = states[1]["a.weight"]
    states[2]["b.weight"][1, 1] = -0.0
    result = update_dynamics(open_trajectory(states), atol=1e-5)
    assert [(step.stalled, step.matrices) for step in result.steps] == [(1, 2), (2, 2), (1, 2)]
    assert [step.stalled_share for step in result.steps] == [0.5, 1.0, 0.5]
    assert [step.moved for step in result.steps] == [2, 0, 2]
    norms = update_dynamics(open_trajectory(states), include=NORM)
    assert norms.steps[0].stalled_share is None


@pytest.mark.parametrize(
    ("updated", "band", "number"),
    [
        ([0, 3, 4, 4, 4], 0.0, 2),
        ([0, 4, 3, 4, 4], 0.0, 3),
        ([0, 3, 4, 5, 4], 0.0, None),
        ([0, 2, 4, 5, 4], 0.1, 2),
        ([0, 3, 4, 5, 4], 0.1, 1),
        ([0, 1, 2, 3, 4], 0.0, None),
        ([0, 1, 2, 3, 4], 0.3, 1),  # 0.9 - 0.6 is above 0.3 in floating point
        ([0, 1, 2, 3, 4], 0.29, 2),
        ([0, 5], 1.0, None),  # it would be compared with itself only
    ],
)
def test_where_it_levels_off(updated, band, number):
    run = run_of(*[[1.0] * count + [0.0] * (5 - count) for count in updated])
    level = update_dynamics(run).levels_off(band)
    assert (level and level.number) == number


def test_slow_drift_under_a_tolerance_is_seen_against_the_start():
    run = run_of(*[[1 + step * 0.9e-5] * 3 for step in range(4)])
    result = update_dynamics(run, atol=1e-5)
    assert result.final == 3
    assert [step.stepped for step in result.steps] == [0, 0, 0]
    assert not result.nothing_moved


def test_the_parts_may_differ_by_tolerance_and_are_read_once(run):
    run = run_of([0.0, 0, 0], [2e-6, 1, 0], [0.0, 1, 2e-6])
    assert update_dynamics(run).cancelled == 1
    assert update_dynamics(run, atol=1e-5).cancelled == 0
    assert update_dynamics(run, atol=1e-5).tolerance == PAPER


def test_buffers_and_integers_are_left_apart():
    states = [
        {UP: torch.full((2, 2), float(step)), "steps": torch.tensor([step])} for step in range(3)
    ]
    run = open_trajectory(states)
    assert update_dynamics(run).coverage.tensors_total == 1
    with pytest.raises(
        SelectionError, match=r"only buffers and integer tensors are selected \(1\)"
    ):
        update_dynamics(run, include="steps")


def test_selections_and_what_cannot_be_selected(run):
    assert update_dynamics(run, kinds="up_proj").numel == 10
    with pytest.raises(SelectionError, match="include='\\*norm' matches none"):
        update_dynamics(run, include="*norm")
    with pytest.raises(ValueError, match="give at most one"):
        update_dynamics(run, atol=1e-5, rtol=1e-3)


def test_a_tensor_that_is_missing_on_the_way_is_never_left_out_silently():
    states = [{UP: torch.full((2, 2), float(step)), NORM: torch.ones(2)} for step in range(4)]
    del states[2][NORM]
    run = open_trajectory(states)
    with pytest.raises(PairMismatchError, match=r"only base +model\.norm\.weight"):
        update_dynamics(run)
    result = update_dynamics(run, exclude=NORM)
    assert result.coverage.notes == ("1 tensor left out that cannot be compared",)


def test_a_run_in_float32_is_compared_with_a_start_in_bfloat16():
    """What `Trainer(bf16=True)` saves: float32 masters, in front of them the published model."""
    start = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    masters = [[1.0, 1.001, 1.01, 1.0], [1.001, 1.003, 1.01, 1.0], [1.003, 1.01, 1.0, 1.0]]
    states = [{UP: start, NORM: start[0]}]
    states += [{UP: torch.tensor([values]), NORM: torch.ones(4)} for values in masters]
    with pytest.raises(PairMismatchError, match=r"cast both with as_dtype=\"bfloat16\""):
        update_dynamics(open_trajectory(states))
    result = update_dynamics(open_trajectory(states, as_dtype="bfloat16"))
    assert (result.never, result.cancelled, result.final) == (2 + 4, 1, 1)
    assert [step.updated for step in result.steps] == [1, 1, 1]
    assert result.dtype == "bf16"
    assert result.coverage.notes == ("2 tensors cast to bfloat16",)
    assert "2 tensors cast to bfloat16" in result.table()
    again = [states[0], states[0] | {NORM: start[0].clone(), UP: start + 1}, *states[1:]]
    notes = update_dynamics(open_trajectory(again, as_dtype="bfloat16")).coverage.notes
    assert notes == ("2 tensors cast to bfloat16",)  # and no word of those that needed none
    wide = update_dynamics(open_trajectory(states, as_dtype="float32"), include=UP)
    assert (wide.never, wide.cancelled, wide.final) == (1, 1, 2)


def test_what_is_live_is_measured_again():
    """torch does not tell of a write through numpy: what was counted must not be an old verdict."""
    model = torch.nn.Linear(4, 3, bias=False)
    start = {"weight": model.weight.detach().clone()}
    middle = {"weight": start["weight"] + 1}
    run = open_trajectory([start, middle, model])
    assert (update_dynamics(run).cancelled, update_dynamics(run).final) == (12, 0)
    model.weight.detach().numpy()[0, :] += 1
    assert (update_dynamics(run).cancelled, update_dynamics(run).final) == (8, 4)
    middle["weight"].numpy()[2, :] = start["weight"][2].numpy()
    result = update_dynamics(run)
    assert (result.never, result.cancelled, result.final) == (4, 4, 4)


def test_the_result_reads_well(run, recorded):
    result = update_dynamics(run)
    assert recorded == [result]
    assert repr(result) == (
        "UpdateDynamics(never=0.6, cancelled=0.2, final=0.2, 4 steps, same bits, f32)"
    )
    assert result.rows()[2] == {
        "checkpoint": "dict of tensors #4",
        "sparsity": "70.00%",
        "step sparsity": "80.00%",
        "ever updated": "40.00%",
        "of these outside": "50.00%",
        "stalled matrices": "0 of 1",
    }
    lines = result.table().splitlines()
    assert lines[:6] == [
        repr(result),
        "  run        dict of tensors #1 … dict of tensors #5, 5 checkpoints   "
        "(same bits, f32, 1/1 tensor, 10 entries)",
        "  never      60.00% of the entries",
        "  cancelled  20.00%, or more between checkpoints",
        "  final      20.00%",
        "  levels off not within 1.00%",
    ]
    assert len(lines) == 6 + 1 + 2 + 4


def test_the_table_says_where_it_levels_off():
    result = update_dynamics(run_of([0.0], [1.0], [1.0]))
    assert "\n  levels off at dict of tensors #2, within 1.00%\n" in result.table()


def test_its_dictionary_is_plain_json(run):
    numbers = json.loads(json.dumps(update_dynamics(run).to_dict()))
    assert numbers["finding"] == "update_dynamics"
    assert numbers["never"] == 0.6
    assert numbers["sparsities"] == [0.7, 0.8, 0.7, 0.8]
    assert numbers["levels_off"] is None
    assert numbers["tolerance"] == "same bits"
    assert numbers["stalled"] == [0, 0, 0, 0]


def test_values_that_are_not_finite_are_counted_for_each_checkpoint():
    nan = float("nan")
    assert update_dynamics(run_of([0.0, 1], [nan, 1], [nan, nan])).nonfinite == (0, 1, 2)


def test_hostile_names_are_escaped():
    names = ("evil\x1b[2J.weight", "w.weight")
    states = [{name: torch.full((2, 2), float(step)) for name in names} for step in range(3)]
    result = update_dynamics(open_trajectory(states))
    assert "\x1b" not in result.table() + repr(result)


def test_what_is_no_trajectory_is_an_error_that_says_what_to_pass():
    with pytest.raises(TypeError, match=r"a Trajectory is needed, got str; make one with open_tr"):
        update_dynamics("run")


@pytest.mark.slow
def test_the_picture_of_the_page_is_what_its_script_measures():
    """But for what another processor's rounding moves while its runs are trained."""
    drawn = runpy.run_path(str(DOCS / "draw_dynamics.py"))["draw"]()
    on_page = (DOCS / "dynamics.svg").read_text(encoding="utf-8")
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", on_page)
    numbers = [[float(each) for each in NUMBER.findall(text)] for text in (drawn, on_page)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1)  # a pixel, of 210


def test_the_picture_says_what_it_shows():
    drawn = (DOCS / "dynamics.svg").read_text(encoding="utf-8")
    assert 'role="img"' in drawn.partition(">")[0]
    assert drawn.splitlines()[1].startswith(
        "<title>The parts of an update, checkpoint by checkpoint"
    )
    assert drawn.count(">checkpoint</text>") == drawn.count(">share of weights</text>") == 2
