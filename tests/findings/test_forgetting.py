import math
import re
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from pytest_subnet.findings.forgetting.counts import (
    Point,
    _wilson,
    bounds_of_drop,
    fieller,
    fisher,
)
from pytest_subnet.findings.forgetting.finding import (
    assert_no_forgetting,
    assert_ood_restored,
    ood_forgetting,
    ood_restored,
)

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)
LLAMA = [(140, 41, 234), (620, 30, 234), (1100, 21, 234)]


def two_sided_by_hand(one: tuple[int, int], other: tuple[int, int]) -> Fraction:
    """All tables with these margins that are no likelier than the one seen."""
    (a, n), (b, m) = one, other
    right = a + b

    def likelihood(k: int) -> int:
        return comb(n, k) * comb(m, right - k)

    tables = [likelihood(k) for k in range(max(0, right - m), min(n, right) + 1)]
    return Fraction(sum(each for each in tables if each <= likelihood(a)), sum(tables))


@law
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_fisher_is_the_sum_over_tables(n: int, m: int, data: st.DataObject) -> None:
    one = data.draw(st.integers(0, n)), n
    other = data.draw(st.integers(0, m)), m
    assert fisher(one, other) == pytest.approx(float(two_sided_by_hand(one, other)), rel=1e-7)


def test_the_papers_counts() -> None:
    assert fisher((41, 234), (21, 234)) == pytest.approx(0.0092, abs=5e-5)
    assert fisher((21, 234), (36, 234)) == pytest.approx(0.047, abs=5e-4)
    assert fisher((40, 234), (46, 234)) == pytest.approx(0.55, abs=5e-3)


def test_llama_forgot_and_it_came_back() -> None:
    assert ood_forgetting(LLAMA).p_value < 0.05
    restored = assert_ood_restored((41, 234), (21, 234), (36, 234), min_fraction=0.7)
    assert restored.fraction == pytest.approx(0.75)


def test_qwens_restoring_may_be_luck() -> None:
    # Forty of 234 at the end of SFT, 46 after RL; however clear the forgetting had been.
    with pytest.raises(AssertionError) as failure:
        assert_ood_restored((70, 234), (40, 234), (46, 234), min_fraction=0.1)
    assert str(failure.value) == (
        "restored 20.00% meets 10.00%, but the restoring may be luck: p = 0.55, not below 0.05\n"
        "  peak       29.91% (70 of 234)\n"
        "  forgotten  17.09% (40 of 234), p = 0.0015 against the peak\n"
        "  restored   19.66% (46 of 234), p = 0.55 against forgotten\n"
        "  interval   -55.00% to 72.81% with confidence 95%\n"
        "  usually    too few trials for a difference of this size"
    )


def test_forgetting_that_may_be_luck_is_not_restored() -> None:
    with pytest.raises(AssertionError, match="but the forgetting may be luck"):
        assert_ood_restored((52, 234), (40, 234), (70, 234), min_fraction=0.5)


def test_too_little_came_back() -> None:
    with pytest.raises(AssertionError, match=r"^restored 75.00% is below the required 90.00%\n"):
        assert_ood_restored((41, 234), (21, 234), (36, 234), min_fraction=0.9)


def test_a_drop_that_is_there() -> None:
    with pytest.raises(AssertionError) as failure:
        assert_no_forgetting(LLAMA, max_drop=0.05)
    assert str(failure.value) == (
        "forgetting 8.55% is above the allowed 5.00%\n"
        "  peak       17.52% (41 of 234) at step 140, picked from 2 checkpoints\n"
        "  last       8.97% (21 of 234) at step 1100\n"
        "  at most    13.71% lost, with confidence 95%\n"
        "  p          0.018 (Fisher's exact test, times 2 checkpoints)\n"
        "  usually    training went on past its peak; release an earlier checkpoint\n"
        "  to accept  max_drop=0.14"
    )


def test_too_few_trials_fail_and_enough_pass() -> None:
    few = [(1, 41, 234), (2, 40, 234), (3, 41, 234)]
    with pytest.raises(AssertionError, match="too few trials") as failure:
        assert_no_forgetting(few, max_drop=0.05)
    enough = int(str(failure.value).split("about ")[1].split(" trials")[0].replace(",", ""))
    many = [(step, round(right * enough / 234), enough) for step, right, _ in few]
    assert assert_no_forgetting(many, max_drop=0.05).drop_upper < 0.05
    fewer = [(step, round(right * enough / 300), enough * 234 // 300) for step, right, _ in few]
    with pytest.raises(AssertionError, match="too few trials"):
        assert_no_forgetting(fewer, max_drop=0.05)


def test_a_peak_below_the_bound_says_nothing() -> None:
    with pytest.raises(AssertionError, match=r"^the peak of 1.71% is not above .* would pass\n"):
        assert_no_forgetting([(1, 3, 234), (2, 4, 234), (3, 4, 234)], max_drop=0.05)


def test_the_last_checkpoint_may_be_the_best() -> None:
    result = assert_no_forgetting([(1, 500, 1000), (2, 600, 1000), (3, 700, 1000)], max_drop=0.01)
    assert result.drop == pytest.approx(-0.1)
    assert result.drop_upper < 0


def test_steps_are_put_in_order() -> None:
    shuffled = [LLAMA[2], LLAMA[0], LLAMA[1]]
    assert ood_forgetting(shuffled) == ood_forgetting(LLAMA)


def test_the_same_items_say_more_than_others() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.6
    last = first ^ (rng.random(400) < 0.02)
    paired = ood_forgetting([(step, list(each)) for step, each in enumerate((first, first, last))])
    counts = [(step, int(each.sum()), 400) for step, each in enumerate((first, first, last))]
    assert paired.paired
    assert paired.drop == ood_forgetting(counts).drop
    assert paired.drop_upper - paired.drop < (ood_forgetting(counts).drop_upper - paired.drop) / 2


def test_mcnemar_counts_what_changed() -> None:
    before = [True] * 9 + [False] * 1 + [True] * 20
    after = [False] * 9 + [True] * 1 + [True] * 20
    result = ood_forgetting([(1, before), (2, after), (3, after)])
    # Ten items changed, nine of them for the worse: 2 (C(10, 9) + C(10, 10)) / 2^10.
    assert result.per_checkpoint[0].p_value == pytest.approx(22 / 1024)
    assert result.per_checkpoint[1].p_value == 1.0


def test_items_are_matched_by_name() -> None:
    by_name = [
        (1, {"a": True, "b": True, "c": False}),
        (2, {"c": False, "b": True, "a": True}),
        (3, {"b": False, "a": True, "c": False}),
    ]
    in_order = [(1, [True, True, False]), (2, [True, True, False]), (3, [True, False, False])]
    assert ood_forgetting(by_name) == ood_forgetting(in_order)


def test_picking_the_peak_costs() -> None:
    ten = [(step, 35, 234) for step in range(8)] + [(8, 45, 234), (9, 35, 234)]
    result = ood_forgetting(ten)
    assert result.p_value == pytest.approx(min(1, 9 * fisher((45, 234), (35, 234))))


def test_a_constant_rate_does_not_fire_more_often_than_alpha() -> None:
    rng = np.random.default_rng(0)
    for checkpoints in (5, 10, 20):
        draws = rng.binomial(234, 0.15, size=(400, checkpoints)).tolist()
        p_values = [fisher((max(row[:-1]), 234), (row[-1], 234)) for row in draws]
        corrected = sum(p_value * (checkpoints - 1) < 0.05 for p_value in p_values)
        assert corrected <= 400 * 0.05 + 2 * math.sqrt(400 * 0.05 * 0.95)
        assert sum(p_value < 0.05 for p_value in p_values) > corrected


@pytest.mark.parametrize("trials", [30, 100, 234])
@pytest.mark.parametrize(("before", "after"), [(0.5, 0.4), (0.2, 0.15), (0.9, 0.9), (0.175, 0.09)])
def test_the_bound_covers(trials: int, before: float, after: float) -> None:
    """By enumeration: how often the upper bound is at or above the true drop."""
    ks = np.arange(trials + 1)
    one, other = binom.pmf(ks, trials, before), binom.pmf(ks, trials, after)
    likely = [(a, b) for a in ks for b in ks if one[a] * other[b] > 1e-7]
    step = max(1, len(likely) // 1500)
    total = covered = 0.0
    for a, b in likely[::step]:
        weight = one[a] * other[b]
        upper = bounds_of_drop(Point(0, int(a), trials), Point(1, int(b), trials), 0.05)[1]
        total += weight
        covered += weight * (upper >= before - after)
    assert 0.93 <= covered / total <= 0.98


@law
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.2, 0.05, 0.01]))
def test_rates_have_scipys_score_interval(trials: int, share: float, alpha: float) -> None:
    successes = round(trials * share)
    interval = binomtest(successes, trials).proportion_ci(1 - 2 * alpha, method="wilson")
    low, high = _wilson((successes, trials), alpha)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_newcombes_own_examples() -> None:
    # Statistics in Medicine 17 (1998): 56/70 - 48/80, 95 %: 0.0524 to 0.3339 by method 10.
    low, high = bounds_of_drop(Point(0, 56, 70), Point(1, 48, 80), 0.025)
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_fiellers_interval_covers() -> None:
    rng = np.random.default_rng(0)
    peak, low, back = (rng.binomial(2000, rate, size=1000) for rate in (0.5, 0.3, 0.45))
    inside = 0
    for a, b, c in zip(peak.tolist(), low.tolist(), back.tolist(), strict=True):
        ends = fieller((a, 2000), (b, 2000), (c, 2000), 0.05)
        assert ends[0] is not None
        assert ends[1] is not None
        inside += ends[0] <= 0.75 <= ends[1]
    assert 0.93 <= inside / 1000 <= 0.97


def test_an_interval_of_nothing_shown_is_open() -> None:
    result = ood_restored((22, 100), (20, 100), (21, 100))
    assert result.interval == (None, None)
    assert "? to ? with confidence 95%" in result.table()


@pytest.mark.parametrize(
    ("curve", "text"),
    [
        (LLAMA[:2], "2 checkpoints of at least 3: a peak is one among others"),
        ([], "0 checkpoints of at least 3: a peak is one among others"),
        ([(1, 0, 0), *LLAMA[:2]], "step 1: trials=0 shows nothing"),
        ([(1, 5, 4), *LLAMA[:2]], "step 1: successes=5 of trials=4"),
        ([(1, -1, 4), *LLAMA[:2]], "step 1: successes=-1 of trials=4"),
        ([LLAMA[0], *LLAMA[:2]], "step 140 is there twice"),
        (
            [(1, [True]), (2, [True, False]), (3, [True])],
            "step 1 has 1 items and step 2 2; paired outcomes are of the same items",
        ),
        ([(1, []), (2, []), (3, [])], "step 1: no items show nothing"),
        (
            [(1, [True]), (2, 1, 1), (3, [True])],
            "some checkpoints have counts and some outcomes; give one form",
        ),
        (
            [(1, {"a": True}), (2, {"b": True}), (3, {"a": True})],
            "step 2 was tried on other items than the first checkpoint; paired outcomes are of the "
            "same items",
        ),
    ],
)
def test_curves_that_are_none(curve: list, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ood_forgetting(curve)


@pytest.mark.parametrize(
    ("curve", "text"),
    [
        ("curve", "a curve is a list of (step, successes, trials) or (step, outcomes), not str"),
        (
            [(1, 0.2, 234), *LLAMA[:2]],
            "step 1: successes=0.2 is not an integer; a rate does not say of how many",
        ),
        ([(1, True, 234), *LLAMA[:2]], "step 1: successes=True is not an integer"),
        ([(1.5, 1, 2), *LLAMA[:2]], "step 1.5 is not an integer"),
        ([(1,), *LLAMA[:2]], "(1,) is neither (step, successes, trials) nor (step, outcomes)"),
        ([(1, "yes"), (2, "yes"), (3, "yes")], "step 1: 'yes' are no outcomes"),
        ([(1, [1]), (2, [1]), (3, [1])], "step 1: outcome 1 is not a boolean"),
    ],
)
def test_curves_of_the_wrong_type(curve: list, text: str) -> None:
    with pytest.raises(TypeError) as error:
        ood_forgetting(curve)
    assert str(error.value) == text


def test_bounds_that_are_none() -> None:
    with pytest.raises(ValueError, match="max_drop=5 is not a fraction in"):
        assert_no_forgetting(LLAMA, max_drop=5)
    with pytest.raises(ValueError, match="max_drop=0: no number of trials can show"):
        assert_no_forgetting(LLAMA, max_drop=0)
    with pytest.raises(ValueError, match=r"alpha=0.5 is not in \(0, 0.5\)"):
        ood_forgetting(LLAMA, alpha=0.5)
    with pytest.raises(TypeError, match="alpha='a' is not a number"):
        ood_forgetting(LLAMA, alpha="a")
    with pytest.raises(ValueError, match="min_fraction=0 is not a finite number above 0"):
        assert_ood_restored((41, 234), (21, 234), (36, 234), min_fraction=0)
    with pytest.raises(ValueError, match=r"peak 9.00% is not above forgotten 9.00%"):
        ood_restored((9, 100), (9, 100), (12, 100))
    with pytest.raises(TypeError, match=r"peak=0.175 is not \(successes, trials\)"):
        ood_restored(0.175, (9, 100), (12, 100))


def test_what_reports_store() -> None:
    stored = ood_forgetting(LLAMA).to_dict()
    assert stored["finding"] == "ood_forgetting"
    assert stored["steps"] == [140, 620, 1100]
    assert stored["drop"] == pytest.approx(20 / 234)
    restored = ood_restored((41, 234), (21, 234), (36, 234)).to_dict()
    assert restored["fraction"] == pytest.approx(0.75)
    assert "17.52%" in ood_forgetting(LLAMA).table()
