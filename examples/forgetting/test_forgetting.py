"""What holds of the run, whatever the machine: the numbers themselves are in the table.

The checkpoints come from `python examples/forgetting/train.py .demo`; the environment variable
`FORGETTING` names another folder than `.demo`.
"""

import os
import sys
from pathlib import Path

import pytest

from pytest_subnet import (
    assert_finite,
    assert_no_forgetting,
    assert_same_structure,
    assert_singular_values_stable,
    assert_singular_vector_rotation,
    assert_updated,
    open_pair,
    restore_singular_vectors,
)

sys.path.append(str(Path(__file__).parent))

from report import MATRICES, checkpoints, curve

FOLDER = Path(os.environ.get("FORGETTING", ".demo")) / "forgetting"
LEARNT = FOLDER / "learnt"


def tuned() -> Path:
    """The end of supervised tuning."""
    return [path for name, _, path in checkpoints(FOLDER) if name.startswith("sft")][-1]


def test_there_is_a_curve() -> None:
    """Of five checkpoints or more: the model that learnt both rules, tuning, reinforcement."""
    names = [name.split()[0] for name, _, _ in checkpoints(FOLDER)]
    assert len(names) >= 5
    assert set(names) == {"learnt", "sft", "rl"}


def test_every_projection_was_tuned() -> None:
    """Nothing lost, nothing broken, and every matrix of the blocks moved, in each checkpoint."""
    for _, _, path in checkpoints(FOLDER)[1:]:
        pair = open_pair(LEARNT, path)
        assert_same_structure(pair)
        assert_finite(pair)
        assert_updated(pair, MATRICES)


def test_a_release_could_not_pass() -> None:
    """A model that forgets fails the gate, and one that never knew anything does too."""
    with pytest.raises(AssertionError):
        assert_no_forgetting(curve(FOLDER), max_drop=0.02)


def test_restored_directions_are_the_bases_and_the_values_stay(tmp_path: Path) -> None:
    """The edit does what it says, on a model that was really trained."""
    restore_singular_vectors(
        LEARNT, tuned(), output=tmp_path / "restored", k_top=16, include=MATRICES
    )
    assert_singular_vector_rotation(
        open_pair(LEARNT, tmp_path / "restored"),
        k=16,
        max_angle_deg=0.01,
        include=MATRICES,
    )
    assert_singular_values_stable(
        open_pair(tuned(), tmp_path / "restored"), max_shift=1e-6, include=MATRICES
    )
