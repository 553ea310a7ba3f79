"""The closed forms of rounding against enumeration, simulation and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from pytest_subnet.findings.rank.rounding import (
    GAPS,
    LOWEST_GAP,
    _relative_energy,
    densities,
    exponents_of,
    gaps_around,
    solve_step_sizes,
    visible,
)
from pytest_subnet.scan.found import STRATA, stratum_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ONE = np.zeros(1, np.intp)  # one sample, and one tensor that it is of
SCALES = [1e-6, 1e-5, 1e-4, 1e-3]


def stored_energy(counts, step_size):
    """Σ (stored difference)² to expect of an update d ~ N(0, step_size²), gap by gap."""
    gaps = [(int(count), 2.0 ** (LOWEST_GAP + i)) for i, count in enumerate(counts) if count]
    return sum(n / 2 * gap * gap * _relative_energy(step_size / gap) for n, gap in gaps)


def gaps_of(weight):
    name = str(weight.dtype).removeprefix("torch.")
    words = weight.view(torch.int16).numpy().view(np.uint16).ravel()
    return gaps_around(words, [words.size], name)[0]


def simulate(dtype, scale, seed=0):
    """A base on the grid, and it moved by d ~ N(0, scale²) and rounded."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(1024, 1024, generator=generator) * 0.02).to(dtype)
    step = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale
    return weight, (weight.double() + step).to(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_gaps_are_those_between_neighbouring_values(name):
    """Every finite value of the dtype, against the differences of the sorted values."""
    words = torch.arange(0, 1 << 15, dtype=torch.int16).view(DTYPES[name])
    values = words[words.isfinite()].double().numpy()
    between = np.diff(values)
    above = np.append(between[:-1], between[-2:])  # the largest value: as if the grid went on
    below = np.append(between[0], between)  # below zero as above it
    # A value under a power of two has the next binade's grid above it; half of its own gap counts.
    above = np.where(values > 0, 2.0 ** np.floor(np.log2(np.maximum(above, 1e-300))), above)
    expected = np.zeros(GAPS, np.int64)
    for gap in np.concatenate([above, below]):
        expected[round(math.log2(gap)) - LOWEST_GAP] += 1
    assert np.array_equal(gaps_of(words), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", DTYPES)
def test_the_stored_energy_is_that_of_a_simulation(name, scale):
    weight, moved = simulate(DTYPES[name], scale)
    energy = float((moved.double() - weight.double()).square().sum())
    assert stored_energy(gaps_of(weight), scale) == pytest.approx(energy, rel=0.02)


@pytest.mark.parametrize("atol", [0.0, 1e-5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", DTYPES)
def test_the_density_is_that_of_a_simulation(name, scale, atol):
    weight, moved = simulate(DTYPES[name], scale, seed=1)
    shown = (moved.double() - weight.double()).abs() > atol
    predicted = densities(gaps_of(weight)[None], np.array([scale]), ONE, atol)[0]
    spread = math.sqrt(max(predicted, 1e-12) / weight.numel())
    assert predicted == pytest.approx(float(shown.double().mean()), abs=5 * spread)


@pytest.mark.parametrize("scale", [1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_the_step_size_is_solved_as_brentq_solves_it(scale):
    counts = gaps_of(simulate(torch.bfloat16, 0.0)[0])
    energy = 2 * stored_energy(counts, scale) / counts.sum()

    def miss(log_scale):
        return math.log(2 * stored_energy(counts, math.exp(log_scale)) / counts.sum() / energy)

    # The first weights to move have tiny gaps: below 1e-9 nothing would be stored.
    exact = math.exp(brentq(miss, math.log(1e-8), math.log(10)))
    assert exact == pytest.approx(scale, rel=1e-6)
    assert solve_step_sizes(counts[None], np.array([energy]), ONE)[0] == pytest.approx(
        scale, rel=1e-3
    )


@given(st.integers(-30, 5), st.floats(1e-6, 1e4))
def test_a_single_gap_has_the_step_size_that_gives_its_energy_back(gap, relative_energy):
    counts = np.zeros((1, GAPS), np.int64)
    counts[0, gap - LOWEST_GAP] = 2
    energy = relative_energy * 4.0**gap
    solved = solve_step_sizes(counts, np.array([energy]), ONE)
    assert stored_energy(counts[0], solved[0]) == pytest.approx(energy, rel=2e-3)


def test_tensors_are_solved_together_as_each_alone():
    counts = np.stack([gaps_of(simulate(dtype, 0.0)[0]) for dtype in DTYPES.values()])
    energies = np.array([1e-10, 1e-8])
    together = solve_step_sizes(counts, energies, np.arange(2))
    alone = [solve_step_sizes(counts[i : i + 1], energies[i : i + 1], ONE)[0] for i in range(2)]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_a_sample_without_a_finite_weight_has_no_answer():
    counts = np.zeros((1, GAPS), np.int64)
    assert math.isnan(solve_step_sizes(counts, np.array([1e-10]), ONE)[0])
    assert math.isnan(densities(counts, np.array([1e-5]), ONE)[0])


@pytest.mark.parametrize("step", [1e-6, 1e-5, 2e-5])
def test_what_a_step_can_move_is_that_of_a_simulation(step):
    """The table of one step of ± the learning rate, on the grid and from float32 masters."""
    generator = torch.Generator().manual_seed(3)
    master = torch.randn(1024, 1024, generator=generator) * 0.02
    weight = master.bfloat16()
    signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    on_grid = ((weight.double() + signs * step).bfloat16() != weight).double().mean()
    from_master = ((master.double() + signs * step).bfloat16() != weight).double().mean()
    counts = gaps_of(weight).astype(np.float64)
    assert visible(counts, step, float32_master=False) == pytest.approx(float(on_grid), rel=0.02)
    assert visible(counts, step, float32_master=True) == pytest.approx(float(from_master), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents_are_those_that_masks_are_counted_by(dtype):
    words = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16))
    strata = np.bincount(stratum_of(words, STRATA[dtype]), minlength=STRATA[dtype]).reshape(-1, 2)
    first, everything, powers = exponents_of(words, [words.size], dtype)
    assert first == 0
    assert everything.tolist() == [strata.sum(axis=1).tolist()]
    assert powers.tolist() == [strata[:, 1].tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_counted_apart(dtype):
    words = np.random.default_rng(0).integers(0, 1 << 16, 3000, dtype=np.uint16)
    together = gaps_around(words, [1000, 1, 0, 1999], dtype)
    apart = [
        gaps_around(part, [part.size], dtype)[0] for part in np.split(words, [1000, 1001, 1001])
    ]
    assert together.tolist() == np.stack(apart).tolist()
