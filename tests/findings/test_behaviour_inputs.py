"""What behaviour refuses, in whole messages, and what transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SubnetError,
    assert_behaviour_close,
    behaviour_shift,
    near_policy,
    open_pair,
)
from pytest_subnet.pairs.causal_lm import load_causal_lm_pair

WORDS = {"<unk>": 0, "simple": 1, "is": 2, "better": 3, "than": 4, "complex": 5, ".": 6}


class Table(torch.nn.Module):
    """Predicts by the last token alone: its logits are a row of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask):
        return self.logits[input_ids]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(Table(torch.randn(7, 7, generator=generator)) for _ in range(2))


@pytest.fixture
def paths(llama_pair, tmp_path, monkeypatch):
    """A copy of the tiny pair, for which a test may save tokenizers."""
    shutil.copytree(llama_pair, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def give_tokenizer(directory, words, *, lower=False):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        directory
    )


def load():
    return load_causal_lm_pair(open_pair("base", "tuned"), "cpu")


def refused(error, measure, *arguments, **keywords):
    with pytest.raises(error) as caught:
        measure(*arguments, **keywords)
    assert type(caught.value) is error
    return str(caught.value)


def test_texts_are_read_by_the_tokenizer_of_the_pair(paths):
    for side in ("base", "tuned"):
        give_tokenizer(paths / side, WORDS)
    loaded = load()
    texts = ["simple is better", "complex ."]
    result = behaviour_shift(loaded, texts)
    ids = [[1, 2, 3], [5, 6]]
    assert [row._replace(text="") for row in result.per_prompt] == list(
        behaviour_shift(loaded[:2], ids).per_prompt
    )
    assert [row.text for row in result.per_prompt] == texts
    assert result.kl > 0
    assert result.pair == f"{paths / 'base'} -> {paths / 'tuned'}"
    assert near_policy(loaded, texts).nll == pytest.approx(-result.base_logprob)
    assert near_policy((loaded.base, loaded.tokenizer), texts).samples == 2


def test_long_and_hostile_texts_are_shown_as_they_may_be(paths):
    give_tokenizer(paths / "tuned", WORDS)
    text = "simple \x1b[31m\n" + "is better " * 50
    with pytest.raises(AssertionError) as caught:
        assert_behaviour_close(load(), [text], max_kl=0)
    shown = caught.value.args[0].splitlines()[3]
    assert shown == (
        f"  worst      prompt 0  {caught.value.args[0].split()[4]} nats over 102 tokens  "
        r'"simple \x1b[31m\nis better is better is bett"'
    )


def test_texts_without_a_tokenizer(paths):
    assert refused(TypeError, behaviour_shift, load(), ["simple is better"]) == (
        "prompt 0 is a text and there is no tokenizer; pass (base, tuned, tokenizer), save one "
        "beside the weights, or pass token ids"
    )


@pytest.mark.parametrize(
    ("text", "shown", "count"), [("", "", "0 tokens"), ("complex", ' ("complex")', "1 token")]
)
def test_texts_of_too_few_tokens(paths, text, shown, count):
    give_tokenizer(paths / "base", WORDS)
    assert refused(ValueError, behaviour_shift, load(), ["simple is", text], vocab="strict") == (
        f"prompt 1{shown} is {count}: the first token is not predicted, so it takes two"
    )


def test_tokenizers_that_give_ids_other_words(paths):
    give_tokenizer(paths / "base", WORDS)
    give_tokenizer(paths / "tuned", WORDS | {"better": 4, "than": 3})
    loaded = load()
    for prompts in (["simple is better"], [[1, 2, 3]]):
        assert refused(PairMismatchError, behaviour_shift, loaded, prompts) == (
            "the tokenizers of base and tuned differ: token 3 is 'better' in "
            f"{paths / 'base'} and 'than' in {paths / 'tuned'} (1 more); what they predict cannot "
            "be compared token by token"
        )


def test_tokenizers_that_read_a_prompt_differently(paths):
    give_tokenizer(paths / "base", WORDS)
    give_tokenizer(paths / "tuned", WORDS, lower=True)
    loaded = load()
    assert behaviour_shift(loaded, ["simple is better"]).tokens == 2
    assert refused(PairMismatchError, behaviour_shift, loaded, ["simple is", "Simple is"]) == (
        f"the tokenizers of base and tuned differ: prompt 1 is [0, 2] to {paths / 'base'} and "
        f"[1, 2] to {paths / 'tuned'}; pass token ids to compare both on the same ones"
    )
    assert behaviour_shift(loaded, [[0, 2]]).tokens == 1


def test_words_that_one_tokenizer_alone_has_are_no_difference(paths):
    give_tokenizer(paths / "base", WORDS)
    give_tokenizer(paths / "tuned", WORDS | {"<think>": 7})
    assert behaviour_shift(load(), ["simple is better"]).tokens == 2


def test_no_prompts(pair):
    for none in ([], (), torch.zeros(0, 4, dtype=torch.int64)):
        assert refused(ValueError, behaviour_shift, pair, none) == (
            "no prompts: there is nothing to predict"
        )


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ("simple", TypeError, "prompts is one text; pass a list of them: ['simple']"),
        (
            None,
            TypeError,
            "prompts is NoneType; pass a list of texts, a list of lists of token ids, or a tensor "
            "of token ids [prompts, tokens]",
        ),
        (
            torch.tensor([1, 2, 3]),
            ValueError,
            "prompts is a tensor of shape [3]; token ids are [prompts, tokens]",
        ),
        ([1, 2], TypeError, "prompt 0 is neither a text nor a row of token ids"),
        ([[0, 1], [0.5, 1.0]], TypeError, "prompt 1 is neither a text nor a row of token ids"),
        ([[True, False]], TypeError, "prompt 0 is neither a text nor a row of token ids"),
        ([[1, 2**80]], TypeError, "prompt 0 is neither a text nor a row of token ids"),
        (
            [{"ids": 1}],
            TypeError,
            "prompt 0 is neither a text nor a row of token ids; of rows of a data set pass one "
            'column: [row["prompt"] for row in rows]',
        ),
        (
            [[{"role": "user", "content": "hello"}]],
            TypeError,
            "prompt 0 is neither a text nor a row of token ids; turns become ids by "
            "tokenizer.apply_chat_template(turns, return_dict=False)",
        ),
        (
            {"input_ids": torch.tensor([[0, 1]])},
            TypeError,
            "prompts is dict; pass the texts, or the token ids without padding: "
            'tokenizer(texts)["input_ids"]',
        ),
        (
            [[0, 1], []],
            ValueError,
            "prompt 1 is 0 tokens: the first token is not predicted, so it takes two",
        ),
        (
            [[0, 1], [3, -2]],
            ValueError,
            "prompt 1 has token id -2 at position 1, which is not in the vocabulary: they start "
            "at 0",
        ),
    ],
)
def test_prompts_that_are_none(pair, prompts, error, text):
    assert refused(error, behaviour_shift, pair, prompts) == text


def test_ids_that_are_not_in_the_vocabulary(paths):
    assert refused(ValueError, behaviour_shift, load(), [[0, 1], [255, 256]]) == (
        "prompt 1 has token id 256 at position 1, which is not in the vocabulary: they go to 255"
    )


def test_prompts_longer_than_the_context(paths):
    for side in ("base", "tuned"):
        path = paths / side / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8}))
    loaded = load()
    assert behaviour_shift(loaded, torch.zeros(1, 8, dtype=torch.int64)).tokens == 7
    assert refused(ValueError, behaviour_shift, loaded, [[0] * 8, [0] * 9]) == (
        "prompt 1 has 9 tokens, the context of the models is 8; cut it"
    )
    assert refused(ValueError, behaviour_shift, loaded, [[0] * 6], generate=3) == (
        "prompt 0 has 6 tokens and 3 to generate, the context of the models is 8; cut it"
    )


def test_vocabularies_of_different_size(pair):
    grown = Table(torch.zeros(9, 9))
    assert refused(PairMismatchError, behaviour_shift, (pair[0], grown), [[0, 1]]) == (
        'vocabularies of different size: Table predicts 7 tokens, Table 9; vocab="common" compares '
        "the first 7 of both, as if there were no others"
    )
    assert refused(ValueError, behaviour_shift, (grown, pair[0]), [[0, 8]], vocab="all") == (
        "vocab='all' is not one of 'strict', 'common'"
    )

    class Wide(Table):
        def forward(self, input_ids, attention_mask):
            return torch.cat([super().forward(input_ids, attention_mask)] * 2, dim=-1)[..., :5]

    few = Wide(torch.zeros(9, 9))
    assert refused(ValueError, behaviour_shift, (grown, few), [[0, 1], [2, 6]], vocab="common") == (
        "prompt 1 has token id 6 at position 1, which is not in the vocabulary: they go to 4"
    )


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nothing_is_predicted(pair, side, wrong):
    model = pair[side == "tuned"]
    with torch.no_grad():
        model.logits[4, 0] = wrong
    assert refused(SubnetError, behaviour_shift, pair, [[0, 1, 2, 3, 5], [6, 1, 4, 2]]) == (
        f"{side} (Table) predicts NaN after position 2 of prompt 1; look for NaN in its weights "
        "with assert_finite, or take a dtype with more range"
    )
    assert behaviour_shift(pair, [[0, 4]]).tokens == 1  # nothing is predicted after the last token


def test_a_model_compared_with_itself(pair):
    model = pair[0]
    for other in (model, torch.nn.DataParallel(model)):
        assert refused(PairMismatchError, behaviour_shift, (model, other), [[0, 1]]) == (
            "base and tuned are one module (Table), which behaves as itself; keep a copy before "
            "training (copy.deepcopy), or load the base again"
        )


def test_what_is_no_pair(pair):
    for wrong in ("base", (pair[0],), open_pair({"w": torch.ones(1)}, {"w": torch.zeros(1)})):
        assert refused(TypeError, behaviour_shift, wrong, [[0, 1]]) == (
            "a pair of loaded models is needed, (base, tuned) or (base, tuned, tokenizer), got "
            f"{type(wrong).__name__}; take the fixture causal_lm_pair"
        )
    assert refused(TypeError, behaviour_shift, (pair[0], "tuned"), [[0, 1]]) == (
        "tuned is str, not a module; behaviour is measured on loaded models, as the fixture "
        "causal_lm_pair gives them"
    )
    trainer = SimpleNamespace(model=pair[1])
    assert refused(TypeError, behaviour_shift, (pair[0], trainer), [[0, 1]]) == (
        "tuned is SimpleNamespace, not a module; behaviour is measured on loaded models, as the "
        "fixture causal_lm_pair gives them; pass the model that it holds: tuned.model"
    )


def test_an_encoder_and_a_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    models = [T5ForConditionalGeneration(T5Config(**sizes, vocab_size=16)) for _ in range(2)]
    assert refused(TypeError, behaviour_shift, tuple(models), [[0, 1]]) == (
        "base (T5ForConditionalGeneration) is an encoder-decoder model; behaviour is measured on "
        "models that predict the next token from those before it"
    )


def test_a_module_that_gives_no_logits(pair):
    class Last(Table):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask)[:, -1]

    last = Last(torch.zeros(7, 7))
    assert refused(TypeError, behaviour_shift, (pair[0], last), [[0, 1]]) == (
        "tuned (Table) is called with input_ids and attention_mask and must give logits [prompts, "
        "tokens, vocabulary], itself or as .logits; it gave Tensor [1, 7]"
    ).replace("(Table)", "(Last)")


def test_a_module_that_does_not_write(pair):
    assert refused(TypeError, behaviour_shift, pair, [[0, 1]], generate=3) == (
        "generate: base (Table) has no generate(), as models of transformers have it; leave "
        "generate= out"
    )


@pytest.mark.parametrize("count", [-1, 2.0, True])
def test_a_number_of_tokens_that_is_none(pair, count):
    assert refused(ValueError, behaviour_shift, pair, [[0, 1]], generate=count) == (
        f"generate={count} is not a number of tokens, 0 or more"
    )


@pytest.mark.parametrize("bound", [-0.1, math.nan, math.inf])
def test_a_bound_that_is_none(pair, bound):
    assert refused(ValueError, assert_behaviour_close, pair, [[0, 1]], max_kl=bound) == (
        f"max_kl={bound} is not a finite number of at least 0"
    )
    assert refused(TypeError, assert_behaviour_close, pair, [[0, 1]], max_kl=1, message="no") == (
        "message='no' is not a function from the default text to the text to raise"
    )


def test_a_model_without_values(pair):
    with torch.device("meta"):
        bare = Table(torch.zeros(4, 4))
    assert refused(TypeError, behaviour_shift, (pair[0], bare.to("meta")), [[0, 1]]) == (
        "tuned (Table) is on the meta device, where it predicts nothing; load its weights"
    )
