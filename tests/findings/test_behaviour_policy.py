"""How likely training data is under the base."""

from __future__ import annotations

import math

import pytest
import torch

from pytest_subnet import SubnetError, assert_near_policy, near_policy, open_checkpoint


class Table(torch.nn.Module):
    """Predicts by the last token alone: its logits are a row of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask):
        return self.logits[input_ids]


@pytest.fixture
def model():
    return Table(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))


SAMPLES = [[0, 1, 2, 3, 4], [5, 5], [3, 1, 1]]


def test_against_torch(model):
    result = near_policy(model, SAMPLES)
    for row, ids in zip(result.per_sample, SAMPLES, strict=True):
        ids = torch.tensor(ids)
        loss = torch.nn.functional.cross_entropy(model.logits[ids[:-1]].double(), ids[1:])
        assert row.nll == pytest.approx(loss.item(), rel=1e-6)
        assert row.tokens == len(ids) - 1
    mean = sum(row.nll * row.tokens for row in result.per_sample) / 7
    assert result.nll == pytest.approx(mean)
    assert result.perplexity == pytest.approx(math.exp(mean))
    assert (result.tokens, result.samples, result.vocabulary) == (7, 3, 6)


def test_it_is_the_loss_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32))
    ids = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = llama.eval()(ids, labels=ids).loss
    assert near_policy(llama, ids).nll == pytest.approx(loss.item(), rel=1e-5)


def test_what_a_model_samples_has_its_entropy(model):
    """The in-distribution condition: on its own samples the likelihood is the entropy."""
    generator = torch.Generator().manual_seed(0)
    chances = model.logits.detach().softmax(1)
    ids = torch.zeros(200, 40, dtype=torch.int64)
    for step in range(39):
        ids[:, step + 1] = torch.multinomial(chances[ids[:, step]], 1, generator=generator)[:, 0]
    visited = ids[:, :-1].flatten()
    entropy = -(chances * chances.log()).sum(1)[visited].mean().item()
    assert near_policy(model, ids).nll == pytest.approx(entropy, rel=0.02)
    strange = torch.randint(6, ids.shape, generator=generator)
    assert near_policy(model, strange).nll > entropy + 0.2


def test_a_model_that_knows_nothing_is_at_chance():
    result = near_policy(Table(torch.zeros(6, 6)), SAMPLES)
    assert result.nll == pytest.approx(math.log(6)) == result.chance_nll


def test_of_a_pair_it_is_the_base(model):
    other = Table(torch.zeros(6, 6))
    alone = near_policy(model, SAMPLES)
    assert near_policy((model, other), SAMPLES) == alone
    assert near_policy((model, other, None), SAMPLES) == alone
    assert near_policy((model, None), SAMPLES) == alone


def test_the_result_says_what_it_is(model, recorded):
    result = near_policy(model, SAMPLES)
    assert recorded == [result]
    assert result.to_dict() == {
        "finding": "near_policy",
        "model": "Table",
        "device": "cpu",
        "dtype": "f32",
        "vocabulary": 6,
        "samples": 3,
        "tokens": 7,
        "nll": result.nll,
        "perplexity": result.perplexity,
        "chance_nll": math.log(6),
    }
    assert result.table().splitlines()[1] == (
        "  model      Table   (f32, cpu, 3 samples, 7 tokens predicted among 6)"
    )
    assert result.fingerprints["base"] == open_checkpoint(model).fingerprint()
    assert model.training


def test_a_bound_that_does_not_hold(fails_with):
    base = Table(torch.eye(4) * 3)
    with fails_with("""
        negative log-likelihood of 1.64 nats a token is above the allowed 1
          model      Table   (f32, cpu, 3 samples, 4 tokens predicted among 4)
          of chance  1.39 nats: every token of the vocabulary alike
          worst      sample 0  3.14 nats over 1 token
                     sample 2  1.64 nats over 2 tokens
                     sample 1  0.139 nats over 1 token
          usually    data that another model or people wrote, or another chat template than
                     the base was trained with; updates on such data are dense
          to accept  max_nll=1.7
    """):
        assert_near_policy(base, [[0, 1], [2, 2], [3, 3, 2]], max_nll=1)
    assert assert_near_policy(base, [[2, 2], [3, 3]], max_nll=0.14).nll < 0.14


def test_nothing_is_predicted(model):
    with torch.no_grad():
        model.logits[1, 3] = torch.nan
    with pytest.raises(SubnetError) as caught:
        near_policy(model, SAMPLES)
    assert str(caught.value) == (
        "base (Table) predicts NaN after position 1 of sample 0; look for NaN in its weights with "
        "assert_finite, or take a dtype with more range"
    )
    assert model.training


@pytest.mark.parametrize(
    ("samples", "error", "text"),
    [
        ([], ValueError, "no samples: there is nothing to predict"),
        (
            [[0, 1], [2]],
            ValueError,
            "sample 1 is 1 token: the first token is not predicted, so it takes two",
        ),
        (
            [[0, 6]],
            ValueError,
            "sample 0 has token id 6 at position 1, which is not in the vocabulary: they go to 5",
        ),
        (
            ["a text"],
            TypeError,
            "sample 0 is a text and there is no tokenizer; pass (base, tuned, tokenizer), save "
            "one beside the weights, or pass token ids",
        ),
    ],
)
def test_samples_that_are_none(samples, error, text):
    class Ranged(Table):
        def get_input_embeddings(self):
            return torch.nn.Embedding(6, 1)

    with pytest.raises(error) as caught:
        near_policy(Ranged(torch.zeros(6, 6)), samples)
    assert str(caught.value) == text


def test_models_that_are_none(model):
    with pytest.raises(TypeError) as caught:
        near_policy("base", SAMPLES)
    assert str(caught.value) == (
        "base is str, not a module; behaviour is measured on loaded models, as the fixture "
        "causal_lm_pair gives them"
    )
    with pytest.raises(TypeError) as caught:
        near_policy((model,), SAMPLES)
    assert str(caught.value) == (
        "a model is needed, (model, tokenizer), or a pair as the fixture causal_lm_pair gives it, "
        "got tuple of 1"
    )


@pytest.mark.parametrize("bound", [-1, math.nan, math.inf])
def test_a_bound_that_is_none(model, bound):
    with pytest.raises(ValueError, match=rf"^max_nll={bound} is not a finite number of at least 0"):
        assert_near_policy(model, SAMPLES, max_nll=bound)
