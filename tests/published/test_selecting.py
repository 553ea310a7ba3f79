"""Choosing among published numbers: by name, and by distance among comparable ones."""

import math

import pytest

from pytest_subnet import SelectionError
from pytest_subnet.published import (
    NUMBERS,
    SPARSITIES,
    nearest,
    published_numbers,
    published_sparsities,
)
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance

SIMPO = "princeton-nlp/Llama-3-Instruct-8B-SimPO"


def test_rows_are_chosen_by_algorithm_and_source():
    assert {row.algorithm for row in published_sparsities(algorithm="simpo")} == {"SimPO"}
    assert len(published_sparsities(algorithm="KTO", source="arXiv:2505.11711")) == 6
    assert published_sparsities() == SPARSITIES
    assert published_numbers() == NUMBERS


@pytest.mark.parametrize(
    ("choose", "says"),
    [
        (
            lambda: published_sparsities(algorithm="GRPPO"),
            "nothing is published here for algorithm='GRPPO'; did you mean grpo?; there is dapo, ",
        ),
        (
            lambda: published_sparsities(source="2507.17107"),
            "nothing is published here for source='2507.17107'; did you mean 2505.11711?",
        ),
        (lambda: published_numbers(quantity="\x1b[2J"), r"for quantity='\x1b[2J'; there is "),
        (lambda: nearest(0.5, algorithm="none at all"), "for algorithm='none at all'"),
    ],
)
def test_what_is_not_published_is_said_with_what_is(choose, says):
    with pytest.raises(SelectionError) as caught:
        choose()
    assert says in str(caught.value)


@pytest.mark.parametrize("algorithm", [None, *sorted({row.algorithm for row in SPARSITIES})])
@pytest.mark.parametrize("tolerance", [SAME_BITS, PAPER, Tolerance(rtol=1e-3), Tolerance(atol=1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 1.0])
def test_the_nearest_are_the_comparable_ones_in_order(algorithm, tolerance, sparsity):
    rows = nearest(sparsity, algorithm=algorithm, tolerance=tolerance, count=200)
    same = [row for row in rows if is_comparable(row, tolerance)]
    for part, of in ((rows[: len(same)], same), (rows[len(same) :], None)):
        assert of is None or list(part) == of
        distances = [abs(row.sparsity - sparsity) for row in part]
        assert distances == sorted(distances)
    tuned = [(row.source, row.algorithm, row.tuned) for row in rows if row.tuned and row.base]
    assert len(set(tuned)) == len(tuned)
    assert rows[:3] == nearest(sparsity, algorithm=algorithm, tolerance=tolerance)


def is_comparable(row, tolerance):
    by_bits = (SAME_BITS, Tolerance(rtol=1e-3))
    return row.dtype == "bfloat16" and (
        row.tolerance == tolerance or (row.tolerance in by_bits and tolerance in by_bits)
    )


def test_of_several_tolerances_the_closest_is_shown():
    for tolerance, atol in ((SAME_BITS, 1e-8), (Tolerance(atol=2e-7), 1e-7), (PAPER, 1e-5)):
        rows = nearest(0.5, algorithm="PPO", tolerance=tolerance)
        assert [row.tolerance.atol for row in rows] == [atol]


def test_the_mislabelled_row_gives_way_to_the_right_one():
    rows = nearest(0.865, algorithm="SimPO", tolerance=PAPER, count=10)
    (instruct,) = [row for row in rows if row.tuned == SIMPO]
    assert (instruct.table, instruct.sparsity) == ("Table 6", 0.7642)


@pytest.mark.parametrize(
    ("sparsity", "count"), [(1.1, 3), (-0.1, 3), (70, 3), (math.nan, 3), (0.5, 0)]
)
def test_what_is_no_fraction_is_refused(sparsity, count):
    with pytest.raises(ValueError, match=r"sparsity=|count="):
        nearest(sparsity, count=count)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"algorithm": 5}, "algorithm takes a name, not int"),
        ({"source": 5}, "source takes a paper's number as text, not int"),
    ],
)
def test_what_is_no_name_is_an_error(wrong, says):
    with pytest.raises(TypeError, match=says):
        published_sparsities(**wrong)


@pytest.mark.parametrize("count", [1.5, True])
def test_a_count_is_a_whole_number(count):
    with pytest.raises(TypeError, match="is no whole number"):
        nearest(0.5, count=count)
