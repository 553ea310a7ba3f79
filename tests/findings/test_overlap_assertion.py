"""`assert_mask_overlap`: its verdict and every word of its failures."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pytest_subnet import PairMismatchError, SelectionError, UpdateMask
from pytest_subnet.findings.overlap.finding import assert_mask_overlap, mask_overlap
from pytest_subnet.masks.bits import MemoryBits, pack
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata


def run(of, what):
    """A mask of matrices with entries from `start` to `end` by name."""
    entries = {}
    for name, (numel, start, end) in of.items():
        entries[name] = np.zeros((1, numel), bool)
        entries[name][0, start:end] = True
    return UpdateMask.of(entries, what=what)


@pytest.fixture
def masks():
    """Two masks of three matrices with 100 entries, whose lift is 2.5, 1 and 0.5."""
    a = {name: (100, 0, 20) for name in ("q", "k", "v")}
    b = {"q": (100, 10, 30), "k": (100, 16, 36), "v": (100, 18, 38)}
    return run(a, "run 1"), run(b, "run 2")


def test_it_holds_and_returns_what_was_measured(masks):
    result = assert_mask_overlap(*masks, min_lift=1.3, min_kappa=0.08, max_jaccard=0.16)
    assert result == mask_overlap(*masks)
    bare = {"min_jaccard": 0.15, "min_one_sided": 0.26, "null": None}
    assert assert_mask_overlap(*masks, **bare) == mask_overlap(*masks, null=None)


def test_a_bound_equal_to_the_number_holds(masks):
    result = mask_overlap(*masks)
    assert_mask_overlap(*masks, min_lift=result.lift, min_kappa=result.kappa)
    assert_mask_overlap(*masks, min_jaccard=result.jaccard, max_jaccard=result.jaccard, null=None)
    assert_mask_overlap(*masks, min_one_sided=result.one_sided, null=None)


def test_too_small_a_lift_says_beside_what_and_where(masks, fails_with):
    with fails_with("""
        overlap lift 1.33 is below the required 2 (null "matrix")
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          chance     12.0 expected by matrix   (z 1.436, kappa 0.08333, odds ratio 1.588)
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          interval   lift 0 to 3.919 with 95 % confidence (leave one out, 3 matrices)
          worst      v  Jaccard 5.26%   lift 0.5  (bool[1,100])
                     k  Jaccard 11.11%  lift 1    (bool[1,100])
          usually    runs that moved other parts, or masks of other densities than before
          to accept  min_lift=1.33
    """):
        assert_mask_overlap(*masks, min_lift=2)
    assert_mask_overlap(*masks, min_lift=1.33)


def test_too_small_a_kappa(masks, fails_with):
    with fails_with("""
        overlap kappa 0.0833 is below the required 0.3 (null "pooled")
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          chance     12.0 expected over the whole model   (z 1.441, kappa 0.08333, odds ratio 1.62)
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          interval   lift 0 to 3.919 with 95 % confidence (leave one out, 3 matrices)
          worst      v  Jaccard 5.26%  lift 0.5  (bool[1,100])
          usually    runs that moved other parts, or masks of other densities than before
          to accept  min_kappa=0.083
    """):
        assert_mask_overlap(*masks, min_kappa=0.3, null="pooled")


def test_too_small_a_share_of_the_union(masks, fails_with):
    with fails_with("""
        overlap Jaccard 15.38% is below the required 20.00%
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          worst      v  Jaccard 5.26%   (bool[1,100])
                     k  Jaccard 11.11%  (bool[1,100])
          usually    runs that moved other parts, or masks of other densities than before
          to accept  min_jaccard=0.15
    """):
        assert_mask_overlap(*masks, min_jaccard=0.2, null=None)


def test_a_share_that_chance_reaches_alone_is_no_evidence(masks, fails_with):
    with fails_with("""
        overlap Jaccard 15.38%: chance alone gives 11.11%, so that the required 10.00% says nothing (null "matrix")
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          chance     12.0 expected by matrix   (z 1.436, kappa 0.08333, odds ratio 1.588)
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          interval   lift 0 to 3.919 with 95 % confidence (leave one out, 3 matrices)
          usually    runs that moved other parts, or masks of other densities than before
          to accept  null=None, which asserts the bare number
    """):  # noqa: E501
        assert_mask_overlap(*masks, min_jaccard=0.1)
    assert_mask_overlap(*masks, min_jaccard=0.1, null=None)


def test_a_share_that_luck_explains_is_no_evidence(masks, fails_with):
    with fails_with("""
        overlap Jaccard 15.38%: chance alone gives 11.11%, and z 1.44 is below the 2 that is clear of luck (null "matrix")
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          chance     12.0 expected by matrix   (z 1.436, kappa 0.08333, odds ratio 1.588)
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          interval   lift 0 to 3.919 with 95 % confidence (leave one out, 3 matrices)
          usually    runs that moved other parts, or masks of other densities than before
          to accept  null=None, which asserts the bare number
    """):  # noqa: E501
        assert_mask_overlap(*masks, min_jaccard=0.15)
    with pytest.raises(AssertionError, match=r"z 1\.44 is below the 2 that"):
        assert_mask_overlap(*masks, min_one_sided=0.26)
    assert_mask_overlap(*masks, min_jaccard=0.15, null="rowcol")  # which has no z


@pytest.mark.parametrize("bound", [{"min_jaccard": 0.334}, {"min_one_sided": 0.501}])
def test_a_share_is_held_against_two_standard_deviations(bound):
    def overlap(both):
        a = run({"w": (10_000, 0, 5000)}, "a")
        return assert_mask_overlap(
            a, run({"w": (10_000, 5000 - both, 10_000 - both)}, "b"), **bound
        )

    with pytest.raises(AssertionError, match=r"z 1\.9\d+ is below the 2 that is clear of luck"):
        overlap(2549)
    assert overlap(2551).z > 2
    (name,) = bound
    a, b = run({"w": (10_000, 0, 5000)}, "a"), run({"w": (10_000, 2400, 7400)}, "b")
    with pytest.raises(AssertionError, match=rf"to accept  {name}=0\.\d+, or null=None"):
        assert_mask_overlap(a, b, **{name: 0.3})


def test_what_is_below_chance_is_offered_the_bare_number_alone():
    a, b = run({"w": (100, 0, 50)}, "a"), run({"w": (100, 30, 80)}, "b")
    with pytest.raises(
        AssertionError, match=r"Jaccard 25\.00%: chance alone gives 33\.33%"
    ) as caught:
        assert_mask_overlap(a, b, min_jaccard=0.2)
    assert str(caught.value).splitlines()[-1] == (
        "  to accept  null=None, which asserts the bare number"
    )


@pytest.mark.parametrize("larger", ["a", "b"])
def test_the_smaller_one_sided_share_is_held_against_the_bound(larger):
    masks = [run({"w": (100, 0, 40)}, "large"), run({"w": (100, 30, 40)}, "small")]
    a, b = masks if larger == "a" else masks[::-1]
    assert assert_mask_overlap(a, b, min_one_sided=0.25).one_sided == 0.25
    with pytest.raises(AssertionError) as caught:
        assert_mask_overlap(a, b, min_one_sided=0.3)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f'overlap one-sided share of {larger} 25.00% is below the required 30.00% (null "matrix")'
    )
    assert lines[-1] == "  to accept  min_one_sided=0.25"
    with pytest.raises(AssertionError, match=r"25\.00%: chance alone gives 10\.00%, so that"):
        assert_mask_overlap(a, b, min_one_sided=0.1)


def test_too_large_a_share_of_the_union(masks, fails_with):
    with fails_with("""
        overlap Jaccard 15.38% is above the allowed 10.00%
          a          run 1   (60 entries, density 20.00%)
          b          run 2   (60 entries, density 20.00%)
          covers     bool, 3/3 tensors, 300 entries
          overlap    16 in both: 26.67% of a, 26.67% of b, Jaccard 15.38%
          chance     12.0 expected by rows and columns of each matrix   (z unknown, kappa 0.08333, odds ratio by matrix 1.588)
          lifts      matrix 1.333, rowcol 1.333, pooled 1.333
          interval   lift 0 to 3.919 with 95 % confidence (leave one out, 3 matrices)
          worst      q  Jaccard 33.33%  lift 2.5  (bool[1,100])
                     k  Jaccard 11.11%  lift 1    (bool[1,100])
          usually    denser masks than before, or two runs that moved the same part
          to accept  max_jaccard=0.16
    """):  # noqa: E501
        assert_mask_overlap(*masks, max_jaccard=0.1, null="rowcol")


def test_two_masks_that_never_meet_can_be_held_apart():
    a, b = run({"w": (100, 0, 30)}, "a"), run({"w": (100, 30, 60)}, "b")
    assert assert_mask_overlap(a, b, max_jaccard=0).jaccard == 0
    with pytest.raises(AssertionError, match=r"\Aoverlap lift 0 is below the required 1") as caught:
        assert_mask_overlap(a, b, min_lift=1)
    assert "to accept" not in str(caught.value)


def test_rounding_is_named_where_it_is_what_is_left_out(fails_with):
    def mask(entries, what):
        entries = np.array([entries], bool)
        strata = Strata(np.array([0, 4, 12]), np.array([0, 4, entries.sum() - 4]))
        info = MaskTensor("w\x1b[31m", (1, 16), "bfloat16", int(entries.sum()))
        origin = Origin(what, "same bits", "f00d")
        return UpdateMask([info], MemoryBits(pack(entries)), origin, {"w\x1b[31m": strata})

    a = mask([1] * 4 + [1, 1, 0] + [0] * 9, "base -> run 1")
    b = mask([1] * 4 + [0, 1, 1] + [0] * 9, "base -> run 2")
    with fails_with(r"""
        overlap lift 1.15 is below the required 1.5 (null "exponent")
          a          base -> run 1 (same bits)   (6 entries, density 37.50%)
          b          base -> run 2 (same bits)   (6 entries, density 37.50%)
          covers     bf16, 1/1 tensor, 16 entries
          overlap    5 in both: 83.33% of a, 83.33% of b, Jaccard 71.43%
          chance     4.3 expected by matrix and exponent of the base weight   (z 1.327, kappa 0.4, odds ratio by matrix 45)
          lifts      exponent 1.154, matrix 2.222, rowcol 2.222, pooled 2.222
          strata     1 of 2 have a mask empty or full: left to no chance, and out of z
          worst      w\x1b[31m  Jaccard 71.43%  lift 1.15  (bf16[1,16])
          usually    two runs that share their base and little else: rounding lets the same
                     small weights flip in both, which other nulls take for overlap
          to accept  min_lift=1.15
    """):  # noqa: E501
        assert_mask_overlap(a, b, min_lift=1.5)
    assert_mask_overlap(a, b, min_lift=1.5, null="matrix")


@pytest.mark.parametrize(
    "bound", [{"min_lift": 0.5}, {"min_kappa": 0.0}, {"min_jaccard": 0.1}, {"min_one_sided": 0.1}]
)
@pytest.mark.parametrize("null", ["auto", "matrix", "rowcol", "pooled"])
def test_saturated_masks_cannot_be_judged(bound, null):
    a, b = run({"w": (100, 0, 100)}, "a"), run({"w": (100, 0, 30)}, "b")
    (name,) = bound
    with pytest.raises(SelectionError) as caught:
        assert_mask_overlap(a, b, **bound, null=null)
    assert str(caught.value).startswith(f"{name} cannot be judged: the masks are saturated\n")
    assert assert_mask_overlap(a, b, max_jaccard=0.5, null=null).saturated
    assert assert_mask_overlap(a, b, min_jaccard=0.2, null=None).jaccard == 0.3


def test_what_saturated_masks_say(masks):
    a, b = run({"w": (100, 0, 100)}, "run 1"), run({"w": (100, 0, 30)}, "run 2")
    with pytest.raises(SelectionError) as caught:
        assert_mask_overlap(a, b, min_lift=1.2)
    assert str(caught.value).splitlines() == [
        "min_lift cannot be judged: the masks are saturated",
        "  a          run 1   (100 entries, density 100.00%)",
        "  b          run 2   (30 entries, density 30.00%)",
        "  covers     bool, 1/1 tensor, 100 entries",
        "  overlap    30 in both: 30.00% of a, 100.00% of b, Jaccard 30.00%",
        "  chance     30.0 expected by matrix   (z unknown)",
        "  lifts      matrix 1, rowcol 1, pooled 1",
        "  strata     1 of 1 have a mask empty or full: left to no chance, and out of z",
        "  why        chance is taken by matrix, and in each such part a mask",
        "             is empty or full: the counts alone fix the overlap, and it says nothing",
        "  to mend    compare sparser masks, or other tensors; null=None asserts the bare",
        "             min_jaccard and min_one_sided",
    ]


def test_full_rows_are_saturated_for_the_null_that_keeps_rows():
    rows = np.zeros((4, 5), bool)
    rows[:2] = True
    more = rows.copy()
    more[2] = True
    a, b = UpdateMask.of({"w": rows}, what="run 1"), UpdateMask.of({"w": more}, what="run 2")
    assert assert_mask_overlap(a, b, min_kappa=1).kappa == 1
    with pytest.raises(SelectionError) as caught:
        assert_mask_overlap(a, b, min_kappa=0.1, null="rowcol")
    assert str(caught.value).splitlines()[-4:] == [
        "  why        chance is taken by rows and columns of each matrix, and how full they are",
        "             alone makes it expect the largest overlap that the counts allow",
        "  to mend    compare sparser masks, or other tensors; null=None asserts the bare",
        "             min_jaccard and min_one_sided",
    ]


@pytest.mark.parametrize(
    "bound", [{"min_lift": 1.2}, {"min_kappa": 0.1}, {"min_jaccard": 0.5}, {"min_one_sided": 0.5}]
)
@pytest.mark.parametrize("null", ["auto", "rowcol", "pooled"])
def test_the_same_bits_are_no_evidence(bound, null):
    a, b = run({"w": (100, 0, 20)}, "run 1"), run({"w": (100, 0, 20)}, "run 2")
    for other in (b, ~~a):
        assert mask_overlap(a, other, null=null).identical
        with pytest.raises(PairMismatchError, match=r"\Athe masks are bit for bit the same"):
            assert_mask_overlap(a, other, null=null, **bound)
    assert not mask_overlap(a, run({"w": (100, 0, 21)}, "run 2")).identical


def test_what_the_same_bits_say():
    a, b = run({"w": (100, 0, 20)}, "run 1"), run({"w": (100, 0, 20)}, "run 2")
    with pytest.raises(PairMismatchError) as caught:
        assert_mask_overlap(a, b, min_lift=1.2)
    assert str(caught.value).splitlines() == [
        "the masks are bit for bit the same: their overlap is no evidence",
        "  a          run 1   (20 entries, density 20.00%)",
        "  b          run 2   (20 entries, density 20.00%)",
        "  covers     bool, 1/1 tensor, 100 entries",
        "  overlap    20 in both: 100.00% of a, 100.00% of b, Jaccard 100.00%",
        "  chance     4.0 expected by matrix   (z 9.95, kappa 1, odds ratio inf)",
        "  lifts      matrix 5, rowcol 5, pooled 5",
        "  usually    a run compared with itself, with a copy, or with its own mask file",
        "  to mend    compare another run; null=None asserts the bare min_jaccard and",
        "             min_one_sided",
    ]
    assert assert_mask_overlap(a, b, min_jaccard=1, null=None).jaccard == 1
    with pytest.raises(AssertionError, match=r"Jaccard 100\.00% is above the allowed 50\.00%"):
        assert_mask_overlap(a, b, max_jaccard=0.5)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "no bound: give one of min_lift, min_kappa, min_jaccard, min_one_sided"),
        ({"null": None}, ValueError, "no bound"),
        ({"min_lift": -1}, ValueError, "min_lift=-1 is not a finite number"),
        ({"min_lift": float("inf")}, ValueError, "min_lift=inf is not a finite number"),
        ({"min_lift": float("nan")}, ValueError, "min_lift=nan is not a finite number"),
        ({"min_lift": "2"}, TypeError, "min_lift='2' is not a number"),
        ({"min_kappa": 1.2}, ValueError, "min_kappa=1.2 is not a fraction"),
        ({"min_jaccard": 40}, ValueError, "40% is min_jaccard=0.4"),
        ({"min_one_sided": -0.1}, ValueError, "min_one_sided=-0.1 is not a fraction"),
        ({"max_jaccard": True}, TypeError, "max_jaccard=True is not a number"),
        ({"min_jaccard": 0.4, "max_jaccard": 0.3}, ValueError, "min_jaccard=0.4 is above max_jacc"),
        ({"min_lift": 1.5, "null": None}, ValueError, "min_lift=1.5 is held against chance, and n"),
        ({"min_kappa": 0.1, "null": None}, ValueError, "min_kappa=0.1 is held against chance"),
        ({"min_lift": 2, "null": "rows"}, ValueError, "null='rows' is none of exponent, matrix, "),
        ({"min_lift": 2, "message": "text"}, TypeError, "message='text' is not a function"),
        ({"min_lift": 2, "atol": 1e-5, "rtol": 1e-3}, ValueError, "give at most one"),
        ({"min_lift": 2, "include": "x*"}, SelectionError, "include='x*' matches none"),
        ({"min_lift": 2, "null": "exponent"}, PairMismatchError, 'name null="matrix"'),
    ],
)
def test_misuse_is_an_error_and_no_verdict(masks, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        assert_mask_overlap(*masks, **options)


def test_a_message_can_be_reworded(masks):
    with pytest.raises(AssertionError, match=r"\Arun 7: overlap lift 1\.33"):
        assert_mask_overlap(*masks, min_lift=2, message=lambda text: f"run 7: {text}")


def test_the_result_is_recorded_also_when_the_assertion_fails(masks, recorded):
    with pytest.raises(AssertionError):
        assert_mask_overlap(*masks, min_lift=2)
    assert [each.to_dict()["finding"] for each in recorded] == ["mask_overlap"]
