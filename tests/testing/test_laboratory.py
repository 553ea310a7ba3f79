"""The laboratory: a model that has learnt something, data in TRL's formats, real trainers on it."""

import os
import re
import socket
import sysconfig
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from pytest_subnet import CheckpointError, open_pair, update_sparsity
from pytest_subnet.testing import build_laboratory
from pytest_subnet.testing.corpus import SEEN, UNSEEN, functions, read_source
from pytest_subnet.testing.language_model import encode
from pytest_subnet.testing.rows import Kind

COLUMNS = {
    "standard_language_modeling": {"text"},
    "conversational_language_modeling": {"messages"},
    "prompt_only": {"prompt"},
    "prompt_completion": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
}


@pytest.fixture
def offline(monkeypatch):
    """Whoever connects to anything fails."""

    def connect(*_):
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(socket.socket, "connect", connect)


def nll(log_probabilities, ids):
    """The mean of -log p of each token, given a row of log-probabilities for each."""
    return float(-log_probabilities.gather(-1, ids[..., None]).mean())


def test_it_knows_more_than_how_frequent_each_token_is(laboratory):
    tokenizer = laboratory.tokenizer()
    seen = encode([read_source(module) for module in SEEN], tokenizer)
    unseen = encode([read_source(module) for module in UNSEEN], tokenizer)

    windows = unseen[: len(unseen) // 128 * 128].reshape(-1, 128)[:100]
    with torch.no_grad():
        logits = laboratory.model()(windows).logits.double()
    loss = nll(logits[:, :-1].log_softmax(-1), windows[:, 1:])
    frequency = torch.bincount(seen, minlength=512).double() + 1
    by_frequency = nll((frequency / frequency.sum()).log().expand(len(unseen), -1), unseen)

    assert laboratory.loss == pytest.approx(loss, rel=1e-5)
    assert laboratory.uniform_loss == pytest.approx(6.2383, abs=1e-4)
    assert loss < by_frequency - 0.5
    assert by_frequency < laboratory.uniform_loss


def test_a_copy_that_is_trained_is_no_other(laboratory, offline):
    stored = load_file(laboratory.base / "model.safetensors")
    trained, other = laboratory.model(), laboratory.model()

    trained(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()

    for model in (other, laboratory.model()):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, stored[name].float())
    assert not torch.equal(trained.lm_head.weight, other.lm_head.weight)
    pair = open_pair(laboratory.base, trained, as_dtype="bfloat16")
    assert 0 < update_sparsity(pair).updated < trained.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_copy_in_a_dtype(laboratory, dtype):
    model = laboratory.model(dtype=dtype)

    assert {each.dtype for each in model.state_dict().values()} == {getattr(torch, dtype)}
    assert not model.training
    assert model.name_or_path == os.fspath(laboratory.base)  # what trainers open a reference by


def test_random_numbers_are_the_callers(laboratory):
    before = torch.get_rng_state()
    laboratory.model()
    laboratory.tokenizer()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tokenizer_writes_any_text_and_marks_what_the_assistant_says(laboratory):
    tokenizer = laboratory.tokenizer()
    for text in ("def f(x):\n\treturn x  # ½ ✓\r\n", "", "\0\x1b[31m", " 日本 \U0001f40d"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    row = laboratory.dataset("conversational_language_modeling")[0]
    written = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoded = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    said = [
        token
        for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if marked
    ]

    assert written == (
        "<|im_start|>user\nWhat does bisect.insort_right do?<|im_end|>\n"
        "<|im_start|>assistant\n"
        "Insert item x in list a, and keep it sorted assuming a is sorted.<|im_end|>\n"
    )
    assert tokenizer.decode(said) == row["messages"][1]["content"] + "<|im_end|>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_rows_have_the_columns_of_their_type(laboratory, kind):
    train, test = (laboratory.dataset(kind, split=split) for split in ("train", "test"))
    form, _, sort = kind.partition("_")
    columns = COLUMNS.get(kind) or COLUMNS[sort]

    assert (len(train), len(test)) == (64, 16)
    texts = []
    for row in (*train, *test):
        assert row.keys() == columns
        for name, value in row.items():
            if name == "label":
                assert isinstance(value, bool)
            elif form == "standard":
                assert isinstance(value, str)
            else:
                assert [set(turn) for turn in value] == [{"role", "content"}] * len(value)
        texts.append(str(row))
        if "chosen" in row:
            assert row["chosen"] != row["rejected"]
    assert len(set(texts)) == 80
    train[0].clear()
    assert laboratory.dataset(kind)[0]


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_a_prompt_is_cut_up_alike_with_its_completion_and_fits(laboratory, form):
    tokenizer = laboratory.tokenizer()
    for split in ("train", "test"):
        for row in laboratory.dataset(f"{form}_prompt_completion", split=split):
            prompt, completion = row["prompt"], row["completion"]
            if form == "conversational":
                write = tokenizer.apply_chat_template
                whole = write(prompt + completion, tokenize=False)
                prompt = write(prompt, tokenize=False, add_generation_prompt=True)
            else:
                whole = prompt + completion
            start, ids = tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
            assert ids[: len(start)] == start
            assert len(start) < len(ids) < 128


def test_rows_are_of_functions_that_are_there(laboratory):
    found = {each for module in UNSEEN for each in functions(module, read_source(module))}
    signatures = {f'def {each.signature}:\n    """' for each in found}
    assert {row["prompt"] for row in laboratory.dataset("standard_prompt_only")} <= signatures
    assert laboratory.texts == [
        row["prompt"] + row["completion"]
        for row in laboratory.dataset("standard_prompt_completion")
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lab: lab.model(dtype="int8\n"),
            r"dtype='int8\n' is not one of 'float32', 'bfloat16', 'float16', 'float64'",
        ),
        (
            lambda lab: lab.dataset("preference"),
            "there is no data set 'preference'; there are " + ", ".join(get_args(Kind)),
        ),
        (
            lambda lab: lab.dataset("standard_preference", split="dev"),
            'split=\'dev\' is neither "train" nor "test"',
        ),
        (
            lambda lab: lab.training_arguments("out", "ppo"),
            "trainer='ppo' is not one of 'transformers', 'sft', 'dpo', 'grpo'; 'sft' is for "
            "KTOConfig too, 'grpo' for RLOOConfig",
        ),
    ],
)
def test_what_it_has_not(laboratory, call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(laboratory)


def test_an_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        build_laboratory(tmp_path / "lab")
    assert str(caught.value) == (
        f"{tmp_path}/argparse.py cannot be read (FileNotFoundError); a laboratory learns from the "
        "source of Python's standard library: use an interpreter that comes with it"
    )
    assert not (tmp_path / "lab").exists()


def test_asked_again_it_is_opened(laboratory):
    before = {path: path.stat().st_mtime_ns for path in laboratory.base.iterdir()}
    assert build_laboratory(laboratory.base.parent) == laboratory
    assert {path: path.stat().st_mtime_ns for path in laboratory.base.iterdir()} == before


@pytest.mark.slow
def test_built_again_it_has_the_same_bits_whatever_the_caller_set(laboratory, tmp_path):
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.manual_seed(7)
        before = torch.get_rng_state()
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        again = build_laboratory(tmp_path)
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)

    assert again.base.name == laboratory.base.name
    assert again.loss == laboratory.loss
    for path in laboratory.base.iterdir():
        assert (again.base / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's own calls
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["standard", "conversational"])
@pytest.mark.parametrize(
    ("trainer", "sort"),
    [
        ("sft", "language_modeling"),
        ("sft", "prompt_completion"),
        ("dpo", "preference"),
        ("grpo", "prompt_only"),
    ],
)
def test_a_real_trainer_of_trl(laboratory, tmp_path, offline, trainer, sort, form):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = getattr(trl, f"{trainer.upper()}Config")
    model, rows = laboratory.model(), laboratory.dataset(f"{form}_{sort}")
    more = {}
    if trainer == "grpo":
        more["reward_funcs"] = lambda completions, **_: [float(len(str(c))) for c in completions]

    running = getattr(trl, f"{trainer.upper()}Trainer")(
        model,
        args=config(**laboratory.training_arguments(tmp_path / "out", trainer, max_steps=2)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=laboratory.tokenizer(),
        **more,
    )
    running.train()

    assert running.state.global_step == 2
    assert list(tmp_path.rglob("*.safetensors")) == []
    pair = open_pair(laboratory.base, model, as_dtype="bfloat16")
    assert 0 < update_sparsity(pair).updated < model.num_parameters()
    if trainer == "sft":
        assert running.state.log_history[0]["loss"] < laboratory.uniform_loss - 1


@pytest.mark.slow
def test_the_trainer_of_transformers_warns_of_nothing(laboratory, tmp_path, offline):
    from transformers import Trainer, TrainingArguments

    model, tokenizer = laboratory.model(), laboratory.tokenizer()
    ids = [tokenizer(text)["input_ids"][:16] for text in laboratory.texts]
    arguments = laboratory.training_arguments(tmp_path, "transformers", learning_rate=1e-3)

    Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=[{"input_ids": each, "labels": each} for each in ids if len(each) == 16],
    ).train()

    assert update_sparsity(open_pair(laboratory.base, model, as_dtype="bfloat16")).sparsity < 0.5
