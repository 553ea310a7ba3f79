"""Tensors of any dtype out of its bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies import tensors
from pytest_subnet.strategies.arguments import DRAWABLE
from pytest_subnet.strategies.words import choose_words, spread

FLOATING = [name for name in DRAWABLE if "float" in name]
FEW = settings(max_examples=50, database=None, deadline=None)


def drawn(strategy):
    return find(strategy, lambda value: True, settings=FEW)


@pytest.mark.parametrize("dtype", DRAWABLE)
def test_every_dtype_is_drawn_in_the_shape_that_was_asked_for(dtype):
    @FEW
    @given(
        tensors(dtypes=st.just(getattr(torch, dtype)), shapes=st.just((3, 0, 2)) | st.just((5,)))
    )
    def check(tensor):
        assert tensor.dtype is getattr(torch, dtype)
        assert tuple(tensor.shape) in ((3, 0, 2), (5,))
        assert tensor.is_contiguous()

    check()


@pytest.mark.parametrize("dtype", [name for name in FLOATING if "8" in name])
def test_every_word_of_eight_bits_can_come_up(dtype):
    choice = choose_words(dtype, allow_nan=True, allow_infinity=True)

    ranks = range(len(choice.simple) + 256)

    assert set(choice.words(ranks)) == set(range(256))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("flag", ["allow_nan", "allow_infinity", "allow_subnormal"])
def test_what_is_not_allowed_is_never_a_word(dtype, flag):
    allowed = {"allow_nan": True, "allow_infinity": True, "allow_subnormal": True, flag: False}
    choice = choose_words(dtype, **allowed)
    bits = choice.storage.bits
    step = 1 if bits <= 16 else 2**bits // 65_521
    words = choice.words(range(0, len(choice.simple) + 2**bits, step))

    values = choice.storage.tensor(np.array(words, choice.storage.unsigned), (len(words),)).double()

    if flag == "allow_nan":
        assert not values.isnan().any()
    elif flag == "allow_infinity":
        assert not values.isinf().any()
    else:
        normal = torch.finfo(getattr(torch, dtype)).smallest_normal
        assert not ((values != 0) & (values.abs() < normal)).any()


@FEW
@given(tensors(dtypes=st.just("bfloat16"), shapes=st.just((64,)), allow_nan=False))
def test_spreading_words_over_a_tensor_makes_no_nan(tensor):
    assert not tensor.isnan().any()


@FEW
@given(tensors(dtypes=st.just("float16"), shapes=st.just((9,)), elements=st.sampled_from([1, 0.1])))
def test_entries_are_the_elements_rounded(tensor):
    assert set(tensor.tolist()) <= {1.0, 0.0999755859375}


def test_few_words_give_a_large_tensor_many_values():
    choice = choose_words("float32")

    words = spread(choice, [choice.simple[1]], 10**6, 1)

    values = choice.storage.tensor(words, (1000, 1000))
    assert len(values.unique()) > 1000
    assert 0.4 < (values == 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (tensors(), "tensors()"),
        (
            tensors(dtypes=st.just("int8"), allow_nan=False),
            "tensors(dtypes=just('int8'), allow_nan=False)",
        ),
    ],
)
def test_a_repr_is_the_call(strategy, text):
    assert repr(strategy) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtypes": "int8"},
            "Expected a strategy but got dtypes='int8' (type=str); st.just(...) makes one of a "
            "value",
        ),
        (
            {"shapes": (2, 3)},
            "Expected a strategy but got shapes=(2, 3) (type=tuple); st.just(...) makes one of a "
            "value",
        ),
        ({"allow_nan": 1}, "Expected bool but got allow_nan=1 (type=int)"),
        (
            {"allow_nan": False, "elements": st.just(1.0)},
            "Cannot have allow_nan=False with elements; draw none of these",
        ),
        (
            {"dtypes": st.just("complex64")},
            f"dtypes drew 'complex64', which is not one of {', '.join(DRAWABLE)}",
        ),
        ({"shapes": st.just((2, -1))}, "shapes drew (2, -1), which is not a shape"),
        ({"shapes": st.just(3)}, "shapes drew 3, which is not a shape"),
        (
            {"dtypes": st.just("float16"), "elements": st.just(1e6)},
            "elements drew 1000000.0, which float16 stores as inf",
        ),
        (
            {"dtypes": st.just("uint8"), "elements": st.just(256)},
            "elements drew 256, which uint8 cannot store",
        ),
        (
            {"dtypes": st.just("uint8"), "elements": st.just(math.nan)},
            "elements drew nan, which uint8 cannot store",
        ),
        (
            {"elements": st.just("\x1b[1m")},
            "elements drew '\\x1b[1m' (type=str), which is not a number",
        ),
    ],
)
def test_wrong_arguments_are_refused_when_it_draws(arguments, message):
    strategy = tensors(**arguments)

    with pytest.raises(InvalidArgument) as caught:
        drawn(strategy)

    assert str(caught.value) == message
