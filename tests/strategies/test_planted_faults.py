"""Each law of `docs/property-tests.md` catches a fault of what it is about, planted here.

The page shows three of them fail (frozen, masks, saving); these are the other seven, taken from it
as they stand there.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import Phase

import pytest_subnet
from pytest_subnet import strategies
from pytest_subnet.strategies.training_runs import FinetuneTrajectory

pytestmark = pytest.mark.slow  # trains

PAGE = Path(__file__).parents[2] / "docs" / "property-tests.md"


@pytest.fixture
def law():
    """A test of the page as it is there, but that a failure is neither shrunk nor kept."""

    def load(file, name):
        blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.M)
        (code,) = [block for block in blocks if block.startswith(f"# {file}\n")]
        code, count = re.subn(
            r"derandomize=True(,\n    phases=\[[^\n]*)?",
            "derandomize=True, database=None, phases=[Phase.generate],",
            code,
        )
        assert count == 1
        names = {"__name__": file.removesuffix(".py"), "Phase": Phase}
        exec(compile(code, file, "exec"), names)
        return names[name]

    return load


def keeping_master_weights(**bounds):
    """A trainer that keeps them where it was told not to."""
    return finetunes(**{**bounds, "master_weights": True})


def by_name_and_shape(pair, include):
    """A comparison of what a file's header says."""
    pytest_subnet.assert_same_structure(pair)


def by_sums(pair, include):
    """A check of sums, over all that is selected."""
    sides = ((pair.base, "base_name"), (pair.tuned, "tuned_name"))
    one, other = (
        sum(float(side.read(getattr(each, name)).double().sum()) for each in pair.tensors)
        for side, name in sides
    )
    assert one == pytest.approx(other)


def density_for_sparsity(pair, **tolerance):
    """A report that prints the share that moved under the other name."""
    return SimpleNamespace(sparsity=1 - update_sparsity(pair, **tolerance).sparsity)


def of_the_other_side(a, b):
    """An overlap whose sides were exchanged."""
    found = mask_overlap(a, b)
    return SimpleNamespace(one_sided_a=found.one_sided_b, one_sided_b=found.one_sided_a)


def without_the_last(trajectory):
    """A run whose last checkpoint was not there yet."""
    return update_dynamics(
        FinetuneTrajectory(trajectory.run, trajectory.checkpoints[:-1], trajectory.pairs[:-1])
    )


def casting_one_side(base, tuned, *, as_dtype=None):
    """A comparison of float32 masters with what is served."""
    if as_dtype is not None:
        tuned = {name: each.bfloat16().float() for name, each in tuned.items()}
    return open_pair(base, tuned)


finetunes = strategies.finetunes
mask_overlap = pytest_subnet.mask_overlap
open_pair = pytest_subnet.open_pair
update_dynamics = pytest_subnet.update_dynamics
update_sparsity = pytest_subnet.update_sparsity

FAULTS = [
    ("test_rounding.py", "test_small_steps_are_lost", keeping_master_weights, "finetunes"),
    ("test_merging.py", "test_merging_twice_is_seen", by_name_and_shape, "assert_frozen"),
    (
        "test_measures.py",
        "test_a_wider_tolerance_finds_no_less_sparsity",
        density_for_sparsity,
        "update_sparsity",
    ),
    (
        "test_measures.py",
        "test_the_overlap_is_one_number_from_both_sides",
        of_the_other_side,
        "mask_overlap",
    ),
    ("test_measures.py", "test_swapped_layers_are_seen", by_sums, "assert_frozen"),
    ("test_measures.py", "test_every_entry_has_one_fate", without_the_last, "update_dynamics"),
    ("test_measures.py", "test_a_cast_can_only_hide", casting_one_side, "open_pair"),
]


@pytest.mark.parametrize(("file", "name", "fault", "instead_of"), FAULTS)
def test_a_law_catches(file, name, fault, instead_of, law, monkeypatch):
    law(file, name)()
    owner = strategies if instead_of == "finetunes" else pytest_subnet
    monkeypatch.setattr(owner, instead_of, fault)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(file, name)()
