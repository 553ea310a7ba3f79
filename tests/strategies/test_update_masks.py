"""Masks, each tensor of a density of its own."""

from __future__ import annotations

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet import mask_overlap
from pytest_subnet.strategies import update_masks

FEW = settings(max_examples=60, database=None, deadline=None)
SHAPES = {"embed.weight": (7, 3), "layers.0.weight": (4, 5), "norm.weight": ()}


@FEW
@given(update_masks(shapes=st.just(SHAPES), densities=st.just(0.3)))
def test_every_tensor_has_the_density_that_was_drawn(mask):
    assert {each.name: (each.shape, each.entries) for each in mask.tensors} == {
        "embed.weight": ((7, 3), 6),
        "layers.0.weight": ((4, 5), 6),
        "norm.weight": ((), 0),
    }


def test_densities_differ_within_a_mask():
    mask = find(
        update_masks(shapes=st.just({"a": (4,), "b": (4,)})),
        lambda mask: mask.info("a").entries == 4 and not mask.info("b").entries,
        settings=settings(FEW, max_examples=500),
    )

    assert mask.density == 0.5


@FEW
@given(
    *[update_masks(shapes=st.just(SHAPES), densities=st.sampled_from([0.25, 0.5])) for _ in "ab"]
)
def test_the_share_of_one_mask_times_its_density_is_that_of_the_other(a, b):
    found = mask_overlap(a, b, null="matrix")

    assert found.one_sided_a * a.density == pytest.approx(found.one_sided_b * b.density)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": st.just({})}, "shapes drew {}, which is no mapping from names to shapes"),
        (
            {"shapes": st.just({1: ()})},
            "shapes drew {1: ()}, which is no mapping from names to shapes",
        ),
        ({"shapes": st.just({"a": 3})}, "shapes drew 3, which is not a shape"),
        ({"densities": st.just(1.5)}, "densities drew 1.5, which is not within [0, 1]"),
        (
            {"densities": 0.5},
            "Expected a strategy but got densities=0.5 (type=float); st.just(...) makes one of a "
            "value",
        ),
    ],
)
def test_wrong_arguments_are_refused_when_it_draws(arguments, message):
    strategy = update_masks(**arguments)

    with pytest.raises(InvalidArgument) as caught:
        find(strategy, lambda mask: True, settings=FEW)

    assert str(caught.value) == message
