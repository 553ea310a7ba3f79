"""Fine-tunings that are drawn: repeated by their repr, known by their steps, refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies.finetunes import finetunes
from pytest_subnet.strategies.tiny_models import PARAMETERS, make_batches, make_decoder
from pytest_subnet.strategies.training_runs import OPTIMIZERS, Finetune

few = settings(max_examples=10, deadline=None, derandomize=True)


@few
@given(finetunes(min_frozen=1))
def test_the_repr_is_the_run(run: Finetune) -> None:
    again = eval(repr(run))
    assert again == run
    for name, weight in run.tuned.items():
        assert torch.equal(weight, again.tuned[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_moves_what_is_not_frozen_and_nothing_else(optimizer: str) -> None:
    run = Finetune(
        optimizer=optimizer, dtype="float32", weight_decay=0.1, steps=2, frozen=PARAMETERS[:3]
    )
    moved = {name for name in PARAMETERS if not torch.equal(run.base[name], run.tuned[name])}
    assert moved == set(PARAMETERS[3:])
    assert all(not run.largest_steps[name].any() for name in PARAMETERS[:3])


def test_without_master_weights_steps_do_not_add_up() -> None:
    run = Finetune(optimizer="AdamW", learning_rate=1e-3, steps=2, master_weights=True)
    assert (run.tuned["model.norm.weight"] != 1).any()
    assert (replace(run, master_weights=False).tuned["model.norm.weight"] == 1).all()


def test_the_step_of_sgd_is_known() -> None:
    run = Finetune(optimizer="SGD", learning_rate=0.5, dtype="float32")
    model = run.model()
    next(run.losses(model)).backward()
    for name, parameter in model.named_parameters():
        stepped = run.base[name] - 0.5 * parameter.grad
        assert torch.equal(run.largest_steps[name], (stepped - run.base[name]).abs())
    assert run.largest_step == max(float(each.max()) for each in run.largest_steps.values())


def test_a_run_leaves_torch_s_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    assert Finetune().tuned
    assert torch.equal(state, torch.random.get_rng_state())


def test_longer_runs_begin_as_shorter_ones() -> None:
    assert torch.equal(make_batches(7, 1)[0], make_batches(7, 3)[0])
    assert tuple(dict(make_decoder(0, torch.float32).named_parameters())) == PARAMETERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_steps": 0}, "min_steps=0 is below 1"),
        ({"min_steps": 3, "max_steps": 2}, "Cannot have max_steps=2 < min_steps=3"),
        ({"max_steps": 1.5}, "Expected int but got max_steps=1.5 (type=float)"),
        ({"max_frozen": 21}, "max_frozen=21 is above 20"),
        ({"min_learning_rate": 0}, "min_learning_rate=0 is no rate: give one above 0"),
        (
            {"max_learning_rate": float("nan")},
            "max_learning_rate=nan is not 0 or a positive number",
        ),
        ({"optimizers": []}, "optimizers is empty: there is nothing to draw from"),
        ({"optimizers": "AdamW"}, "optimizers='AdamW' is neither a strategy nor a list"),
        ({"optimizers": [1]}, "optimizers: 1 is neither a name nor a class"),
        ({"dtypes": ["int8"]}, "dtypes: 'int8' is not one of bfloat16, float16, float32"),
        ({"master_weights": 2}, "master_weights=2 is not True, False or None"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        finetunes(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_choices_are_drawn_from_strategies_too() -> None:
    runs = finetunes(
        dtypes=st.just(torch.float32), optimizers=st.sampled_from(["SGD", torch.optim.Adam])
    )

    @few
    @given(runs)
    def check(run: Finetune) -> None:
        assert run.dtype == "float32"
        assert run.optimizer in ("SGD", torch.optim.Adam)

    check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtypes": st.just("int8")},
            "dtypes drew 'int8', which is not one of bfloat16, float16, float32",
        ),
        (
            {"optimizers": st.just("Lion")},
            "optimizers drew 'Lion', which is not one of SGD, SGD+momentum, Adam, AdamW, NAdam, "
            "RAdam, RMSprop, Adagrad, Adafactor",
        ),
    ],
)
def test_what_strategies_draw_is_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        find(finetunes(**arguments), lambda run: True)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 is not at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not a positive number"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is not 0 or a positive number"),
        ({"dtype": "int8"}, "dtype='int8' is not one of bfloat16, float16, float32"),
        ({"frozen": PARAMETERS}, "frozen: all 21 parameters, nothing is trained"),
        (
            {"frozen": ["lm_head"]},
            "frozen: the decoder has no parameter lm_head; did you mean lm_head.weight?",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Finetune(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message
