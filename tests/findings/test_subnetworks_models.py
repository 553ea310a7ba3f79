"""Which weights of which models are filled: ties, shared memory, experts, wrappers, bad masks."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    SubnetError,
    UpdateMask,
    magnitude_mask,
    open_pair,
    subnetwork_necessity,
    subnetwork_sufficiency,
    update_mask,
)
from pytest_subnet.pairs.causal_lm import CausalLMPair, load_causal_lm_pair

TOKENS = torch.arange(12).reshape(2, 6) % 16
EXPERT = "model.layers.0.mlp.experts.{}.down_proj.weight"


def score(model):
    with torch.no_grad():
        return -model(TOKENS, labels=TOKENS).loss


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).eval()


def moe(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    config = Qwen3MoeConfig(
        **sizes, **heads, num_hidden_layers=1, num_experts_per_tok=2, vocab_size=16
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture
def rng():
    with torch.random.fork_rng():
        yield


def half(*names_shapes):
    random = np.random.default_rng(0)
    return UpdateMask.of({name: random.random(shape) < 0.5 for name, shape in names_shapes})


def test_a_pair_from_files_with_its_tokenizer_place_and_notes(tmp_path, rng):
    for name, seed in (("base", 0), ("tuned", 1)):
        gpt2(seed).save_pretrained(tmp_path / name)
    files = open_pair(tmp_path / "base", tmp_path / "tuned")
    pair = load_causal_lm_pair(files, "cpu")
    assert isinstance(pair, CausalLMPair)
    mask = magnitude_mask(tmp_path / "tuned", 0.3)
    kept = {name: each.clone() for name, each in pair.tuned.state_dict().items()}
    result = subnetwork_necessity(pair, mask, score, controls=2)
    assert result.drop != 0
    assert result.notes == (
        "10 tensors with 120 entries that the mask does not cover stay as tuned: "
        "transformer.h.0.ln_1.weight, transformer.h.0.ln_1.bias, "
        "transformer.h.0.attn.c_attn.bias, … 7 more",
    )
    now = pair.tuned.state_dict()
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert dict(result.fingerprints) == {
        "base": files.base.fingerprint(),
        "tuned": files.tuned.fingerprint(),
    }


def test_a_tied_tensor_is_filled_once_under_either_name(rng):
    base, tuned = gpt2(0), gpt2(1)
    flags = np.random.default_rng(0).random((16, 8)) < 0.5
    scores = []
    for names in (["transformer.wte.weight"], ["lm_head.weight"], None):
        names = names or ["transformer.wte.weight", "lm_head.weight"]
        mask = UpdateMask.of(dict.fromkeys(names, flags))
        result = subnetwork_sufficiency((base, tuned), mask, score, controls=0)
        assert len(result.per_tensor) == 1
        scores.append(result.subnetwork)
    assert len(set(scores)) == 1
    assert result.notes[1] == "lm_head.weight is tied, counted once"
    mask = UpdateMask.of({"transformer.wte.weight": flags, "lm_head.weight": ~flags})
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_sufficiency((base, tuned), mask, score)
    assert str(caught.value) == (
        "transformer.wte.weight and lm_head.weight are one tensor in GPT2LMHeadModel (tuned), and "
        "the mask holds other entries of each; leave one of them out of the mask"
    )


def test_memory_that_both_models_hold_is_written_to_by_no_fill(tmp_path, rng):
    base, tuned = gpt2(0), gpt2(0)
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight += 0.5
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    files = open_pair(tmp_path / "base", tmp_path / "tuned")
    shared = load_causal_lm_pair(files, "cpu", share_identical=True)
    apart = load_causal_lm_pair(files, "cpu")
    mlp = "transformer.h.0.mlp.{}.weight"
    mask = half((mlp.format("c_fc"), (8, 32)), (mlp.format("c_proj"), (32, 8)))
    expected = subnetwork_sufficiency(apart, mask, score, controls=3)
    before = {name: each.clone() for name, each in shared.base.state_dict().items()}

    def watching(model):
        now = shared.base.state_dict()
        assert all(torch.equal(now[name], before[name]) for name in now)
        return score(model)

    found = subnetwork_sufficiency(shared, mask, watching, controls=3)
    assert (found.full, found.subnetwork, found.random) == (
        expected.full,
        expected.subnetwork,
        expected.random,
    )
    assert found.notes[-1] == (
        "1 tensor holds the same memory in both models, and so nothing to fill"
    )
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_sufficiency(shared, mask, score, fill="zero")
    assert str(caught.value) == (
        "1 tensor of the mask holds the same memory in base and tuned (share_identical): "
        "transformer.h.0.mlp.c_proj.weight; fill='zero' would write to both models, so load them "
        'without sharing, or take fill="base"'
    )
    now = shared.base.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in now)


def test_fused_experts_of_a_live_model_meet_a_mask_from_files(tmp_path, rng):
    base, tuned = moe(0), moe(1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    files = open_pair(tmp_path / "base", tmp_path / "tuned")
    everything = update_mask(files, include="*.experts.*")
    flags = {name: np.zeros(everything.info(name).shape, bool) for name in everything}
    flags[EXPERT.format(2)][:, 1] = True
    seen = []

    def evaluate(model):
        seen.append(model.model.layers[0].mlp.experts.down_proj.detach().clone())
        return score(model)

    result = subnetwork_necessity((base, tuned), UpdateMask.of(flags), evaluate, controls=0)
    assert len(result.per_tensor) == 12
    expected = seen[0].clone()
    expected[2, :, 1] = base.model.layers[0].mlp.experts.down_proj[2, :, 1].detach()
    assert torch.equal(seen[3], expected)
    assert torch.equal(tuned.model.layers[0].mlp.experts.down_proj, seen[0])


def test_wrapped_models_under_the_names_of_the_bare_one(rng):
    base, tuned = gpt2(0), gpt2(1)
    mask = half(("transformer.h.0.mlp.c_fc.weight", (8, 32)))
    expected = subnetwork_sufficiency((base, tuned), mask, score, controls=2)
    wrapped = torch.nn.DataParallel(tuned)
    given = []

    def evaluate(model):
        given.append(model)
        return score(model.module)

    found = subnetwork_sufficiency((base, wrapped), mask, evaluate, controls=2)
    assert found.random == expected.random
    assert all(each is wrapped for each in given)
    inner = half(("h.0.mlp.c_fc.weight", (8, 32)))  # as older files name it
    assert subnetwork_sufficiency((base, tuned), inner, score, controls=0).subnetwork == (
        expected.subnetwork
    )


class Named(torch.nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, each in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(each, requires_grad=False))


FLAGS = [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("base", "tuned", "entries", "fill", "error", "text"),
    [
        (
            {"w": torch.zeros(2, 2)},
            {"w": torch.ones(2, 2)},
            {"x.y": FLAGS, "w": FLAGS},
            "zero",
            PairMismatchError,
            "the mask of given names 1 tensor that Named (tuned) does not have: x.y; make the mask "
            "from checkpoints of this model",
        ),
        (
            {"w": torch.zeros(2, 2)},
            {"w": torch.ones(2, 2)},
            {"w": [True, False]},
            "zero",
            PairMismatchError,
            "w of Named (tuned) has shape [2, 2], the mask of given was made for [2]; make it from "
            "checkpoints of this model",
        ),
        (
            {"w": torch.zeros(3, 2)},
            {"w": torch.ones(2, 2)},
            {"w": FLAGS},
            "base",
            PairMismatchError,
            "w of Named (base) has shape [3, 2], the mask of given was made for [2, 2]; make it "
            "from checkpoints of this model",
        ),
        (
            {"w": torch.zeros(2, 2, dtype=torch.bfloat16)},
            {"w": torch.ones(2, 2)},
            {"w": FLAGS},
            "base",
            PairMismatchError,
            "w is bfloat16 in base and float32 in tuned; load both in one dtype",
        ),
        (
            {"w": torch.zeros(2, 2)},
            {"w": torch.tensor([[1.0, float("nan")], [0, 0]])},
            {"w": FLAGS},
            "mean",
            SelectionError,
            'w of tuned has no finite mean: it holds NaN or Inf; take fill="base" or fill="zero", '
            "or leave it out of the mask",
        ),
        (
            {"w": torch.zeros(2, 2)},
            {"w": torch.ones(2, 2, dtype=torch.int32)},
            {"w": FLAGS},
            "mean",
            SelectionError,
            'w is int32, which has no mean; take fill="zero" or fill="base", or leave it out of '
            "the mask",
        ),
    ],
)
def test_what_cannot_be_filled(base, tuned, entries, fill, error, text):
    with pytest.raises(error) as caught:
        subnetwork_sufficiency(
            (Named(**base), Named(**tuned)), UpdateMask.of(entries), lambda _: 0, fill=fill
        )
    assert str(caught.value) == text


def test_a_model_that_base_or_shape_do_not_concern_is_not_looked_at():
    other = Named(unrelated=torch.zeros(3))
    mask = UpdateMask.of({"w": FLAGS})
    result = subnetwork_sufficiency(
        (other, Named(w=torch.ones(2, 2))), mask, lambda model: model.w.sum(), fill="zero"
    )
    assert (result.full, result.subnetwork, result.complement) == (4, 1, 3)


def test_a_mask_of_another_base_is_refused_where_that_is_known(rng):
    base, tuned, other = gpt2(0), gpt2(1), gpt2(2)
    with torch.no_grad():
        for model in (tuned, other):
            for name, each in model.named_parameters():
                last = each[..., -1:].clone()
                each.copy_(base.get_parameter(name))
                each[..., -1:] = last
    mask = update_mask(open_pair(other, tuned))
    with pytest.raises(PairMismatchError, match=r"was made from another base than GPT2LMHeadModel"):
        subnetwork_sufficiency((base, tuned), mask, score)
    given = UpdateMask.of({name: mask[name] for name in mask})
    assert subnetwork_necessity((base, tuned), given, score, controls=0).replaced_inside
    own = update_mask(open_pair(base, tuned))
    assert subnetwork_sufficiency((base, tuned), own, score, controls=1).replaced_outside == 0


def test_one_model_twice():
    model = Named(w=torch.ones(2, 2))
    mask = UpdateMask.of({"w": FLAGS})
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_sufficiency((model, model), mask, lambda _: 0)
    assert str(caught.value) == (
        "base and tuned are one model, of which nothing was updated; keep a copy before training "
        "(copy.deepcopy), or load the base again"
    )


def test_what_is_written_behind_torchs_back_is_found_out_and_put_back():
    """`.data` counts no writes, and what the mask does not cover is never filled anew."""
    base, tuned = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    bias = tuned.bias.detach().clone()

    def score(model):
        model.bias.data.zero_()
        return model.weight.detach().sum()

    with pytest.raises(SubnetError) as caught:
        subnetwork_sufficiency((base, tuned), UpdateMask.of({"weight": torch.eye(4)}), score)
    assert str(caught.value) == (
        "evaluate wrote to 1 tensor of Linear that the mask does not cover: bias; all is put back. "
        "Only run the model there"
    )
    assert torch.equal(tuned.bias, bias)


def test_the_statistics_of_a_batch_norm_in_train_mode_are_put_back():
    base, tuned = (
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)
    )
    before = {name: each.clone() for name, each in tuned.state_dict().items()}
    mask = UpdateMask.of({"0.weight": torch.eye(4)})
    inputs = torch.arange(8.0).reshape(2, 4)
    with pytest.raises(SubnetError, match=r"^evaluate wrote to the weights of Sequential"):
        subnetwork_sufficiency((base, tuned), mask, lambda model: model(inputs).sum())
    assert all(torch.equal(each, before[name]) for name, each in tuned.state_dict().items())
