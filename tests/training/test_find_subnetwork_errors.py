"""What `find_subnetwork` refuses, by name."""

import pytest
import torch

from pytest_subnet import SelectionError, SubnetError, find_subnetwork
from pytest_subnet.training.finding_rules import is_settled, is_stable, sparsest


def squared(model, _):
    return model.weight.square().sum()


def search(loss=squared, model=None, **options):
    settings = {"batches": [None], "lambdas": 1, "max_steps": 2, "attempts": 1} | options
    return find_subnetwork(model or torch.nn.Linear(2, 2), loss, **settings)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lambdas": -1}, ValueError, "λ = -1 is not a finite number of at least 0"),
        (
            {"lambdas": (0, float("nan"))},
            ValueError,
            "λ = nan is not a finite number of at least 0",
        ),
        (
            {"lambdas": ()},
            ValueError,
            "lambdas is empty; give one number of at least 0, or several",
        ),
        (
            {"lambdas": "10"},
            TypeError,
            "lambdas='10' is no number of at least 0, nor several of them",
        ),
        ({"lambdas": (0, 1, 1)}, ValueError, "lambdas=(0, 1, 1) holds one number twice"),
        (
            {"lambdas": (0, 1)},
            ValueError,
            "2 λ and no score to choose one by; give score, or a single λ",
        ),
        (
            {"lambdas": (1, 2), "score": squared},
            ValueError,
            "of several λ one must be 0: the others are held against the score that it reaches",
        ),
        ({"max_steps": 0}, ValueError, "max_steps=0 is not a whole number of at least 1"),
        ({"max_steps": 1.5}, TypeError, "max_steps=1.5 is not a whole number"),
        ({"attempts": 0}, ValueError, "attempts=0 is not a whole number of at least 1"),
        ({"seed": -1}, ValueError, "seed=-1 is not a whole number of at least 0"),
        (
            {"checkpoint_every": 0},
            ValueError,
            "checkpoint_every=0 is not a whole number of at least 1",
        ),
        ({"learning_rate": 0}, ValueError, "learning_rate=0 is not a finite number above 0"),
        ({"learning_rate": "1"}, TypeError, "learning_rate='1' is not a number"),
        (
            {"temperature_growth": 1},
            ValueError,
            "temperature_growth=1 is not a finite number above 1",
        ),
        ({"within": -0.1}, ValueError, "within=-0.1 is not a finite number of at least 0"),
        ({"within": True}, TypeError, "within=True is not a number"),
        ({"batches": []}, ValueError, "batches is empty"),
        (
            {"batches": iter([None])},
            TypeError,
            "batches is list_iterator, from which the batch of a step cannot be had again when a "
            "search goes on; give a function of the step's number, or list(...) of a loader",
        ),
        ({"score": 1}, TypeError, "score is int, not a function"),
        ({"score": lambda model: "high"}, TypeError, "score gave str, not a number"),
        (
            {"score": lambda model: float("nan")},
            SubnetError,
            "score gave nan for the mask of λ = 1, by which nothing can be chosen; a correlation "
            "needs values that differ",
        ),
        (
            {"loss": lambda model, _: 1.0},
            TypeError,
            "loss gave float, not a tensor; it takes (model, batch) and gives the loss of the "
            "model on the batch",
        ),
        (
            {"loss": lambda model, _: model.weight},
            ValueError,
            "loss gave 4 numbers, a tensor of shape [2, 2], and not one; give their mean",
        ),
        (
            {"loss": lambda model, _: model.weight.detach().sum()},
            ValueError,
            "the loss has no gradient; compute it from the model that loss is called with, without "
            "torch.no_grad(), detach() or item()",
        ),
        (
            {"loss": lambda model, _: torch.ones(1, requires_grad=True).sum(), "lambdas": 0},
            ValueError,
            "the loss has no gradient towards the weights masked; compute it from the model that "
            "loss is called with, without torch.no_grad(), detach() or item()",
        ),
        (
            {"loss": lambda model, _: model.weight.sum() * float("nan")},
            SubnetError,
            "the loss is nan at step 0 of λ = 1, and no mask can be found from it; look for NaN in "
            "the batch and in the weights, or lower learning_rate",
        ),
        ({"loss": None}, TypeError, "loss is NoneType, not a function"),
        ({"model": "model"}, TypeError, "model is str, not a torch.nn.Module"),
        (
            {"model": torch.nn.Embedding(3, 2)},
            SelectionError,
            "Embedding has no weight to mask: of its 1 parameter none is a matrix in float16, "
            "bfloat16, float32, float64 that is no embedding, head or norm",
        ),
        (
            {"model": torch.nn.Linear(2, 2, device="meta")},
            SelectionError,
            "weight is on the meta device and has no entries; load it",
        ),
        (
            {"include": "nothing"},
            SelectionError,
            "include='nothing' matches none of 1 tensor (weight)",
        ),
        (
            {"exclude": "*"},
            SelectionError,
            "nothing is left to mask: include=None, exclude='*' and kinds=None leave none of 1 "
            "weight",
        ),
        (
            {"kinds": "down_proj"},
            SelectionError,
            "kinds='down_proj' is no kind of weight that is masked here; there are weight",
        ),
    ],
)
def test_it_refuses(options, error, text):
    with pytest.raises(error) as caught:
        search(**options)
    assert str(caught.value) == text


def test_the_end_of_a_search():
    """Source: the published code's rule, undecided < 1 % of those kept."""
    assert [is_settled(1000, undecided) for undecided in (0, 9, 10, 500)] == [
        True,
        True,
        False,
        False,
    ]
    assert is_settled(0, 0)
    assert not is_settled(0, 1)


def by_definition(losses):
    """The published rule, read literally."""
    for step in range(1, len(losses)):
        before = losses[max(0, step - 10) : step]
        mean = sum(before) / len(before)
        if losses[step] <= mean + 0.25 and losses[step] <= 1.25 * mean:
            continue
        if not any(each <= mean for each in losses[step : max(len(losses) - 100, 0)]):
            return False
    return True


def test_spikes():
    flat = [2.0] * 50
    assert is_stable([])
    assert is_stable([*flat, 2.25, *flat])  # no more than 0.25 above
    assert not is_stable([*flat, 2.26, *flat])
    assert not is_stable([0.1] * 20 + [0.126] + [0.1] * 20)  # a quarter above
    assert is_stable([*flat, 3.0, *[2.5] * 20, *[2.0] * 101])
    assert not is_stable([*flat, 3.0, *[2.5] * 20, *[2.0] * 100])
    random = torch.Generator().manual_seed(0)
    verdicts = set()
    for _ in range(300):
        losses = (2 + 0.09 * torch.randn(180, generator=random)).tolist()
        assert is_stable(losses) == by_definition(losses)
        verdicts.add(is_stable(losses))
    assert verdicts == {True, False}


def test_the_choice_of_lambda():
    """Source: the sparsest within .04 of λ = 0; Pythia 160M's is λ = 10."""
    lambdas, scores = (0, 1, 10, 100), (0.98, 0.97, 0.953, 0.80)
    assert sparsest(lambdas, scores, (50, 20, 8, 1), within=0.04) == 2
    assert sparsest(lambdas, scores, (50, 20, 8, 1), within=0) == 0
    assert sparsest(lambdas, scores, (50, 8, 8, 1), within=0.04) == 1
    assert sparsest((10, 0), (0.94, 0.98), (1, 9), within=0.0401) == 0
