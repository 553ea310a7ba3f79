"""Two models on the same prompts: against brute force, closed forms, and in every family."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from pytest_subnet import assert_behaviour_close, behaviour_shift, open_checkpoint
from pytest_subnet.findings.behaviour.counts import compared
from pytest_subnet.findings.behaviour.prompts import TOKENS, Prompt, batches

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 2},
    "qwen2": SIZES,
    "qwen3_moe": SIZES | EXPERTS,
    "deepseek_v3": SIZES
    | {
        "first_k_dense_replace": 1,
        "head_dim": 4,
        "kv_lora_rank": 4,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 4,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "topk_group": 1,
        "v_head_dim": 4,
    },
    "gemma": SIZES,
    "gemma2": SIZES,
    "gemma3_text": SIZES,
    "olmo2": SIZES,
    "phi": SIZES | {"num_key_value_heads": 2},
    "phi3": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 48},
    "gpt_neox": SIZES,
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48},
}
law = settings(max_examples=40, derandomize=True, deadline=None, database=None)
PROMPTS = [
    [5, 9, 14, 3],
    [7, 7],
    [11, 40, 2, 2, 33, 8, 21, 0, 5, 17, 4],
    [30, 31, 32, 33, 34, 35],
]


class Table(torch.nn.Module):
    """Predicts by the last token alone: its logits are a row of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask):
        return self.logits[input_ids]


def tables(*, size=7, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(Table(scale * torch.randn(size, size, generator=generator)) for _ in range(2))


def build(family, *, seed):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def expected(base, tuned, ids):
    """One prompt alone, in float64: KL, reverse KL, agreement and both log-probabilities."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        given = [m(input_ids=ids, attention_mask=torch.ones_like(ids)) for m in (base, tuned)]
    p, q = (getattr(each, "logits", each)[0, :-1].double().numpy() for each in given)
    following = (np.arange(len(p)), ids[0, 1:].numpy())
    return (
        rel_entr(softmax(p, 1), softmax(q, 1)).sum(1),
        rel_entr(softmax(q, 1), softmax(p, 1)).sum(1),
        p.argmax(1) == q.argmax(1),
        log_softmax(p, 1)[following],
        log_softmax(q, 1)[following],
    )


def check(result, base, tuned, prompts, rel):
    single = [expected(base, tuned, ids) for ids in prompts]
    for row, (kl, reverse, agree, before, after) in zip(result.per_prompt, single, strict=True):
        assert row.tokens == len(kl)
        assert row.kl == pytest.approx(kl.mean(), rel=rel)
        assert row.reverse_kl == pytest.approx(reverse.mean(), rel=rel)
        assert row.max_kl == pytest.approx(kl.max(), rel=rel)
        assert row.agreed == agree.sum()
        assert row.base_logprob == pytest.approx(before.mean(), rel=rel)
        assert row.tuned_logprob == pytest.approx(after.mean(), rel=rel)
    kl, reverse, agree, before, after = (np.concatenate(each) for each in zip(*single, strict=True))
    assert result.tokens == len(kl) == sum(map(len, prompts)) - len(prompts)
    assert result.kl == pytest.approx(kl.mean(), rel=rel)
    assert result.reverse_kl == pytest.approx(reverse.mean(), rel=rel)
    assert result.max_kl == pytest.approx(kl.max(), rel=rel)
    assert result.top1_agreement == agree.mean()
    assert result.logprob_shift == pytest.approx((after - before).mean(), rel=rel, abs=1e-6)


def test_against_brute_force():
    base, tuned = tables()
    prompts = [[0, 3, 6, 1], [2, 2], [5, 4, 3, 2, 1, 0, 6, 6]]
    check(behaviour_shift((base, tuned), prompts), base, tuned, prompts, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_together_every_family_predicts_as_one_prompt_at_a_time(family):
    base, tuned = build(family, seed=0), build(family, seed=1)
    result = behaviour_shift((base, tuned), PROMPTS)
    assert [row.number for row in result.per_prompt] == [0, 1, 2, 3]
    check(result, base, tuned, PROMPTS, rel=1e-3)
    assert result.vocabulary == 48


def test_in_bfloat16_identical_copies_are_identical():
    base, tuned = (build("llama", seed=0).bfloat16() for _ in range(2))
    result = behaviour_shift((base, tuned), PROMPTS, generate=4)
    assert result.identical
    assert (result.kl, result.reverse_kl, result.top1_agreement) == (0, 0, 1)
    assert (result.logprob_shift, result.generations_equal) == (0, 1)
    assert result.dtype == "bf16"


def test_a_tensor_of_ids_and_lists_of_them_are_the_same():
    pair = tables()
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert behaviour_shift(pair, ids) == behaviour_shift(pair, ids.tolist())
    assert behaviour_shift(pair, ids) == behaviour_shift(pair, list(ids.int()))
    assert behaviour_shift(pair, ids) == behaviour_shift(pair, iter(ids.tolist()))


def test_a_long_prompt_counts_for_more():
    pair = tables()
    short, long = behaviour_shift(pair, [[0, 1]]), behaviour_shift(pair, [[2, 3, 4, 5]])
    both = behaviour_shift(pair, [[0, 1], [2, 3, 4, 5]])
    assert both.kl == pytest.approx((short.kl + 3 * long.kl) / 4)


@given(
    logits=st.lists(
        st.lists(st.floats(-60, 60, width=32), min_size=8, max_size=8), min_size=2, max_size=5
    ),
    seed=st.integers(0, 9),
)
@law
def test_laws_of_divergence(logits, seed):
    base = torch.tensor(logits)
    other = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    places, targets = torch.arange(len(base)), torch.zeros(len(base), dtype=torch.int64)

    def ask(one, two):
        return compared(one, two, places, targets)

    there, back = ask(base, other), ask(other, base)
    assert (there[:, :2] >= 0).all()
    np.testing.assert_allclose(there[:, 0], back[:, 1], rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(there[:, 2], back[:, 2])
    assert (ask(base, base)[:, :2] == 0).all()
    np.testing.assert_allclose(ask(base + 8, other)[:, :2], there[:, :2], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_tiny_shift_keeps_its_digits_behind_large_logits(size):
    """Where -sum p (log q - log p) in float32 would give the error of the normalisation."""
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(20, 500, generator=generator) + 90
    tuned = base + size * torch.randn(base.shape, generator=generator)
    found = compared(base, tuned, torch.arange(20), torch.zeros(20, dtype=torch.int64))
    p, q = (softmax(each.double().numpy(), 1) for each in (base, tuned))
    np.testing.assert_allclose(found[:, 0], rel_entr(p, q).sum(1), rtol=0.02)
    np.testing.assert_allclose(found[:, 1], rel_entr(q, p).sum(1), rtol=0.02)


def test_tokens_that_are_out_of_the_question():
    never = -torch.inf
    base = torch.tensor([[0.0, 0.0, never], [0.0, 0.0, 0.0], [0.0, never, 0.0], [0.0, 0.0, -200.0]])
    tuned = torch.tensor([[0.0, 1.0, never], [0.0, 0.0, never], [0.0, 0.0, 0.0], [0.0, 0.0, 200.0]])
    found = compared(base, tuned, torch.arange(4), torch.zeros(4, dtype=torch.int64))
    p, q = (softmax(each.double().numpy(), 1) for each in (base, tuned))
    np.testing.assert_allclose(found[:, 0], [*rel_entr(p, q).sum(1)[:3], 200 - math.log(2)])
    np.testing.assert_allclose(found[:, 1], rel_entr(q, p).sum(1), rtol=1e-6)
    assert found[1, 0] == found[2, 1] == math.inf


def test_pieces_are_put_together(monkeypatch):
    from pytest_subnet.findings.behaviour import counts as behaviour_counts

    pair = tables()
    whole = behaviour_shift(pair, PROMPTS_OF_7)
    monkeypatch.setattr(behaviour_counts, "ENTRIES", 14)
    assert behaviour_shift(pair, PROMPTS_OF_7) == whole


PROMPTS_OF_7 = [[0, 1, 2, 3, 4, 5, 6], [6, 5], [1, 1, 1, 1]]


@given(st.lists(st.integers(2, 700), min_size=1, max_size=60), st.booleans(), st.integers(0, 64))
@law
def test_batches_hold_every_prompt_once_and_no_more_than_they_may(lengths, padded, new):
    prompts = [Prompt(n, "", torch.full((size,), n + 1)) for n, size in enumerate(lengths)]
    seen = []
    for batch in batches(prompts, padded=padded, new=new):
        rows, longest = batch.ids.shape
        assert rows == 1 or rows * (longest + new) <= TOKENS
        assert padded or batch.attention.all()
        assert not batch.ids[batch.attention == 0].any()
        assert torch.equal(
            batch.attention.sum(1), torch.tensor([len(p.ids) for p in batch.prompts])
        )
        places, targets = batch.predictions()
        assert len(places) == len(targets) == int(batch.attention.sum()) - rows
        assert torch.equal(batch.ids.flatten()[places + 1], targets)
        seen += [prompt.number for prompt in batch.prompts]
    assert sorted(seen) == list(range(len(lengths)))
    sizes = [lengths[number] for number in seen]
    assert sizes == sorted(sizes, reverse=True)


def test_the_logits_of_one_batch_are_gone_before_the_next_is_asked():
    alive = []

    class Watched(Table):
        def forward(self, input_ids, attention_mask):
            # The base's are there while the tuned model is asked; nothing of a batch before is.
            assert sum(each() is not None for each in alive) <= 1
            logits = super().forward(input_ids, attention_mask)
            alive.append(weakref.ref(logits))
            return logits

    base, tuned = (Watched(each.logits.detach()) for each in tables())
    behaviour_shift((base, tuned), torch.zeros(5, 900, dtype=torch.int64))
    assert len(alive) == 10


def test_in_a_callers_autocast_weights_are_as_they_are_now() -> None:
    base, tuned = build("llama", seed=0), build("llama", seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        behaviour_shift((base, tuned), PROMPTS)
        tuned.load_state_dict(base.state_dict())
        assert behaviour_shift((base, tuned), PROMPTS).kl == 0


def test_models_come_back_as_they_were():
    base, tuned = build("gpt2", seed=0).train(), build("gpt2", seed=1).train()
    base.transformer.h[0].eval()  # a part that someone keeps from training
    base.lm_head.requires_grad_(False)
    seen = []
    tuned.register_forward_hook(lambda m, i, o: seen.append((m.training, o.logits.requires_grad)))
    before = [
        [(part.training) for part in model.modules()]
        + [(each.requires_grad, each.grad is None) for each in model.parameters()]
        for model in (base, tuned)
    ]
    one, other = (behaviour_shift((base, tuned), PROMPTS) for _ in range(2))
    assert one == other  # no dropout
    assert seen == [(False, False)] * 2
    assert before == [
        [(part.training) for part in model.modules()]
        + [(each.requires_grad, each.grad is None) for each in model.parameters()]
        for model in (base, tuned)
    ]
    assert torch.is_grad_enabled()


def test_models_come_back_as_they_were_from_an_error():
    base, tuned = tables()
    tuned.forward = None
    with pytest.raises(TypeError):
        behaviour_shift((base.train(), tuned), [[0, 1]])
    assert base.training
    assert tuned.training
    assert torch.is_grad_enabled()


def test_greedy_generations_are_compared_when_asked():
    base, tuned = build("llama", seed=0), build("llama", seed=1)
    result = behaviour_shift((base, tuned), PROMPTS, generate=6)

    def by_hand(model, ids):
        ids = list(ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        return ids

    for row, ids in zip(result.per_prompt, PROMPTS, strict=True):
        one, other = by_hand(base, ids)[len(ids) :], by_hand(tuned, ids)[len(ids) :]
        first = next((n for n in range(6) if one[n : n + 1] != other[n : n + 1]), None)
        assert row.first_difference == first
    assert result.generations_equal == 0
    assert "generations_equal=0" in repr(result)
    assert result.rows()[0]["writes"] == "another token 0"
    assert behaviour_shift((base, tuned), PROMPTS).generations_equal is None


def test_writing_ends_where_a_model_ends():
    def model(end):
        built = build("llama", seed=0)
        built.generation_config.eos_token_id = end
        return built

    base = model(None)
    ids = torch.tensor([[5, 9, 14]])
    written = base.generate(ids, max_new_tokens=5, do_sample=False)[0, 3:].tolist()
    place = written.index(written[2])
    assert behaviour_shift((base, model(None)), ids, generate=5).generations_equal == 1
    both = behaviour_shift((model(written[2]), model([47, written[2]])), ids, generate=5)
    assert both.generations_equal == 1
    stops = behaviour_shift((base, model(written[2])), ids, generate=5)
    assert stops.per_prompt[0].first_difference == place + 1


def test_the_settings_of_a_checkpoint_do_not_keep_it_from_being_greedy():
    base, tuned = build("llama", seed=0), build("llama", seed=0)
    tuned.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3, max_length=3
    )
    assert behaviour_shift((base, tuned), PROMPTS, generate=8).generations_equal == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"suppress_tokens": list(range(2, 40))},
        {"forced_eos_token_id": 5, "min_new_tokens": 8},
        {"return_dict_in_generate": True, "num_return_sequences": 2},
        {"stop_strings": ["."]},
    ],
)
def test_what_a_checkpoint_forbids_or_enforces_is_no_choice_of_the_model(asked):
    base, tuned = build("llama", seed=0), build("llama", seed=0)
    config = tuned.generation_config
    for name, value in asked.items():  # unchecked, as it is read from a file
        setattr(config, name, value)
    assert behaviour_shift((base, tuned), PROMPTS, generate=8).generations_equal == 1
    assert tuned.generation_config is config


def test_common_tokens_only_when_asked():
    base, tuned = Table(torch.eye(5)), Table(torch.randn(7, 7, generator=torch.Generator()))
    result = behaviour_shift((base, tuned), [[0, 4, 3]], vocab="common")
    cut = behaviour_shift((base, Table(tuned.logits.detach()[:5, :5])), [[0, 4, 3]])
    assert result.per_prompt == cut.per_prompt
    assert result.vocabulary == 5
    assert result.notes == ("5 -> 7 tokens: 2 more, of which none can be chosen here",)


def test_the_result_says_what_it_is(recorded):
    base, tuned = tables()
    result = behaviour_shift((base, tuned), [[0, 1, 2], [3, 4]])
    assert recorded == [result]
    said = result.to_dict()
    assert said["finding"] == "behaviour_shift"
    assert (said["prompts"], said["tokens"], said["vocabulary"]) == (2, 3, 7)
    assert (said["kl"], said["reverse_kl"]) == (result.kl, result.reverse_kl)
    assert (said["device"], said["dtype"], said["pair"]) == ("cpu", "f32", "Table -> Table")
    assert result.table().splitlines()[1] == (
        "  pair       Table -> Table   (f32, cpu, 2 prompts, 3 tokens predicted among 7)"
    )
    assert len(result.rows()) == 2
    assert "\n" not in repr(result)


def test_fingerprints_are_of_the_weights_and_the_prompts_and_keep_nothing_alive():
    base, tuned = tables()
    prints = behaviour_shift((base, tuned), [[0, 1, 2]]).fingerprints
    others = behaviour_shift((base, tuned), [[0, 1], [2, 0]]).fingerprints
    assert prints["base"] == open_checkpoint(base).fingerprint() == others["base"]
    assert prints["tuned"] == open_checkpoint(tuned).fingerprint()
    assert prints["base_prompts"] != others["base_prompts"]
    unasked = behaviour_shift((base, tuned), [[0, 1, 2]]).fingerprints
    watched = weakref.ref(base)
    del base
    assert watched() is None
    assert unasked["base"] == ""


def test_weights_that_moved_on_have_no_fingerprint():
    from pytest_subnet import CheckpointError

    base, tuned = tables()
    prints = behaviour_shift((base, tuned), [[0, 1, 2]]).fingerprints
    with torch.no_grad():
        tuned.logits += 1
    with pytest.raises(
        CheckpointError, match=r"^Table changed after it was measured; measure it a"
    ):
        prints["tuned"]


def test_a_bound_that_holds(recorded):
    pair = tables(scale=0.01)
    result = assert_behaviour_close(pair, [[0, 1, 2], [3, 4]], max_kl=0.001)
    assert result == behaviour_shift(pair, [[0, 1, 2], [3, 4]])
    assert recorded[0] == result
    assert 0 < result.kl < 0.001


def test_a_bound_that_does_not_hold(fails_with):
    pair = Table(torch.zeros(4, 4)), Table(torch.diag(torch.arange(4.0)))
    prompts = [[0, 1], [3, 3, 1], [2, 2], [1, 3], [0, 0]]
    with fails_with("""
        KL(base || tuned) of 0.428 nats a token is above the allowed 0.1
          pair       Table -> Table   (f32, cpu, 5 prompts, 6 tokens predicted among 4)
          behaviour  reverse KL 0.383, same first choice for 33.33%, log-prob of the text +0.0304
          worst      prompt 1  1 nats over 2 tokens
                     prompt 2  0.454 nats over 1 token
                     prompt 3  0.107 nats over 1 token
                     … 2 more
          usually    too high a learning rate or too many steps, no KL term, or prompts that
                     the tuning was about, where it was meant to change
          to accept  max_kl=0.43
    """):
        assert_behaviour_close(pair, prompts, max_kl=0.1)
    assert_behaviour_close(pair, prompts, max_kl=0.43)


def test_nothing_differs(fails_with):
    pair = Table(torch.eye(4)), Table(torch.eye(4))
    with fails_with("""
        nothing differs: base and tuned predict the same to the last bit
          pair       Table -> Table   (f32, cpu, 1 prompt, 1 token predicted among 4)
          usually    the base was saved again, an adapter was not merged, no optimiser step
                     was made, or each was smaller than half a step of the storage dtype
          to accept  allow_identical=True
    """):
        assert_behaviour_close(pair, [[0, 1]], max_kl=0.1)
    assert assert_behaviour_close(pair, [[0, 1]], max_kl=0, allow_identical=True).identical


def test_a_failure_is_reworded():
    pair = tables()
    with pytest.raises(AssertionError, match=r"^run 7: KL\(base"):
        assert_behaviour_close(pair, [[0, 1]], max_kl=0.0, message=lambda text: f"run 7: {text}")


def test_an_infinite_divergence_fails_and_offers_no_bound():
    never = torch.full((3, 3), -torch.inf).fill_diagonal_(0.0)
    pair = Table(torch.zeros(3, 3)), Table(never)
    with pytest.raises(AssertionError, match=r"^KL\(base \|\| tuned\) of inf nats") as caught:
        assert_behaviour_close(pair, [[0, 0]], max_kl=9.0)
    assert "to accept" not in str(caught.value)
    assert behaviour_shift(pair, [[0, 0]]).to_dict()["kl"] is None
