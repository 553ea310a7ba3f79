"""`assert_subnetwork_recovers`: bounds, nulls, and what each failure says."""

import numpy as np
import pytest
import torch

from pytest_subnet import SelectionError, UpdateMask, assert_subnetwork_recovers

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def base():
    return {UP: torch.zeros(4, 5), NORM: torch.zeros(4)}


@pytest.fixture
def full():
    """Moved ten entries: eight by 1, two by 0.001."""
    up, norm = torch.zeros(4, 5), torch.zeros(4)
    up.view(-1)[:6], up.view(-1)[6:8], norm[:2] = 1, 0.001, 1
    return {UP: up, NORM: norm}


@pytest.fixture
def sub(full):
    """Agrees with full in six of its ten entries within 0.01, two of them as the base does."""
    sub = {name: each.clone() for name, each in full.items()}
    sub[UP].view(-1)[:3] = 0.5
    sub[UP].view(-1)[6:8] = 0
    sub[NORM][0] = 0.25
    return sub


def test_it_holds_for_what_the_base_does_not_explain(base, full, sub):
    result = assert_subnetwork_recovers(full, sub, base=base, match_at_least=0.5, atol=0.01)
    assert (result.match, result.base_match, result.recovered) == (0.6, 0.2, 0.5)
    bare = {"match_at_least": 0.6, "atol": 0.01, "null": None}
    assert assert_subnetwork_recovers(full, sub, base=base, **bare) == result


def test_too_little_agrees(save, base, full, sub, fails_with):
    sources = {"full": save(full, "full"), "sub": save(sub, "sub"), "base": save(base, "base")}
    with fails_with("""
        sub recovers 50.00% of what the base misses, required 60.00%
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     60.00% agree with full; of the base, untrained, 20.00%
          missed     8 by the base, of which sub regains 4 (50.00%)
          everywhere 83.33% agree; of the base 66.67%
          worst      model.layers.0.mlp.up_proj.weight  50.00% agree  (f32[4,5])
                     model.norm.weight                  50.00% agree  (f32[4])
          usually    other data, order, seed or number of steps than full training had, or a
                     tolerance of the size of single steps
          to accept  match_at_least=0.5
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0.6, atol=0.01)
    with fails_with("""
        sub recovers 60.00% of the mask, required 61.00%
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     60.00% agree with full; of the base, untrained, 20.00%
          missed     8 by the base, of which sub regains 4 (50.00%)
          everywhere 83.33% agree; of the base 66.67%
          worst      model.norm.weight                  50.00% agree  (f32[4])
                     model.layers.0.mlp.up_proj.weight  62.50% agree  (f32[4,5])
          usually    other data, order, seed or number of steps than full training had, or a
                     tolerance of the size of single steps
          to accept  match_at_least=0.6
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0.61, atol=0.01, null=None)


@pytest.mark.parametrize("null", ["base", None])
def test_the_worst_are_those_that_had_something_to_recover(base, full, sub, null):
    for each in (base, full, sub):  # names before and after the others; equal in all three
        each |= {"a.norm.weight": torch.ones(3), "z.norm.weight": torch.ones(3)}
    full["b.weight"], sub["b.weight"], base["b.weight"] = (
        torch.full((2,), value) for value in (1e-3, 0.0, 0.0)
    )  # in the mask, and agreed upon by the base within the tolerance
    with pytest.raises(AssertionError) as caught:
        assert_subnetwork_recovers(full, sub, base=base, match_at_least=0.99, atol=0.01, null=null)
    lines = str(caught.value).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  worst "))
    last = next(i for i, line in enumerate(lines) if line.startswith("  usually "))
    shown = {line.removeprefix("  worst ").split()[0]: line for line in lines[first:last]}
    missed = {UP, NORM} if null == "base" else {UP, NORM, "b.weight"}
    assert set(shown) == missed
    assert not any(" 0.00%" in line for line in shown.values())


def test_an_untrained_sub_passes_only_the_bare_number(save, base, full):
    untrained = {name: each.clone() for name, each in base.items()}
    bound = {"base": base, "match_at_least": 0.2, "atol": 0.01}
    with pytest.raises(AssertionError, match=r"^sub recovers 0.00% of what the base misses, req"):
        assert_subnetwork_recovers(full, untrained, **bound)
    assert assert_subnetwork_recovers(full, untrained, **bound, null=None).match == 0.2


def test_a_tolerance_at_which_the_base_agrees_says_nothing(save, base, full, sub, fails_with):
    sources = {"full": save(full, "full"), "sub": save(sub, "sub"), "base": save(base, "base")}
    with fails_with("""
        the base agrees with full in all of the mask: nothing is left to recover
          pair       full against sub, both from base   (atol=2, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     100.00% agree with full; of the base, untrained, 100.00%
          missed     0 by the base
          everywhere 100.00% agree; of the base 100.00%
          usually    a tolerance wider than the update: any model near the base agrees
          to accept  a smaller atol; or null=None, which asserts the bare number
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0, atol=2)
    assert assert_subnetwork_recovers(**sources, match_at_least=1, atol=2, null=None).match == 1


def test_a_sub_that_moved_outside_was_not_trained_inside(save, base, full, sub, fails_with):
    sub[NORM][3] = 1e-30
    sources = {"full": save(full, "full"), "sub": save(sub, "sub"), "base": save(base, "base")}
    with fails_with("""
        sub moved outside the mask: 1 of 14 entries
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     60.00% agree with full; of the base, untrained, 20.00%
          missed     8 by the base, of which sub regains 4 (50.00%)
          everywhere 83.33% agree; of the base 66.67%
          worst      model.norm.weight  1 moved outside  (f32[4])
          usually    another mask or base than was trained with, weight decay or momentum on
                     masked gradients (gradients_only=True), or training in full
          to accept  allow_outside=True, or mask= as it was trained with
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0.5, atol=0.01)
    bounds = {"match_at_least": 0.5, "atol": 0.01, "allow_outside": True}
    assert assert_subnetwork_recovers(**sources, **bounds).outside_moved == 1


def test_a_score_that_dropped(save, base, full, sub, fails_with):
    sources = {"full": save(full, "full"), "sub": save(sub, "sub"), "base": save(base, "base")}
    scores = {"full": 0.75, "sub": 0.5, "base": 0.125}
    with fails_with("""
        the score of sub is 0.25 below that of full, allowed 0.1
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     60.00% agree with full; of the base, untrained, 20.00%
          missed     8 by the base, of which sub regains 4 (50.00%)
          everywhere 83.33% agree; of the base 66.67%
          score      full 0.75, sub 0.5, base 0.125
          usually    an evaluation with more noise than that: score both with several seeds
          to accept  a larger max_score_drop=
    """):
        assert_subnetwork_recovers(
            **sources, match_at_least=0.5, atol=0.01, score=scores.get, max_score_drop=0.1
        )
    for allowed in (0.25, 1):
        bounds = {"match_at_least": 0.5, "atol": 0.01, "max_score_drop": allowed}
        assert_subnetwork_recovers(**sources, **bounds, score=scores.get)
    scores["sub"] = 0.75
    assert_subnetwork_recovers(**sources, match_at_least=0.5, atol=0.01, score=scores.get)


def test_full_training_that_moved_nothing(save, base, sub, fails_with):
    sources = {"full": save(base, "full"), "sub": save(sub, "sub"), "base": save(base, "base")}
    with fails_with("""
        nothing to recover: full holds the same bits as the base
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          usually    the base was saved again, or each step was smaller than the storage
                     dtype resolves; there is no update to train inside
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0, atol=0.01)


@pytest.mark.parametrize("null", ["base", None])
def test_full_training_that_moved_nothing_inside_a_given_mask(save, base, sub, fails_with, null):
    sources = {"full": save(base, "full"), "sub": save(base, "sub"), "base": save(base, "base")}
    mask = UpdateMask.of({UP: np.ones((4, 5), bool)})
    bounds = {"match_at_least": 0.5, "atol": 1e-5, "mask": mask, "null": null}
    with fails_with("""
        nothing to recover: full holds the same bits as the base
          pair       full against sub, both from base   (atol=1e-05, f32, 2/2 tensors, 24 entries)
          usually    the base was saved again, or each step was smaller than the storage
                     dtype resolves; there is no update to train inside
    """):
        assert_subnetwork_recovers(**sources, **bounds)


@pytest.mark.parametrize("null", ["base", None])
def test_a_full_that_diverged_is_no_model_to_arrive_at(save, base, full, fails_with, null):
    full[UP].view(-1)[:2] = torch.nan
    full[NORM][0] = -torch.inf
    full[NORM][3] = base[NORM][3] = torch.inf  # outside the mask
    sources = {"full": save(full, "full"), "sub": save(full, "sub"), "base": save(base, "base")}
    with fails_with("""
        full has NaN or Inf in 3 of 10 entries of the mask: no values to recover
          pair       full against sub, both from base   (atol=0.01, f32, 2/2 tensors, 24 entries)
          mask       the update of full (same bits): 10 / 24 entries
          inside     70.00% agree with full; of the base, untrained, 20.00%
          missed     8 by the base, of which sub regains 5 (62.50%)
          everywhere 83.33% agree; of the base 62.50%
          not finite 4 of full, of these 3 in the mask; 4 of sub
          worst      model.layers.0.mlp.up_proj.weight  2 in the mask  (f32[4,5])
                     model.norm.weight                  1 in the mask  (f32[4])
          usually    full training that diverged: assert_finite(open_pair(base, full))
    """):
        assert_subnetwork_recovers(**sources, match_at_least=0, atol=0.01, null=null)
    mask = UpdateMask.of({NORM: np.array([False, True, False, False])})
    bounds = {"match_at_least": 1, "atol": 0.01, "mask": mask, "allow_outside": True}
    result = assert_subnetwork_recovers(**sources, **bounds)
    assert (result.nonfinite_full, result.nonfinite_inside, result.nonfinite_sub) == (4, 0, 4)
    assert result.nonfinite == 8


def test_a_sub_that_diverged_agrees_with_nothing(base, full):
    sub = {name: torch.where(each == 0, each, torch.nan) for name, each in full.items()}
    with pytest.raises(
        AssertionError, match=r"(?s)^sub recovers 0.00% .* 0 in the mask; 10 of sub"
    ):
        assert_subnetwork_recovers(full, sub, base=base, match_at_least=0.1, atol=0.01)


def test_a_mask_without_entries_here_is_an_error(base, full, sub):
    mask = UpdateMask.of({UP: np.zeros((4, 5), bool)})
    with pytest.raises(SelectionError, match="the mask of given has no entry"):
        assert_subnetwork_recovers(full, sub, base=base, match_at_least=0, atol=0.01, mask=mask)


def test_a_failure_is_recorded_and_may_be_reworded(base, full, sub, recorded):
    with pytest.raises(AssertionError, match=r"^SUB RECOVERS"):
        assert_subnetwork_recovers(
            full, sub, base=base, match_at_least=1, atol=0.01, message=str.upper
        )
    assert [each.recovered for each in recorded] == [0.5]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"match_at_least": 60}, ValueError, "match_at_least=60 is not a fraction"),
        ({"match_at_least": None}, TypeError, "match_at_least=None is not a number"),
        ({"atol": -1}, ValueError, "atol=-1 is not a finite number"),
        ({"max_score_drop": -1}, ValueError, "max_score_drop=-1 is not a finite number"),
        ({"null": "gaussian"}, ValueError, "null='gaussian' is not one of 'base', None"),
        ({"message": "no"}, TypeError, "message='no' is not a function"),
    ],
)
def test_wrong_arguments(base, full, sub, wrong, error, text):
    with pytest.raises(error, match=text):
        assert_subnetwork_recovers(
            full, sub, **{"base": base, "match_at_least": 0.5, "atol": 0.01, **wrong}
        )
