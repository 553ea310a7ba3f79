"""What `Supermasks` refuses, by name."""

import pytest
import torch
from torch.nn.utils import parametrizations

from pytest_subnet import SelectionError, SubnetError, Supermasks


def two_layers():
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))


def tied():
    model = two_layers()
    model[1].weight = model[0].weight
    return model


def test_densities():
    """Outside (0, 1], and no numbers."""
    for density in (0, -0.1, 101, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"is not a share in \(0, 1\]$"):
            Supermasks(two_layers(), density=density)
    with pytest.raises(TypeError) as caught:
        Supermasks(two_layers(), density="5%")
    assert str(caught.value) == "density='5%' is not a number"
    with pytest.raises(ValueError, match="share") as caught:
        Supermasks(two_layers(), density=5)
    assert str(caught.value) == "density=5 is not a share in (0, 1]; 5% is density=0.05"
    with pytest.raises(TypeError) as caught:
        Supermasks({"weight": torch.ones(2, 2)}, density=0.5)
    assert str(caught.value) == "model is dict, not a torch.nn.Module"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)),
            SubnetError,
            "1 (BatchNorm1d): keeps running statistics, which learning one task changes for all "
            "others; build it with track_running_stats=False, or normalise by layer or group",
        ),
        (
            tied,
            SelectionError,
            "0.weight is one tensor with 1.weight, and a mask of one would not be seen in the "
            "other; untie them, or leave all out with exclude=",
        ),
        (
            lambda: torch.nn.LSTM(4, 4),
            SelectionError,
            "weight_ih_l0 is kept a second time by its LSTM, which would not see a mask; leave it "
            "out with exclude=",
        ),
        (
            lambda: parametrizations.weight_norm(torch.nn.Linear(4, 4)),
            SelectionError,
            "parametrizations.weight.original0 is computed from others (parametrised); leave it "
            "out with exclude=",
        ),
        (
            lambda: torch.nn.Embedding(4, 4),
            SelectionError,
            "nothing is selected: supermasks cover weights of two or more dimensions outside "
            "embeddings, and the model has none (weight)",
        ),
        (
            lambda: torch.nn.Linear(4, 4, device="meta"),
            SelectionError,
            "weight has no values here (meta device, sharded or empty); leave it out with exclude=",
        ),
    ],
)
def test_models(make, error, text):
    """What a mask would not be seen in, and what every task would change for all."""
    with pytest.raises(error) as caught:
        Supermasks(make(), density=0.5)
    assert str(caught.value) == text


def test_batch_norms_without_running_statistics():
    """Nothing of them depends on the tasks before."""
    norm = torch.nn.BatchNorm1d(6, track_running_stats=False)
    masks = Supermasks(torch.nn.Sequential(torch.nn.Linear(6, 6), norm), density=0.5)
    with masks.learn_mask("one"):
        masks.model(torch.randn(4, 6))
    assert [each.name for each in masks["one"].tensors] == ["0.weight"]


def test_include_and_exclude():
    """Globs on names; a bias that is asked for is refused."""
    covered = Supermasks(two_layers(), density=0.5, exclude="1.*")
    with covered.learn_mask("one"):
        pass
    assert covered["one"].names() == ["0.weight"]
    covered = Supermasks(torch.nn.Embedding(4, 4), density=0.5, include="weight")
    with covered.learn_mask("one"):
        pass
    assert covered["one"].count == 8
    with pytest.raises(SelectionError, match=r"^0\.bias has fewer than two dimensions; leave it"):
        Supermasks(two_layers(), density=0.5, include="*")
    with pytest.raises(SelectionError, match=r"^include='2\.\*' matches none of 4 tensors"):
        Supermasks(two_layers(), density=0.5, include="2.*")


def learnt(*tasks, density=0.5):
    masks = Supermasks(two_layers(), density=density)
    for task in tasks:
        with masks.learn_mask(task):
            pass
    return masks


def refused(error, text, block):
    with pytest.raises(error) as caught, block:
        pass
    assert str(caught.value) == text


def test_tasks():
    """Unknown, the same twice, not the last, and with nothing of its own."""
    masks = learnt("first", "second")
    optimizer = torch.optim.SGD(masks.model.parameters(), lr=0.1)
    refused(
        SelectionError,
        "no task 'frist' was learnt; did you mean first?",
        masks.apply("frist"),
    )
    refused(
        SelectionError, "no task 'x\\x1b' was learnt; learnt: first, second", masks.apply("x\x1b")
    )
    refused(
        ValueError,
        "task='first' was learnt before; a mask is learnt once",
        masks.learn_mask("first"),
    )
    refused(ValueError, "task='' is no name", masks.learn_mask(""))
    refused(TypeError, "task=3 is not the name of a task", masks.learn_mask(3))
    refused(
        ValueError,
        "start=[] names no task; None draws new scores",
        masks.learn_mask("third", start=[]),
    )
    refused(
        SelectionError,
        "the weights of 'first' are used by 'second', which was learnt later and would change; "
        "learn the weights of a task before the next mask",
        masks.learn_weights("first", optimizer),
    )
    masks = learnt("first")
    with masks.learn_mask("same", start="first"):
        pass
    refused(
        SelectionError,
        "earlier masks hold all 36 entries of 'same': nothing is left to train. Go on with its "
        "mask alone, or with a smaller density",
        masks.learn_weights("same", optimizer),
    )


def test_an_optimizer_of_something_else():
    """As `train_inside` says it; nothing is left open."""
    masks = learnt("one")
    other = torch.optim.SGD(two_layers().parameters(), lr=0.1)
    with (
        pytest.raises(SelectionError, match=r"^the optimiser does not own 2 of 2 parameters"),
        masks.learn_weights("one", other),
    ):
        pass
    with masks.apply("one"):
        pass


def test_blocks_inside_blocks():
    """What would see the weights of another block."""
    masks = learnt("one")
    with masks.apply("one"):
        for block in (masks.apply("one"), masks.learn_mask("two")):
            with (
                pytest.raises(SubnetError, match=r"\) inside apply\('one'\); end that block"),
                block,
            ):
                pass
        refused_inside = "choose inside apply('one'); end that block first"
        with pytest.raises(SubnetError) as caught:
            masks.choose(torch.randn(1, 6))
        assert str(caught.value) == refused_inside
        assert repr(masks).startswith("<Supermasks 1 task")
    assert repr(learnt()) == "<Supermasks 0 tasks at density 0.5: 0 of 72 entries used>"


def test_scores_that_diverge():
    """Nothing is learnt from NaN."""
    masks = learnt()
    with pytest.raises(SubnetError) as caught, masks.learn_mask("one") as scores, torch.no_grad():
        scores[0][0, :2] = float("nan")
    assert str(caught.value) == (
        "the scores of 0.weight hold 2 NaN or Inf after one was learnt, and order nothing; train "
        "with a smaller learning rate"
    )
    assert not masks
