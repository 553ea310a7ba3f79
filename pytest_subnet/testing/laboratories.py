"""The laboratory: a small language model with all that a test of a trainer needs beside it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_subnet.pairs.causal_lm import load_tokenizer
from pytest_subnet.testing.corpus import SEEN, UNSEEN, Function, functions, read_source
from pytest_subnet.testing.kept import make_once
from pytest_subnet.testing.language_model import (
    Settings,
    encode,
    loss_on,
    train_model,
    train_tokenizer,
    without_progress,
)
from pytest_subnet.testing.rows import Kind, Row, rows
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]
Split: TypeAlias = Literal["train", "test"]
Trainer: TypeAlias = Literal["sft", "dpo", "grpo", "transformers"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SPLITS: dict[str, slice] = {"train": slice(64), "test": slice(64, 80)}
_RECIPE = 1
"""To be raised when the same settings make something else: nothing that was kept is taken then."""

_SETTINGS = Settings()
_LENGTH = 128
"""How many tokens of a row a trainer takes: as many as the model was trained on at once."""

_SHARED_ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "seed": 0,
    "data_seed": 0,
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "sft": {"max_length": _LENGTH},
    "dpo": {"max_length": _LENGTH},
    "grpo": {"num_generations": 4, "max_completion_length": 16},
}


@dataclass(frozen=True)
class Laboratory:
    """A trained language model of 0.15 million parameters, its tokenizer, and data to tune it on.

    The model is a Llama of two layers, trained on some modules of the standard library of the
    running Python. The data come from others: functions and what their docstrings say of them.

    Attributes:
        base: the checkpoint in bfloat16 with its tokenizer, as `save_pretrained` writes them;
            not to be written to.
        loss: what the model reaches on source it has not seen, in nats per token.
        uniform_loss: what a model that knows nothing reaches, log of the vocabulary.
    """

    base: Path
    loss: float
    uniform_loss: float

    def model(self, *, dtype: Dtype = "float32") -> LlamaForCausalLM:
        """A fresh copy, in eval mode on the CPU; training it changes no other.

        Args:
            dtype: of the weights, by name; each holds all that is stored but float16, which rounds.

        Returns:
            A `transformers.LlamaForCausalLM`.

        Raises:
            ValueError: `dtype` is another.

        >>> lab = build_laboratory(".laboratory")
        >>> model = lab.model()
        >>> model.dtype, model is lab.model()
        (torch.float32, False)
        """
        import torch
        from transformers import LlamaForCausalLM

        if dtype not in _DTYPES:
            listed = ", ".join(map(repr, _DTYPES))
            raise ValueError(f"dtype={safe(repr(dtype))} is not one of {listed}")
        with without_progress(), torch.device("cpu"):
            copy: Any = LlamaForCausalLM.from_pretrained(
                self.base, dtype=getattr(torch, dtype), local_files_only=True
            )
        model: LlamaForCausalLM = copy.eval()
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        r"""A fresh copy of the tokenizer: byte-level BPE of 512 tokens, with a chat template.

        Texts and turns of a conversation end in its `eos_token`; the template marks what the
        assistant says, for a loss on that alone.

        >>> tokenizer = build_laboratory(".laboratory").tokenizer()
        >>> question = [{"role": "user", "content": "What is zip?"}]
        >>> tokenizer.apply_chat_template(question, tokenize=False)
        '<|im_start|>user\nWhat is zip?<|im_end|>\n'
        """
        return load_tokenizer(self.base, label=os.fspath(self.base))

    @property
    def texts(self) -> list[str]:
        """What the model may be prompted with: 64 functions it has not seen, in their order."""
        return [row["text"] for row in self.dataset("standard_language_modeling")]

    def dataset(self, kind: Kind, *, split: Split = "train") -> list[Row]:
        """Rows for one of TRL's trainers, which `datasets.Dataset.from_list` takes.

        Args:
            kind: `standard_` or `conversational_`, and then `language_modeling`, `prompt_only`,
                `prompt_completion`, `preference` or `unpaired_preference`.
            split: "train", 64 rows, or "test", 16 others.

        Returns:
            The rows, new ones at each call.

        Raises:
            ValueError: `kind` or `split` is another.

        >>> rows = build_laboratory(".laboratory").dataset("conversational_prompt_only")
        >>> len(rows), rows[0]["prompt"][0]["content"]
        (64, 'What does bisect.insort_right do?')
        """
        if split not in _SPLITS:
            raise ValueError(f'split={safe(repr(split))} is neither "train" nor "test"')
        listed = json.loads((self.base / _FUNCTIONS).read_text(encoding="utf-8"))
        return rows(kind, [Function(*each) for each in listed[_SPLITS[split]]])

    def training_arguments(
        self, output_dir: str | os.PathLike[str], trainer: Trainer = "sft", **changes: Any
    ) -> dict[str, Any]:
        """Keywords with which a trainer takes four steps on a CPU, saves nothing and asks nobody.

        The learning rate is the trainer's own: how much of a model moves hangs on it.

        Args:
            output_dir: where the trainer would save.
            trainer: "sft", "dpo" or "grpo", for TRL's `SFTConfig` (and `KTOConfig`), `DPOConfig`
                and `GRPOConfig` (and `RLOOConfig`), or "transformers", for `TrainingArguments` and
                whatever else extends it.
            **changes: keywords of the same, which are put in the place of these or added.

        Returns:
            The keywords.

        Raises:
            ValueError: `trainer` is another.

        >>> lab = build_laboratory(".laboratory")
        >>> lab.training_arguments("out", "grpo", max_steps=2)["max_completion_length"]
        16
        """
        if trainer not in _ARGUMENTS:
            listed = ", ".join(map(repr, _ARGUMENTS))
            raise ValueError(
                f"trainer={safe(repr(trainer))} is not one of {listed}; 'sft' is for KTOConfig "
                "too, 'grpo' for RLOOConfig"
            )
        return {
            "output_dir": os.fspath(output_dir),
            **_SHARED_ARGUMENTS,
            _checkpointing(): False,
            **_ARGUMENTS[trainer],
            **changes,
        }


def build_laboratory(directory: str | os.PathLike[str]) -> Laboratory:
    """The laboratory that is kept in `directory`: trained in some seconds if it is not there yet.

    Deterministic: the same bits from the same versions on the same sort of processor. Each set of
    versions has a laboratory of its own in `directory`. Processes that ask at the same time build
    it once; one that a test wrote into is built anew at the next call.

    Args:
        directory: made if it is not there.

    Returns:
        The laboratory; see `Laboratory`.

    Raises:
        CheckpointError: Python's standard library is there without its source.
        OSError: `directory` cannot be written.

    >>> lab = build_laboratory(".laboratory")
    >>> lab.loss < lab.uniform_loss - 1.5
    True
    """
    sources = {module: read_source(module) for module in (*SEEN, *UNSEEN)}
    base = Path(directory).resolve() / f"base-{_key(sources)}"
    make_once(base, lambda draft: _make(draft, sources))
    loss = json.loads((base / _LOSS).read_text(encoding="utf-8"))
    return Laboratory(base, loss, math.log(_SETTINGS.vocab_size))


_LOSS, _FUNCTIONS = "loss.json", "functions.json"


def _key(sources: dict[str, str]) -> str:
    """What tells this laboratory from those of other versions."""
    packages = ("pytest-subnet", "torch", "transformers", "tokenizers")
    parts = [
        _RECIPE,
        asdict(_SETTINGS),
        [version(each) for each in packages],
        [platform.python_version(), platform.machine()],
        sources,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _checkpointing() -> str:
    """By which name transformers knows recomputing activations; a later one warns of the first."""
    from transformers import TrainingArguments

    names = {each.name for each in fields(TrainingArguments)}
    return min(names & {"activation_checkpointing", "gradient_checkpointing"})


def _make(directory: Path, sources: dict[str, str]) -> None:
    """Train the model on what is seen, measure it on the rest, and write both down."""
    import torch

    seen, unseen = ([sources[module] for module in each] for each in (SEEN, UNSEEN))
    tokenizer = train_tokenizer(seen, settings=_SETTINGS)
    talks = rows("conversational_language_modeling", _distinct(SEEN, sources))
    spoken = [
        str(tokenizer.apply_chat_template(each["messages"], tokenize=False)) for each in talks
    ]
    model: Any = train_model(encode([*seen, *spoken], tokenizer), settings=_SETTINGS)
    model = model.to(torch.bfloat16)  # the run is over: stored as models are published
    with without_progress():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    loss = loss_on(model.float(), encode(unseen, tokenizer), settings=_SETTINGS)
    (directory / _LOSS).write_text(json.dumps(loss), encoding="utf-8")
    asked = [astuple(each) for each in _distinct(UNSEEN, sources)]
    (directory / _FUNCTIONS).write_text(json.dumps(asked, indent=1), encoding="utf-8")


def _distinct(modules: tuple[str, ...], sources: dict[str, str]) -> list[Function]:
    """The functions of some modules that share neither name nor signature nor what they do."""
    known: set[str] = set()
    found = []
    for module in modules:
        for each in functions(module, sources[module]):
            if known.isdisjoint(astuple(each)):
                known.update(astuple(each))
                found.append(each)
    return found
