"""`assert_subnetwork_sufficient` and `assert_subnetwork_necessary`: bounds, chance, messages."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pytest_subnet import (
    CheckpointError,
    SelectionError,
    SubnetError,
    UpdateMask,
    assert_subnetwork_necessary,
    assert_subnetwork_sufficient,
    open_pair,
    random_mask_like,
    subnetwork_necessity,
    subnetwork_sufficiency,
    update_mask,
)
from pytest_subnet.reports.measured import measured


class Model(torch.nn.Module):
    """Its score is the sum of its weights; ten of 400 have nearly all of it."""

    def __init__(self, *, tuned):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(20, 20))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.drop = torch.nn.Dropout(0.5)
        if tuned:
            with torch.no_grad():
                self.weight += 1 / 512
                self.weight[0, :10] = 1


FLAGS = np.arange(400).reshape(20, 20) < 10
MASK = UpdateMask.of({"weight": FLAGS})
HOLDER = SimpleNamespace(model=Model(tuned=True))
REST = UpdateMask.of({"weight": ~FLAGS})


@pytest.fixture
def pair():
    return Model(tuned=False).eval(), Model(tuned=True).eval()


def score(model):
    return model.weight.detach().double().sum()


def test_they_hold_for_the_entries_that_have_the_score(pair, recorded):
    result = assert_subnetwork_sufficient(pair, MASK, score, min_score=10)
    assert (result.full, result.subnetwork) == (10 + 390 / 512, 10)
    assert (result.p_value, len(result.random), result.density) == (0.05, 19, 10 / 400)
    other = assert_subnetwork_necessary(pair, MASK, score, min_drop=10)
    assert (other.drop, other.complement, other.p_value) == (10, 390 / 512, 0.05)
    assert recorded == [result, other]
    said = measured(result, with_tensors=True)
    assert said["finding"] == "subnetwork_sufficiency"
    assert said["numbers"]["p_value"] == 0.05
    assert said["numbers"]["restored"] is True
    assert said["tensors"]["rows"][0][:3] == ["weight", "20×20", "f32"]
    assert repr(result) == (
        "SubnetworkSufficiency(subnetwork=10, full=10.7617, p_value=0.05, fill='base', 10 of 400 "
        "in the mask)"
    )
    assert "19 random subnetworks" in result.table()


def test_a_score_that_is_too_low(pair, fails_with):
    with fails_with("""
        the subnetwork scores 10, below the required 10.5
          models     Model -> Model   (filled with the values of the base)
          mask       given: 10 / 400 entries   (density 2.50%, 1/2 tensors)
          note       1 tensor with 3 entries that the mask does not cover stays as tuned: bias
          scores     full 10.7617, subnetwork 10, complement 0.761719, all filled 0
          replaced   10 entries in the mask and 390 outside it get other bits when filled
          claim      the updates in the mask are enough, with the other updates undone
          usually    a mask that is too small, or made from another run, model or task
          to accept  min_score=10.0
    """):
        assert_subnetwork_sufficient(pair, MASK, score, min_score=10.5, controls=0)


def test_a_loss_is_no_score(pair, fails_with):
    one = UpdateMask.of({"weight": FLAGS & (np.arange(400).reshape(20, 20) < 1)})
    with fails_with("""
        without the subnetwork the score drops by -1, required 2
          models     Model -> Model   (filled with zeros)
          mask       given: 1 / 400 entries   (density 0.25%, 1/2 tensors)
          note       1 tensor with 3 entries that the mask does not cover stays as tuned: bias
          scores     full -10.7617, subnetwork -1, complement -9.76172, all filled 0
          replaced   1 entry in the mask and 399 outside it get other bits when filled
          claim      the entries in the mask are needed
          usually    a mask of entries that the task does not need, or that others stand in for
                     or evaluate gives a loss: the tuned model scores lower than all filled, and
                     higher must be better (-loss)
    """):
        assert_subnetwork_necessary(
            pair, one, lambda model: 0 - score(model), min_drop=2, fill="zero", controls=0
        )


def test_a_drop_that_is_too_small(pair, fails_with):
    one = UpdateMask.of({"weight": FLAGS & (np.arange(400).reshape(20, 20) < 1)})
    with fails_with("""
        without the subnetwork the score drops by 1, required 2
          models     Model -> Model   (filled with zeros)
          mask       given: 1 / 400 entries   (density 0.25%, 1/2 tensors)
          note       1 tensor with 3 entries that the mask does not cover stays as tuned: bias
          scores     full 10.7617, subnetwork 1, complement 9.76172, all filled 0
          replaced   1 entry in the mask and 399 outside it get other bits when filled
          claim      the entries in the mask are needed
          usually    a mask of entries that the task does not need, or that others stand in for
          to accept  min_drop=1.0
    """):
        assert_subnetwork_necessary(pair, one, score, min_drop=2, fill="zero", controls=0)


def test_nothing_in_the_mask_was_updated(pair):
    base, tuned = pair
    with torch.no_grad():
        tuned.weight[0, :10] = 0
    with pytest.raises(AssertionError) as caught:
        assert_subnetwork_necessary((base, tuned), MASK, score, min_drop=2)
    text = str(caught.value)
    assert text.startswith("without the subnetwork the score drops by 0, required 2")
    assert "  why        filling the mask changes no bit: its entries hold that already" in text
    assert "to accept" not in text


def test_what_chance_does_as_well_is_no_evidence(pair, fails_with):
    def saturated(model):
        return score(model).clamp(max=0.01)

    with fails_with("""
        the score is no better than chance: 19 of 19 random ones score as high, p 1 above 0.05
          models     Model -> Model   (filled with the values of the base)
          mask       given: 10 / 400 entries   (density 2.50%, 1/2 tensors)
          note       1 tensor with 3 entries that the mask does not cover stays as tuned: bias
          scores     full 0.01, subnetwork 0.01, complement 0.01, all filled 0
          replaced   10 entries in the mask and 390 outside it get other bits when filled
          chance     0.01 (sd 0), p 1: 19 random subnetworks with as many entries in each
                     tensor, seed 0
          usually    a score that any mask of this size reaches, or an evaluation that is too
                     small to tell masks apart
          to accept  controls=0, which asserts the bare number
    """):
        assert_subnetwork_sufficient(pair, MASK, saturated, min_score=0.01)
    bare = assert_subnetwork_sufficient(pair, MASK, saturated, min_score=0.01, controls=0)
    assert bare.p_value is None
    with pytest.raises(AssertionError, match=r"^the drop is no better than chance: \d+ of 19"):
        assert_subnetwork_necessary(pair, REST, score, min_drop=0.1)
    assert assert_subnetwork_necessary(pair, REST, score, min_drop=0.1, controls=0).drop > 0.1


def test_controls_that_fill_what_never_moved_are_weak(pair, fails_with):
    base, tuned = pair
    with torch.no_grad():
        tuned.weight[1:] = 0  # 20 of 400 were updated, and a random ten hit half a one of them
    with fails_with("""
        without the subnetwork the score drops by 10, required 11
          models     Model -> Model   (filled with the values of the base)
          mask       given: 10 / 400 entries   (density 2.50%, 1/2 tensors)
          note       1 tensor with 3 entries that the mask does not cover stays as tuned: bias
                     weak controls: filled, the mask gives 10 entries other bits, a random mask \
0.5 on average; most of what it draws never moved
          scores     full 10.0195, subnetwork 10, complement 0.0195312, all filled 0
          replaced   10 entries in the mask and 10 outside it get other bits when filled
          chance     9.86133 (sd 0.375), p 0.05: 19 random complements with as many entries in each
                     tensor, seed 0
          claim      the updates in the mask are needed
          usually    a mask of entries that the task does not need, or that others stand in for
          to accept  min_drop=10.0
    """):
        assert_subnetwork_necessary((base, tuned), MASK, score, min_drop=11)
    passed = assert_subnetwork_necessary((base, tuned), MASK, score, min_drop=10)
    assert passed.replaced_by_random == passed.to_dict()["replaced_by_random"] == 0.5
    assert (passed.p_value, len(passed.notes)) == (0.05, 2)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"controls": 0}, MASK),
        ({"fill": "mean"}, MASK),
        ({}, UpdateMask.of({"weight": np.arange(400).reshape(20, 20) >= 300})),  # nothing to fill
    ],
)
def test_controls_are_not_weak_without_a_difference(pair, options, mask):
    base, tuned = pair
    with torch.no_grad():
        tuned.weight[1:] = 0
    found = subnetwork_necessity((base, tuned), mask, score, **options)
    assert not [note for note in found.notes if "weak" in note]


def test_what_a_random_mask_fills_on_average(pair):
    base, tuned = pair
    with torch.no_grad():
        tuned.weight[3:] = 0
    found = subnetwork_necessity(pair, MASK, score, controls=0)
    moved = (tuned.weight != base.weight).numpy()
    drawn = [random_mask_like(MASK, seed=seed)["weight"] for seed in range(200)]
    hit = np.mean([(each & moved).sum() for each in drawn])
    assert found.replaced_by_random == 10 * 60 / 400
    assert hit == pytest.approx(found.replaced_by_random, abs=0.3)


def test_a_message_of_ones_own(pair):
    with pytest.raises(AssertionError, match=r"^TASK 7: the subnetwork scores 10, below"):
        assert_subnetwork_sufficient(
            pair, MASK, score, min_score=11, controls=0, message=lambda text: f"TASK 7: {text}"
        )


def test_the_mask_of_the_whole_update_is_sufficient_by_construction(pair):
    base, tuned = pair
    with torch.no_grad():
        tuned.weight[1:] = 0
    mask = update_mask(open_pair(base, tuned))
    with pytest.raises(SelectionError) as caught:
        assert_subnetwork_sufficient((base, tuned), mask, score, min_score=1)
    assert str(caught.value).splitlines()[0] == (
        "the subnetwork is the whole tuned model: filling outside the mask changes no bit"
    )
    assert "controls=0 asserts the" in str(caught.value)
    assert assert_subnetwork_sufficient((base, tuned), mask, score, min_score=1, controls=0)
    assert assert_subnetwork_necessary((base, tuned), mask, score, min_drop=1).p_value == 0.05


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            {"weight": np.zeros((20, 20), bool)},
            "<UpdateMask given: 0 of 400 entries of 1 tensor (density 0)> is empty: no subnetwork "
            "to score",
        ),
        (
            {"weight": np.ones((20, 20), bool)},
            "<UpdateMask given: 400 of 400 entries of 1 tensor (density 1)> is full: the "
            "subnetwork is all that it covers; take a mask of a part",
        ),
        (
            {"weight": np.ones((20, 20), bool), "bias": np.zeros(3, bool)},
            "<UpdateMask given: 400 of 403 entries of 2 tensors (density 0.9926)> takes each of 2 "
            "tensors whole or not at all, so that a random mask with as many entries in each is "
            "the same mask; controls=0 asserts the bare number",
        ),
    ],
)
def test_masks_that_leave_no_choice(pair, flags, text):
    with pytest.raises(SelectionError) as caught:
        assert_subnetwork_sufficient(pair, UpdateMask.of(flags), score, min_score=1)
    assert str(caught.value) == text


@pytest.mark.parametrize("entries", [{"weight": np.full((20, 20), 0.5)}])
def test_a_float_mask_is_none(entries):
    with pytest.raises(ValueError, match="are not all 0 or 1"):
        UpdateMask.of(entries)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "None"),
        ("0.5", "'0.5'"),
        (True, "True"),
        (np.bool_(True), "np.True_"),
        (torch.tensor(True), "tensor(True)"),
        (torch.zeros(2), "tensor([0., 0.])"),
    ],
)
@pytest.mark.parametrize(
    ("call", "what"),
    [
        (1, "the tuned model as it is"),
        (3, "the subnetwork"),
        (4, "the complement of the subnetwork"),
        (5, "the model with all that the mask covers filled"),
        (7, "random mask 2 of 2"),
    ],
)
def test_a_score_that_is_no_finite_number_is_named(pair, value, shown, call, what):
    calls = itertools.count(1)
    kept = pair[1].weight.detach().clone()
    with pytest.raises(SubnetError) as caught:
        subnetwork_sufficiency(
            pair, MASK, lambda _: value if next(calls) == call else 0.5, controls=2
        )
    assert str(caught.value) == (
        f"evaluate gave {shown} for {what}, which is no finite number to compare; give one that "
        "any weights can get, as a share or a clipped loss"
    )
    assert torch.equal(pair[1].weight, kept)


def test_an_evaluator_that_draws_is_found_out(pair):
    def dropped(model):
        return model.drop(torch.ones(64)).sum()

    assert subnetwork_sufficiency(pair, MASK, dropped, controls=0).full == 64
    pair[1].train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(SubnetError) as caught:
            subnetwork_sufficiency(pair, MASK, dropped)
    assert "for the tuned model as it is, and so cannot tell one mask from another" in str(
        caught.value
    )
    assert "the model is in train mode, where dropout draws: call .eval() on it" in str(
        caught.value
    )
    pair[1].eval()
    values = random.Random(0)
    with pytest.raises(SubnetError) as caught:
        subnetwork_sufficiency(pair, MASK, lambda _: values.random())
    assert str(caught.value) == (
        "evaluate gave 0.8444218515250481 and then 0.7579544029403025 for the tuned model as it "
        "is, and so cannot tell one mask from another; score the same examples each time, and seed "
        "inside evaluate what it draws (on a GPU, torch.use_deterministic_algorithms(True))"
    )


def test_an_evaluator_that_writes_to_the_weights_is_found_out(pair):
    kept = pair[1].weight.detach().clone()

    def trains(model):
        with torch.no_grad():
            model.weight.add_(1)
        return 0

    with pytest.raises(SubnetError) as caught:
        subnetwork_sufficiency(pair, MASK, trains)
    assert str(caught.value) == (
        "evaluate wrote to the weights of Model or replaced them, when it was to score the tuned "
        "model as it is; only run the model there, in eval mode"
    )
    assert torch.equal(pair[1].weight, kept)


def test_weights_that_evaluate_replaced_cannot_be_put_back_silently(pair):
    def halves(model):
        model.weight = torch.nn.Parameter(model.weight.detach().half())
        return 0

    with pytest.raises(SubnetError) as caught:
        subnetwork_sufficiency(pair, MASK, halves)
    assert str(caught.value) == (
        "1 tensor of Model could not be put back, as evaluate replaced them: weight; load the "
        "model again, and leave its weights alone in evaluate"
    )


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_weights_are_put_back_when_evaluate_raises(pair, error):
    calls = itertools.count(1)
    kept = pair[1].weight.detach().clone()

    def fails(model):
        if next(calls) == 6:
            assert not torch.equal(model.weight, kept)
            raise error
        return 1

    with pytest.raises(type(error)) as caught:
        subnetwork_sufficiency(pair, MASK, fails)
    assert torch.equal(pair[1].weight, kept)
    if isinstance(error, RuntimeError):
        assert caught.value.__notes__ == ["in evaluate, which was to score random mask 1 of 19"]


def test_fingerprints_are_of_the_models_as_they_were_scored(pair):
    result = subnetwork_sufficiency(pair, MASK, score, controls=0)
    with torch.no_grad():
        pair[1].weight += 1
    assert result.fingerprints["base"]
    with pytest.raises(CheckpointError, match=r"^Model was written to after it was scored"):
        result.fingerprints["tuned"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"min_drop": 0}, ValueError, "min_drop=0 is not above 0: a subnetwork that nothing "
         "depends on would pass"),
        ({"min_drop": float("nan")}, ValueError, "min_drop=nan is not a finite number"),
        ({"min_drop": "1"}, TypeError, "min_drop='1' is not a number"),
        ({"fill": "zeros"}, ValueError, "fill='zeros' is none of base, zero, mean; did you mean "
         "zero?"),
        ({"controls": 9}, ValueError, "controls=9 reaches p = 0.1 at best, above alpha=0.05; draw "
         "19 or more, or 0 for the bare number"),
        ({"controls": -1}, ValueError, "controls=-1 is not a whole number of at least 0"),
        ({"controls": 1.5}, TypeError, "controls=1.5 is not a whole number"),
        ({"seed": -1}, ValueError, "seed=-1 is not a whole number of at least 0"),
        ({"alpha": 1}, ValueError, "alpha=1 is not between 0 and 1, both excluded"),
        ({"evaluate": 3}, TypeError, "evaluate=3 is not a function from a model to its score"),
        ({"mask": FLAGS}, TypeError, "mask is ndarray, not an UpdateMask; make one with "
         "update_mask(pair), UpdateMask.of({name: booleans}) or UpdateMask.load(path)"),
        ({"pair": "base"}, TypeError, "pair is str, not base and tuned as modules; take the "
         "fixture causal_lm_pair, or pass (base, tuned)"),
        ({"pair": (HOLDER, HOLDER)}, TypeError, "base is SimpleNamespace, not a module to run; "
         "take the fixture causal_lm_pair, or pass (base, tuned); pass the model that it holds: "
         "base.model"),
        ({"pair": ({}, {})}, TypeError, "base is dict, not a module to run; take the fixture "
         "causal_lm_pair, or pass (base, tuned)"),
    ],
)  # fmt: skip
def test_misuse(pair, options, error, text):
    arguments = {"pair": pair, "mask": MASK, "evaluate": score, "min_drop": 1, **options}
    with pytest.raises(error) as caught:
        assert_subnetwork_necessary(**arguments)
    assert str(caught.value) == text


def test_a_min_score_that_is_none(pair):
    with pytest.raises(ValueError, match="min_score=inf is not a finite number"):
        assert_subnetwork_sufficient(pair, MASK, score, min_score=float("inf"))
