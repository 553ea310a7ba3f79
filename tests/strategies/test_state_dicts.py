"""State dicts under the names of real models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.strategies import state_dicts
from pytest_subnet.strategies.names import FAMILIES, Sizes, shapes_of

FEW = settings(max_examples=60, database=None, deadline=None)
KINDS = {
    *("embed", "head", "position", "norm", "bias", "router", "qkv_proj", "q_proj", "k_proj"),
    *("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
SMALL = {"hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8, "max_position_embeddings": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=6, num_hidden_layers=2, num_key_value_heads=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=4, n_head=1, n_layer=2, n_inner=6, vocab_size=8, n_positions=8)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=6, num_hidden_layers=2)
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_names_and_shapes_are_those_of_the_real_model(family):
    real = {name: tuple(each.shape) for name, each in MODELS[family]().state_dict().items()}
    sizes = Sizes(hidden=4, inner=6, vocabulary=8, layers=2, experts=1)

    shapes = shapes_of(FAMILIES[family], sizes, [True] * 20)

    assert shapes.items() <= real.items()
    assert FAMILIES[family].head in {*real, "embed_out.weight"}


@FEW
@given(state_dicts())
def test_every_name_says_what_its_tensor_is_for(weights):
    assert {kind_of(name) for name in weights} <= KINDS
    assert len({tensor.dtype for tensor in weights.values()}) == 1
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in weights.values())


@FEW
@given(state_dicts())
def test_only_a_tied_head_shares_memory(weights):
    owners = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    tied = len(weights) - len(owners)

    assert tied == len(weights) - len(set(map(id, weights.values())))
    assert tied <= 1


@pytest.mark.parametrize(
    "part", ["c_attn", "query_key_value", "experts.1.w2", "k_proj", "norm", "lm_head"]
)
def test_every_part_comes_up(part):
    found = find(
        state_dicts(dtypes=st.just("float32")),
        lambda weights: any(part in name for name in weights),
        settings=settings(FEW, max_examples=500),
    )

    assert {each.dtype for each in found.values()} == {torch.float32}


def test_nan_comes_up_where_it_is_allowed():
    find(
        state_dicts(allow_nan=True),
        lambda weights: any(each.isnan().any() for each in weights.values()),
        settings=settings(FEW, max_examples=500),
    )


def test_wrong_arguments_are_refused_when_it_draws():
    with pytest.raises(InvalidArgument) as caught:
        find(state_dicts(allow_infinity="no"), lambda weights: True)

    assert str(caught.value) == "Expected bool but got allow_infinity='no' (type=str)"
