"""What `train_inside` refuses: each thing that would train nothing, or not what is meant."""

import numpy as np
import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    SubnetError,
    UpdateMask,
    assert_updated,
    record_update,
    train_inside,
)

HALF = np.arange(16).reshape(4, 4) % 2 == 0
NASTY = "evil\x1b[31m\n"


@pytest.fixture
def linear():
    return torch.nn.Linear(4, 4)


@pytest.fixture
def sgd():
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1)


def enter(model, optimizer, mask):
    with train_inside(model, optimizer, mask):
        raise AssertionError("the block was entered")


def test_an_empty_mask(linear, sgd):
    mask = UpdateMask.of({"weight": np.zeros((4, 4), bool)})
    with pytest.raises(SelectionError) as caught:
        enter(linear, sgd(linear), mask)
    assert str(caught.value) == (
        "<UpdateMask given: 0 of 16 entries of 1 tensor (density 0)> is empty: nothing could be "
        "trained inside it; was it made from two checkpoints that are the same under its tolerance?"
    )


def test_a_mask_of_parameters_that_are_frozen(linear, sgd):
    linear.weight.requires_grad = False
    with pytest.raises(SelectionError) as caught:
        enter(linear, sgd(linear), UpdateMask.of({"weight": HALF}))
    assert str(caught.value) == (
        "<UpdateMask given: 8 of 16 entries of 1 tensor (density 0.5)> covers nothing that can be "
        "trained: weight has requires_grad=False; unfreeze what is to be trained, or take a mask "
        "of the part that is"
    )
    both = UpdateMask.of({"weight": HALF, "bias": np.ones(4, bool)})
    with train_inside(linear, sgd(linear), both) as training:
        assert training.entries == 4


def test_a_mask_of_buffers():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SelectionError, match="nothing that can be trained: it has entries in buff"):
        enter(model, optimizer, UpdateMask.of({"0.running_mean": np.ones(4, bool)}))


def test_an_optimiser_that_owns_nothing_of_it(linear):
    masters = [each.detach().clone() for each in linear.parameters()]
    with pytest.raises(SelectionError) as caught:
        enter(linear, torch.optim.SGD(masters, lr=0.1), UpdateMask.of({"weight": HALF}))
    assert str(caught.value) == (
        "the optimiser does not own 1 of 1 parameter that the mask covers: weight; build it from "
        "all of model.parameters(), after the model was wrapped or moved, and if it owns float32 "
        "copies of them (masters), pass those: train_inside({name: master, …}, optimizer, mask)"
    )
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    detached = linear.state_dict()  # the same memory, but not the parameters
    with pytest.raises(SelectionError, match="does not own 1 of 1 parameter"):
        enter(detached, optimizer, UpdateMask.of({"weight": HALF}))


def test_an_optimiser_that_owns_some_of_it(linear):
    optimizer = torch.optim.SGD([linear.weight], lr=0.1)
    mask = UpdateMask.of({"weight": HALF, "bias": np.ones(4, bool)})
    with pytest.raises(SelectionError) as caught:
        enter(linear, optimizer, mask)
    assert str(caught.value) == (
        "the optimiser does not own 1 of 2 parameters that the mask covers: bias; build it from "
        "all of model.parameters()"
    )


def test_a_mask_of_another_model(linear, sgd):
    mask = UpdateMask.of({"weight": HALF, NASTY: HALF}, what="run-1 -> run-2")
    with pytest.raises(PairMismatchError) as caught:
        enter(linear, sgd(linear), mask)
    assert str(caught.value) == (
        "the mask of run-1 -> run-2 names 1 tensor that Linear does not have: evil\\x1b[31m\\n; "
        "make the mask from checkpoints of this model"
    )


def test_a_mask_of_another_shape(linear, sgd):
    with pytest.raises(PairMismatchError) as caught:
        enter(linear, sgd(linear), UpdateMask.of({"weight": HALF[:1]}))
    assert str(caught.value) == (
        "weight of Linear has shape [4, 4], the mask of given was made for [1, 4]; make it from "
        "checkpoints of this model (of weights that are sharded or partitioned, gather them first)"
    )


def test_two_masks_of_one_tied_parameter():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PairMismatchError, match="are one tensor in ModuleDict, and the mask holds"):
        enter(model, optimizer, UpdateMask.of({"a.weight": HALF, "b.weight": ~HALF}))


def test_parameters_that_are_sharded(linear, sgd):
    linear.weight.to_local = lambda: linear.weight
    with pytest.raises(SelectionError, match="weight is sharded over several processes"):
        enter(linear, sgd(linear), UpdateMask.of({"weight": HALF}))


def test_a_sparse_gradient_is_refused_before_the_step_and_nothing_moves():
    model = torch.nn.Embedding(4, 4, sparse=True)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1])).sum().backward()
    with (
        pytest.raises(SubnetError, match=r"gradient of weight is sparse.*sparse=False"),
        train_inside(model, optimizer, UpdateMask.of({"weight": HALF})),
    ):
        optimizer.step()
    assert torch.equal(model.weight, before)


REPLACED = "end the block before parameters are replaced, and enter a new one after"


def test_a_covered_parameter_that_the_optimiser_lost(linear, sgd):
    optimizer = sgd(linear)
    with train_inside(linear, optimizer, UpdateMask.of({"weight": HALF})) as training:
        linear.weight = torch.nn.Parameter(torch.ones(4, 4))
        optimizer.param_groups[0]["params"] = [linear.weight, linear.bias]
        linear(torch.ones(1, 4)).sum().backward()
        with pytest.raises(SubnetError) as caught:
            optimizer.step()
        assert training.steps == 0
    assert str(caught.value) == (
        f"the optimiser no longer owns 1 parameter that the mask covers: weight; {REPLACED}"
    )
    assert (linear.weight == 1).all()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_parameter_that_was_not_there_on_entry(linear, sgd, by_name):
    optimizer = sgd(linear)
    model = dict(linear.named_parameters()) if by_name else linear
    with train_inside(model, optimizer, UpdateMask.of({"weight": HALF})):
        new = torch.nn.Parameter(torch.ones(4))
        new.grad = torch.ones(4)
        optimizer.add_param_group({"params": [new]})
        optimizer.step()  # a critic, so far
        assert (new != 1).all()
        known = new.detach().clone()
        if by_name:
            model[NASTY] = new
        else:
            linear.bias = new
        with pytest.raises(SubnetError) as caught:
            optimizer.step()
    name = "evil\\x1b[31m\\n" if by_name else "bias"
    assert str(caught.value) == (
        "the model has 1 parameter now that it had not when the block was entered, and the "
        f"optimiser owns: {name}; {REPLACED}"
    )
    assert torch.equal(new, known)


def test_a_parameter_that_is_unfrozen_in_the_block_is_masked(linear):
    optimizer = torch.optim.SGD([linear.weight], lr=0.1)
    with train_inside(linear, optimizer, UpdateMask.of({"weight": HALF})):
        before = linear.bias.detach().clone()
        optimizer.add_param_group({"params": [linear.bias]})
        linear(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(linear.bias, before)


def test_without_with_there_is_nothing_to_read(linear, sgd):
    optimizer = sgd(linear)
    block = train_inside(linear, optimizer, UpdateMask.of({"weight": HALF}))
    assert repr(block) == "<train_inside, not entered: no step is masked>"
    for name in ("entries", "steps", "mask_bytes", "kept_bytes"):
        with pytest.raises(SubnetError) as caught:
            getattr(block, name)
    assert str(caught.value) == (
        "nothing was masked, since no block was entered: use `with train_inside(model, optimizer, "
        "mask) as inside:` around the training steps, and read `inside`"
    )
    assert not hasattr(block, "_repr_html_")
    assert not optimizer._optimizer_step_pre_hooks
    with block:  # what was caught keeps it alive beyond this test, in which it should not warn
        pass


def test_without_with_it_warns_that_nothing_was_masked(linear, sgd):
    optimizer = sgd(linear)
    block = train_inside(linear, optimizer, UpdateMask.of({"weight": HALF}))
    with pytest.warns(RuntimeWarning) as warned:
        del block
    assert [str(each.message) for each in warned] == [
        "train_inside was called and no block entered, so that nothing was masked; use `with "
        "train_inside(model, optimizer, mask) as inside:` around the training steps"
    ]
    with pytest.warns(RuntimeWarning, match="no block entered") as warned:
        train_inside(linear, optimizer, UpdateMask.of({"weight": HALF}))
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_block_that_was_entered_says_where_it_is_and_may_be_entered_again(linear, sgd):
    optimizer = sgd(linear)
    block = train_inside(linear, optimizer, UpdateMask.of({"weight": HALF}))
    for _ in range(2):
        with block as inside:
            assert repr(block) == "<train_inside, in its block>"
            linear(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        assert inside.steps == 1
        assert repr(block) == "<train_inside, its block has ended: no step is masked>"
        assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(
        SubnetError, match=r"^use `with .* as inside:` around .*, and read `inside`"
    ):
        _ = block.steps
    del block
    failing = train_inside(linear, optimizer, UpdateMask.of({"weight": ~HALF & HALF}))
    with pytest.raises(SelectionError, match="is empty"), failing:
        pass
    del failing


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("model", "train_inside takes a module, or its parameters by name.*not str"),
        ("optimizer", "optimizer is str, not a torch.optim.Optimizer"),
        ("mask", "mask is str, not an UpdateMask; make one with"),
    ],
)
def test_something_else(linear, sgd, which, text):
    given = {"model": linear, "optimizer": sgd(linear), "mask": UpdateMask.of({"weight": HALF})}
    given[which] = "x"
    with pytest.raises(TypeError, match=text):  # when it is called, not when it is entered
        train_inside(*given.values())


def test_no_step_at_all_under_assert_updated_says_that_nothing_moved_and_why(linear):
    with record_update(linear.bfloat16()) as update:
        pass
    with pytest.raises(AssertionError) as caught:
        assert_updated(update, "*")
    text = str(caught.value)
    assert text.splitlines()[0] == "2 of 2 tensors did not move"
    assert "bf16 stores no step below" in text
    assert "usually" in text
    assert "the optimiser does not" in text


def test_inside_an_empty_block_nothing_moves_and_no_step_is_counted(linear, sgd):
    with train_inside(linear, sgd(linear), UpdateMask.of({"weight": HALF})) as training:
        pass
    assert (training.steps, training.kept_bytes) == (0, 0)
