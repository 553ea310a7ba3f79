"""Tokens, passwords and signatures stay here, whatever else a text says."""

import numpy as np
import pytest

from pytest_subnet import SubnetError, assert_update_sparsity, open_pair
from pytest_subnet.reports.building import run_of
from pytest_subnet.reports.measured import lines, measured, tensor_name
from pytest_subnet.reports.page_words import spelled
from pytest_subnet.reports.properties import PropertySink
from pytest_subnet.reports.session import SessionReport
from pytest_subnet.text import redacted, safe

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
SECRETS = [
    (TOKEN, "hf_…"),
    (f"token={TOKEN}.", "token=hf_…."),
    ("https://me:secret@host/run", "https://host/run"),
    (f"https://{TOKEN}@huggingface.co/org/name", "https://huggingface.co/org/name"),
    ("https://me:se/cr?et@host/run more", "https://… more"),
    ("https://me:se#cret@host/run", "https://…"),
    ("https://me:s@ecret@host:80/run", "https://host:80/run"),
    ("s3://key:secret@bucket/run", "s3://bucket/run"),
    ("'https://host/x?X-Amz-Signature=secret&y=1'.", "'https://host/x'."),
    ("(https://host/x#secret)", "(https://host/x)"),
    ("/x/y?X-Amz-Signature=secret&Expires=1", "/x/y?X-Amz-Signature=…&Expires=1"),
    ("/x/y?sv=1&sig=secret%3D", "/x/y?sv=1&sig=…"),
    ("Authorization: Bearer secret123.4_5", "Authorization: Bearer …"),
    ("HF_TOKEN=secret pytest", "HF_TOKEN=… pytest"),
    ("AWS_SECRET_ACCESS_KEY='secret' A_TOKEN=secret", "AWS_SECRET_ACCESS_KEY='…' A_TOKEN=…"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_what_is_secret_is_cut_out(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "hf_checkpoint and hf_transfer",
        "tests/test_a.py::test_x[a@b=c]",
        "s3://bucket/run",
        "hf://org/name@main/sub",
        "https://host:8443/run/model.safetensors",
        "http://[::1]:80/run",
        "https://host/a@b:c",
        "max_tokens=128, pad_token=x",
        "basic training, a bearer of 8 numbers",
        "C:\\runs\\one",
    ],
)
def test_what_is_none_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text",
    ["a" * 300_000 + "://", "?" + "token" * 60_000, "https://" + "a:" * 150_000, "x://" * 70_000],
)
def test_an_endless_text_is_no_endless_work(text):
    redacted(text)


@pytest.mark.parametrize("text", [text for text, _ in SECRETS])
def test_none_reaches_a_run_or_a_property(text):
    class Result:
        def to_dict(self):
            return {"finding": "thing", "of": text, text: [text]}

    run = run_of(
        [],
        tests=[{"message": lines(f"{text}\n{text}"), "outcome": "failed"}],
        settings={"base": text},
    )
    properties = []
    PropertySink(properties)(Result())

    found = f"{run}{measured(Result(), with_tensors=True)}{properties}"
    assert "secret" not in found.replace("X-Amz", "")
    assert TOKEN not in found


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (f"layers.0.{TOKEN}.weight", "layers.0.hf_….weight"),
        ("https://me:secret@host/x?X-Amz-Signature=secret", "https://host/x"),
    ],
)
def test_none_comes_with_the_name_of_a_tensor(name, shown):
    assert tensor_name(name) == shown


def test_none_reaches_the_table_of_a_pair(files_with_secrets):
    report = SessionReport()
    report.watch(files_with_secrets)

    (table,) = report.tables()

    assert "secret" not in str(table)
    assert table["pair"] == "https://host/base -> https://host/tuned"
    assert table["base"]["label"] == "https://host/base"
    assert table["notes"] == ["from https://host/x"]


@pytest.fixture
def files_with_secrets():
    """A pair whose labels and notes were not made by this package."""
    import torch

    from pytest_subnet import open_pair, update_sparsity

    pair = open_pair({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    pair.base.label = "https://me:secret@host/base?secret"
    pair.tuned.label = "https://me:secret@host/tuned"
    pair.notes = ("from https://me:secret@host/x",)
    update_sparsity(pair)
    return pair


def test_what_is_shown_of_a_name_has_no_secret_either():
    assert safe(f"/home/{TOKEN}/base") == "/home/hf_…/base"
    assert "bCdEf" not in safe(f"{'x' * 145}{TOKEN}{'x' * 300}")  # where it would be cut in two


def test_a_token_in_a_path_is_not_in_the_message(tmp_path):
    from safetensors.numpy import save_file

    for side, value in (("base", 1), ("tuned", 2)):
        path = tmp_path / TOKEN / side
        path.mkdir(parents=True)
        save_file({"a.weight": np.full((2, 2), value, np.float32)}, path / "model.safetensors")
    pair = open_pair(*(tmp_path / TOKEN / side for side in ("base", "tuned")))

    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(pair, at_least=0.9)

    shown = f"{tmp_path}/hf_…"
    assert str(caught.value).splitlines()[1] == (
        f"  pair       {shown}/base -> {shown}/tuned   (same bits, f32, 1/1 tensor, 4 entries)"
    )
    assert TOKEN not in str(caught.value) + repr(pair) + repr(pair.base)
    with pytest.raises(SubnetError) as absent:
        open_pair(pair.base, tmp_path / TOKEN / "gone")
    assert "hf_…/gone" in str(absent.value)
    assert TOKEN not in str(absent.value)


def test_estimates_are_named_for_what_they_are_of():
    assert spelled("expected_sparsity") == "sparsity by rounding alone"
    assert spelled("stable_rank") == "stable rank"
