"""What of the spectra holds whatever the machine; `spectra.py` prints the numbers themselves.

In large part it says what the numbers do not show: beside each run stands noise of its size.
"""

import sys
from pathlib import Path

import pytest

from pytest_subnet import (
    ModelPair,
    assert_displacement_rank,
    assert_off_principal,
    assert_singular_values_stable,
    assert_singular_vector_rotation,
    consensus_jaccard,
    displacement_rank,
    open_pair,
    singular_rotation,
    singular_shift,
    task_vector_cosine,
    update_geometry,
    update_mask,
    update_rank,
)

sys.path.append(str(Path(__file__).parent))

from noise import MATRICES, noise_like

RUNS = ("sft", "dpo", "grpo")
RL = ("dpo", "grpo")
K = 16


@pytest.fixture(scope="module")
def runs(pytestconfig: pytest.Config) -> dict[str, ModelPair]:
    """Return the demo's three runs from one base."""
    demo = pytestconfig.rootpath / ".demo"
    assert demo.is_dir(), "run `python examples/release/tune.py .demo` first"
    return {name: open_pair(demo / "base", demo / name) for name in RUNS}


@pytest.fixture(scope="module")
def twins(runs: dict[str, ModelPair]) -> dict[str, ModelPair]:
    """Return noise of each run's size beside the base."""
    return {name: noise_like(pair, seed=seed) for seed, (name, pair) in enumerate(runs.items())}


@pytest.mark.parametrize("name", RL)
def test_the_norms_alone_prove_that_the_values_of_rl_are_stable(
    runs: dict[str, ModelPair], name: str
) -> None:
    """Nothing is decomposed, and of noise as large it is proven as well."""
    found = assert_singular_values_stable(runs[name], max_shift=0.001, include=MATRICES)
    assert found.proven_by_norms == len(found.per_tensor)


def test_values_move_further_than_noise_would_move_them_in_the_sft_run(
    runs: dict[str, ModelPair], twins: dict[str, ModelPair]
) -> None:
    """By 0.2 % of the spectrum: "stable", and more than twice what its size alone gives."""
    run, noise = (singular_shift(pairs["sft"], include=MATRICES) for pairs in (runs, twins))
    assert 1.5 * noise.mean_shift < run.mean_shift < 0.01


@pytest.mark.parametrize("name", RL)
def test_rl_turned_little_more_than_noise(runs: dict[str, ModelPair], name: str) -> None:
    """Vectors do rotate, so that the bare claim holds; half as far again as noise they do not."""
    found = assert_singular_vector_rotation(
        runs[name], k=K, min_angle_deg=1e-4, null=None, include=MATRICES
    )
    assert found.mean_deg < 0.1
    with pytest.raises(AssertionError, match=r"^rotation is .* times that of the null, below"):
        assert_singular_vector_rotation(runs[name], k=K, min_excess=1.5, include="*q_proj.weight")


def test_an_update_without_meaning_shows_the_papers_geometry(
    runs: dict[str, ModelPair], twins: dict[str, ModelPair]
) -> None:
    """Off the principal weights and on the small ones, until rounding is taken off."""
    for pair in (runs["grpo"], twins["grpo"]):
        assert_off_principal(
            pair, max_principal_lift=0.5, min_low_magnitude_lift=3, null=None, include=MATRICES
        )
        with pytest.raises(AssertionError, match=r"^principal lift .* and rounding\)"):
            assert_off_principal(pair, max_principal_lift=0.9, include=MATRICES)


@pytest.mark.parametrize("name", RUNS)
def test_rounding_explains_where_each_update_lies(runs: dict[str, ModelPair], name: str) -> None:
    """To within a point of each share."""
    found = update_geometry(runs[name], include=MATRICES)
    for share in (found.principal, found.low_magnitude):
        assert share.share == pytest.approx(share.by_rounding, abs=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_what_noise_does_not_show(
    runs: dict[str, ModelPair], twins: dict[str, ModelPair], name: str
) -> None:
    """Few directions, and the base's leading ones among them: that is of the training."""
    run, noise = (
        singular_rotation(p[name], k=K, null=None, include=MATRICES) for p in (runs, twins)
    )
    assert run.turn_energy > 3 * run.turn_energy_null
    assert noise.turn_energy == pytest.approx(noise.turn_energy_null, rel=0.2)
    # Whichever it is, next to all of it turns: 15 of 16 parts would in noise.
    for found in (run, noise):
        assert found.turn_energy / (found.turn_energy + found.value_energy) > 0.85
    ranks = [update_rank(pairs[name], include=MATRICES) for pairs in (runs, twins)]
    assert min(each.ratio for each in ranks) > 0.99
    assert 2 * ranks[0].stable_rank < ranks[1].stable_rank


def test_no_matrix_has_a_structure_and_no_rl_update_can_be_said_to(
    runs: dict[str, ModelPair],
) -> None:
    """Rank 0 is what is left of an update that is smaller than rounding, not a finding."""
    for operator in ("toeplitz", "hankel"):
        with pytest.raises(AssertionError, match=r"^displacement rank 256 is above the allowed 4"):
            assert_displacement_rank(
                runs["grpo"], max_rank=4, operator=operator, include="*gate_proj.weight"
            )
        update = displacement_rank(
            runs["grpo"], of="update", operator=operator, include="*gate_proj.weight"
        )
        assert update.rank == 0


def test_the_runs_have_next_to_nothing_in_common(runs: dict[str, ModelPair]) -> None:
    """Ten times the chance of their masks by matrix is none at all by exponent."""
    for other in ("sft", "dpo"):
        found = task_vector_cosine(runs[other], runs["grpo"], include=MATRICES)
        assert abs(found.cosine) < 0.1
    masks = [update_mask(pair, include=MATRICES) for pair in runs.values()]
    assert consensus_jaccard(masks, null="matrix").lift > 5
    assert consensus_jaccard(masks, null="exponent").lift == pytest.approx(1, abs=0.05)
