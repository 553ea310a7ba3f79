"""The base, and three subnetworks of it, each found by continuous sparsification.

One makes the predictions of a bigram model, one keeps as much of the base's own loss as it can (a
pruning), and one is looked for as the first is, in a model whose blocks were drawn at random.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bigrams import Text, correlation, cut_up, log_probabilities, negative_loss
from from_release import (
    Settings,
    build_base,
    build_once,
    encode,
    read_standard_library,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pytest_subnet import find_subnetwork
from pytest_subnet.training.finding_result import FoundSubnetwork

BASE = Settings(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=344,
    layers=3,
    context=64,
    steps=2000,
    learning_rate=3e-3,
)
LAMBDAS = (0, 1)
# 400 times the paper's rate and five times its heating: hundreds of steps, not thousands.
SEARCH = {
    "learning_rate": 0.02,
    "temperature_growth": 1.005,
    "max_steps": 1200,
    "attempts": 1,  # the loss of so small a batch jumps by as much as a spike
}
BATCH, WINDOW = 8, 32
SCORED = 64


def build(out: Path, *, short: bool) -> Path:
    """Train and search what is missing, and return the folder that holds it."""
    folder = out / "bigram"
    settings = replace(BASE, steps=2) if short else BASE
    base = build_base(folder, settings=settings)
    search = {**SEARCH, "max_steps": 2} if short else SEARCH
    windows = 4 if short else SCORED
    here = Path(__file__).parent
    record = {
        "base_sha256": _sha256(base / "model.safetensors"),
        "code_sha256": {name: _sha256(here / name) for name in ("bigrams.py", "search.py")},
        "settings": asdict(settings),
        "search": search,
        "lambdas": list(LAMBDAS),  # as a file gives it back
        "windows_scored": windows,
    }
    find = partial(_search, base=base, search=search, windows=windows)
    build_once(folder / "found", record=record, build=find)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder: Path) -> tuple[PreTrainedModel, Text]:
    """Return the base, in float32, and the text it was trained on, as cut up for the search."""
    text = Text(**load_file(folder / "found" / "text.safetensors"))
    return _load_model(folder / "base"), text


def _load_model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def _cut_up(base: Path, model: PreTrainedModel, windows: int) -> Text:
    tokens = encode(read_standard_library(), tokenizer=AutoTokenizer.from_pretrained(base))
    return cut_up(
        tokens,
        vocabulary=model.config.vocab_size,
        context=model.config.max_position_embeddings,
        windows=windows,
    )


def with_random_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the base's embedding, head and norms, and other matrices as drawn."""
    torch.manual_seed(1)
    drawn = type(model)(model.config).eval()
    trained = {name: each for name, each in model.state_dict().items() if "_proj" not in name}
    drawn.load_state_dict(trained, strict=False)
    return drawn


def _search(folder: Path, *, base: Path, search: dict[str, Any], windows: int) -> None:
    model = _load_model(base)
    text = _cut_up(base, model, windows)
    save_file({name: each.contiguous() for name, each in text._asdict().items()},
              folder / "text.safetensors")  # fmt: skip
    score = partial(correlation, text=text)
    bigram = _find(model, text, to_bigrams, LAMBDAS, score, search, folder / "bigram")
    _find(model, text, to_text, bigram.lambda_, partial(negative_loss, text=text), search,
          folder / "pruning")  # fmt: skip
    _find(with_random_blocks(model), text, to_bigrams, bigram.lambda_, score, search,
          folder / "random")  # fmt: skip


def _find(
    model: PreTrainedModel,
    text: Text,
    loss: Callable[..., Tensor],
    lambdas: float | tuple[float, ...],
    score: Callable[..., float],
    search: dict[str, Any],
    path: Path,
) -> FoundSubnetwork:
    found = find_subnetwork(
        model,
        partial(loss, after=text.after),
        batches=partial(_windows, text.learn_from),
        lambdas=lambdas,
        score=score,
        **search,
    )
    print(f"{path.name}: {found}", flush=True)
    found.mask.save(path.with_suffix(".safetensors"))
    path.with_suffix(".txt").write_text(found.table() + "\n", encoding="utf-8")
    return found


def _windows(tokens: Tensor, _: int) -> Tensor:
    """Draw windows; find_subnetwork seeds torch's random numbers for each step."""
    starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1))
    return tokens[starts + torch.arange(WINDOW)]


def to_bigrams(model: PreTrainedModel, tokens: Tensor, *, after: Tensor) -> Tensor:
    """Cross-entropy with the bigram model's predictions: the paper's loss."""
    return -(after[tokens[:, :-1]] * log_probabilities(model, tokens)).sum(-1).mean()


def to_text(model: PreTrainedModel, tokens: Tensor, *, after: Tensor) -> Tensor:
    """Cross-entropy with the text itself: what the base was trained on."""
    return -log_probabilities(model, tokens).gather(-1, tokens[:, 1:, None]).mean()
