"""The nulls and their statistics, from counts alone: against scipy, brute force and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats.contingency import odds_ratio as scipy_odds_ratio

from pytest_subnet.findings.common.chance import (
    by_rows_and_columns,
    by_strata,
    hypergeometric,
    lift_interval,
    odds_ratio,
    pooled,
)

law = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@st.composite
def strata(draw, most=10**11):
    """Entries, those in a, in b and in both, of up to six strata: int64 `[4, strata]`."""
    columns = []
    for _ in range(draw(st.integers(1, 6))):
        numel = draw(st.integers(1, most))
        a, b = (draw(st.integers(0, numel)) for _ in range(2))
        columns.append((numel, a, b, draw(st.integers(max(0, a + b - numel), min(a, b)))))
    return np.array(columns, np.int64).T


def of_matrices(numel, a, b):
    numel, a, b = (np.asarray(each, np.int64) for each in (numel, a, b))
    return by_strata(numel, a, b, owner=np.arange(numel.size), tensors=numel.size)


def exact(numel, a, b):
    """Mean and variance of the hypergeometric distribution as fractions."""
    mean = Fraction(a * b, numel)
    if numel == 1:
        return mean, Fraction(0)
    return mean, mean * Fraction((numel - a) * (numel - b), numel * (numel - 1))


def test_mean_and_variance_are_those_of_scipy():
    mean, variance = hypergeometric(*(np.array([each]) for each in (5000, 400, 700)))
    expected = stats.hypergeom(5000, 400, 700)
    assert mean.item() == 56.0 == pytest.approx(expected.mean())
    assert variance.item() == pytest.approx(expected.var())
    assert variance.item() == pytest.approx(44.316, abs=5e-4)


@law
@given(strata())
def test_counts_of_any_size_give_the_fractions(columns):
    numel, a, b, _ = columns
    chance = of_matrices(numel, a, b)
    means, variances = zip(*(exact(*map(int, each)) for each in columns[:3].T), strict=True)
    assert chance.expected == pytest.approx(float(sum(means)), rel=1e-14)
    assert chance.variance == pytest.approx(float(sum(variances)), rel=1e-13)
    assert chance.variance_by_tensor == pytest.approx(
        [float(each) for each in variances], rel=1e-13
    )
    assert chance.ceiling == sum(min(int(x), int(y)) for x, y in zip(a, b, strict=True))
    assert chance.degenerate == sum(each == 0 for each in variances)
    together = pooled(numel, a, b)
    mean, variance = exact(*(int(each.sum()) for each in (numel, a, b)))
    assert together.expected == pytest.approx(float(mean), rel=1e-15)
    assert together.variance == pytest.approx(float(variance), rel=1e-15)
    assert together.by_tensor.sum() == pytest.approx(together.expected)


@law
@given(strata())
def test_a_full_or_empty_mask_leaves_exactly_nothing_beyond_chance(columns):
    numel, a, _, _ = columns
    for other in (numel, np.zeros_like(numel)):
        chance = of_matrices(numel, a, other)
        assert (chance.expected, chance.variance) == (np.minimum(a, other).sum(), 0)
        assert chance.degenerate == chance.strata


@law
@given(strata())
def test_pooled_differs_by_the_covariance_of_the_densities(columns):
    numel, a, b, _ = columns
    weight = numel / numel.sum()
    p, q = (each / numel for each in (a, b))
    covariance = (weight * (p - a.sum() / numel.sum()) * (q - b.sum() / numel.sum())).sum()
    beyond = of_matrices(numel, a, b).expected - pooled(numel, a, b).expected
    assert beyond / numel.sum() == pytest.approx(covariance, abs=1e-12)


def test_strata_are_added_up_by_tensor_and_those_without_entries_are_none():
    numel, a, b = (np.array(each) for each in ([4, 0, 6, 10], [2, 0, 3, 10], [2, 0, 2, 5]))
    chance = by_strata(numel, a, b, owner=np.array([0, 0, 2, 2]), tensors=3)
    assert chance.by_tensor.tolist() == [1.0, 0.0, 6.0]
    assert chance.expected == 7.0
    assert (chance.strata, chance.degenerate, chance.ceiling) == (3, 1, 2 + 2 + 5)


class TestTheExampleOfFourStrata:
    """Independent masks whose densities vary from matrix to matrix, alike in both."""

    numel = np.array([1000, 4000, 2000, 8000])
    a = np.array([500, 80, 200, 80])
    b = np.array([400, 120, 400, 80])

    def draw(self, times):
        random = np.random.default_rng(0)
        return random.hypergeometric(self.a, self.numel - self.a, self.b, (times, 4)).sum(axis=1)

    def test_strata_take_out_what_pooling_takes_for_overlap(self):
        both = self.draw(3000)
        chance, whole = of_matrices(self.numel, self.a, self.b), pooled(self.numel, self.a, self.b)
        z = (both - chance.expected) / math.sqrt(chance.variance)
        assert abs(z.mean()) < 0.06
        assert abs(z.std() - 1) < 0.04
        assert ((both - whole.expected) / math.sqrt(whole.variance)).mean() == pytest.approx(
            26, abs=0.5
        )
        assert (chance.expected - whole.expected) / self.numel.sum() == pytest.approx(
            0.01239, abs=5e-6
        )


def test_independent_masks_of_2000_pairs_have_z_of_mean_0_and_deviation_1():
    random = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        matrices = random.integers(4, 40)
        numel = random.integers(200, 20_000, matrices)
        a, b = (np.rint(numel * random.beta(0.4, 2.0, matrices)).astype(int) for _ in range(2))
        both = random.hypergeometric(a, numel - a, b).sum()
        chance = of_matrices(numel, a, b)
        found.append((both - chance.expected) / math.sqrt(chance.variance))
    assert abs(np.mean(found)) < 0.1
    assert abs(np.std(found) - 1) < 0.05


class TestRowsAndColumns:
    """A matrix with stripes, against shuffling all that Chung and Lu hold fixed on average."""

    @staticmethod
    def chance(a, b):
        counts = (np.array([each]) for each in (a.size, a.sum(), b.sum()))
        by_row = int(a.sum(axis=1) @ b.sum(axis=1))
        by_column = int(a.sum(axis=0) @ b.sum(axis=0))
        return by_rows_and_columns(*counts, products=[(by_row, by_column)])

    def test_entries_drawn_by_row_and_column_overlap_as_expected(self):
        random = np.random.default_rng(3)
        rows, columns = random.uniform(0.2, 1, (60, 1)), random.beta(0.3, 1.5, (1, 40))
        found, expected, by_matrix = 0, 0.0, 0.0
        for _ in range(300):
            a, b = (random.random((60, 40)) < 0.8 * rows * columns for _ in range(2))
            found += int((a & b).sum())
            expected += self.chance(a, b).expected
            by_matrix += a.sum() * b.sum() / a.size
        assert found / expected == pytest.approx(1, abs=0.02)
        assert found / by_matrix > 2

    def test_shuffled_rows_are_enriched_by_matrix_and_depleted_by_row_and_column(self):
        # The released script of arXiv 2504.15471 shuffles rows only: columns keep their counts.
        random = np.random.default_rng(11)
        density = 0.9 * np.sort(random.beta(0.25, 1.6, 40))
        a, b = (random.random((60, 40)) < density for _ in range(2))
        shuffled = [int((random.permutation(a) & random.permutation(b)).sum()) for _ in range(2000)]
        per_column = int(a.sum(axis=0) @ b.sum(axis=0)) / 60
        assert np.mean(shuffled) == pytest.approx(per_column, rel=0.005)
        assert self.chance(a, b).expected == pytest.approx(per_column, rel=0.02)
        assert of_matrices([a.size], [a.sum()], [b.sum()]).expected < per_column / 2

    def test_without_stripes_it_is_the_null_by_matrix(self):
        a = np.zeros((6, 8), bool)
        a[:, ::2] = True
        b = np.zeros((6, 8), bool)
        b[::2] = True
        chance = self.chance(a, b)
        assert chance.expected == of_matrices([48], [24], [24]).expected == 12
        assert (chance.variance, chance.variance_by_tensor) == (None, None)

    def test_a_tensor_without_rows_keeps_its_size_alone(self):
        counts = (np.array([each]) for each in (10, 5, 4))
        assert by_rows_and_columns(*counts, products=[None]).expected == 2.0


class TestOddsRatio:
    def test_one_stratum_is_the_cross_ratio(self):
        table = np.array([[30, 20], [10, 140]])
        counts = (np.array([each]) for each in (200, 50, 40, 30))
        expected = scipy_odds_ratio(table, kind="sample").statistic
        assert odds_ratio(*counts) == pytest.approx(expected)

    @law
    @given(strata(most=10**6))
    def test_strata_are_mantel_and_haenszel(self, columns):
        numel, a, b, both = (list(map(int, each)) for each in columns)
        rows = list(zip(numel, a, b, both, strict=True))
        agree = sum(Fraction(o * (n - x - y + o), n) for n, x, y, o in rows)
        differ = sum(Fraction((x - o) * (y - o), n) for n, x, y, o in rows)
        value = odds_ratio(*columns)
        if differ:
            assert value == pytest.approx(float(agree / differ), rel=1e-12)
        else:
            assert value == (math.inf if agree else None)

    def test_independent_masks_have_one_whatever_their_densities(self):
        case = TestTheExampleOfFourStrata
        random = np.random.default_rng(5)
        both = random.hypergeometric(case.a, case.numel - case.a, case.b, (500, 4))
        values = [odds_ratio(case.numel, case.a, case.b, each) for each in both]
        assert np.mean(values) == pytest.approx(1, abs=0.02)


class TestInterval:
    @staticmethod
    def covered(matrices, times):
        random = np.random.default_rng(7)
        hits = 0
        for _ in range(times):
            expected = random.choice([1e3, 4e3, 8e3], matrices)
            lifts = np.exp(random.normal(0, 0.3, matrices))
            interval = lift_interval(random.poisson(expected * lifts), expected)
            hits += interval.low <= math.exp(0.3**2 / 2) <= interval.high
        return hits / times, interval

    @pytest.mark.parametrize(
        ("matrices", "least"), [(6, 0.85), (12, 0.88), (32, 0.89), (128, 0.91)]
    )
    def test_it_covers_the_lift_about_as_often_as_it_says(self, matrices, least):
        share, interval = self.covered(matrices, 300)
        assert least <= share <= 0.98
        method = "bootstrap" if matrices >= 30 else "leave one out"
        assert (interval.method, interval.matrices) == (method, matrices)

    def test_leave_one_out_is_the_t_interval_of_the_jackknife(self):
        found, expected = np.array([10, 30, 20, 5]), np.array([8.0, 16.0, 20.0, 6.0])
        lift = found.sum() / expected.sum()
        without = [
            sum(found[j] for j in range(4) if j != i) / sum(expected[j] for j in range(4) if j != i)
            for i in range(4)
        ]
        error = math.sqrt(3 / 4 * sum((each - np.mean(without)) ** 2 for each in without))
        half = stats.t(3).ppf(0.975) * error
        interval = lift_interval(found, expected)
        assert interval[:2] == pytest.approx((max(0, lift - half), lift + half))

    def test_the_bootstrap_is_the_same_every_time_and_in_pieces(self, monkeypatch):
        random = np.random.default_rng(2)
        found, expected = random.poisson(50, 40), np.full(40, 50.0)
        first = lift_interval(found, expected)
        assert lift_interval(found, expected) == first
        monkeypatch.setattr("pytest_subnet.findings.common.chance._DRAWN_AT_ONCE", 7)
        assert lift_interval(found, expected) == first

    @pytest.mark.parametrize("telling", list(itertools.product([0, 2], [0, 5])))
    def test_tensors_in_which_nothing_is_expected_do_not_count(self, telling):
        some, none = telling
        expected = np.array([3.0] * some + [0.0] * none)
        assert lift_interval(np.arange(expected.size), expected) is None
