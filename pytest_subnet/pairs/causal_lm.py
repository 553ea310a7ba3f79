"""Both models of a pair, whole, for what only a forward pass can tell."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.text import first_few, safe, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs.model_pair import ModelPair

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class CausalLMPair(NamedTuple):
    """Two causal language models in eval mode on one device.

    Attributes:
        base: the model before.
        tuned: the model after.
        tokenizer: of the tuned model, or else of the base; None where neither has one.
    """

    base: PreTrainedModel
    tuned: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def room_for(pair: ModelPair, device: str) -> str:
    """What loading both models needs and what is free, in words.

    Raises:
        SubnetError: they do not fit.
    """
    sizes = [
        sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        for checkpoint in (pair.base, pair.tuned)
    ]
    free = free_bytes(device)
    needed = f"{size(sizes[0])} + {size(sizes[1])} needed on {device}"
    if free is None:
        return f"{needed}; how much is free is not known here"
    if sum(sizes) > free:
        raise SubnetError(
            f"both models do not fit: {needed}, {size(free)} free; take a larger device with "
            "--subnet-device, or free memory"
        )
    return f"{needed}, {size(free)} free"


def free_bytes(device: str) -> int | None:
    """How much memory a process can take on `device`; None where the system does not say."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    if not memory.exists():
        return None
    for line in memory.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def load_causal_lm_pair(pair: ModelPair, device: str) -> CausalLMPair:
    """Load both models of `pair` with transformers; no code from a repository is run.

    Raises:
        CheckpointError: a side is not a directory that transformers can load, or lacks weights,
            which transformers would fill with random numbers.
    """
    base, tuned = _load(pair.base, device), _load(pair.tuned, device)
    return CausalLMPair(base, tuned, _tokenizer(pair))


def _directory(checkpoint: Checkpoint) -> str:
    if checkpoint.directory is None or not (checkpoint.directory / "config.json").exists():
        raise CheckpointError(
            f"{safe(checkpoint.label)} has no config.json beside its weights; "
            "causal_lm_pair needs a directory written by save_pretrained"
        )
    return os.fspath(checkpoint.directory)


def _load(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    directory = _directory(checkpoint)
    with _in_our_words(
        f"transformers cannot load {safe(checkpoint.label)} as a causal language model"
    ):
        from transformers import AutoModelForCausalLM

        # output_loading_info, which transformers does not put in its types, makes it a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{safe(checkpoint.label)} lacks {first_few(missing)}, which transformers would "
                "fill with random numbers; save the whole model again"
            )
        placed: PreTrainedModel = model.to(device).eval()
    return placed


def _tokenizer(pair: ModelPair) -> PreTrainedTokenizerBase | None:
    for checkpoint in (pair.tuned, pair.base):
        directory = Path(_directory(checkpoint))
        if any((directory / name).exists() for name in _TOKENIZER_FILES):
            with _in_our_words(
                f"transformers cannot load the tokenizer of {safe(checkpoint.label)}"
            ):
                from transformers import AutoTokenizer

                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
                return tokenizer
    return None


@contextmanager
def _in_our_words(what: str) -> Iterator[None]:
    """Turn whatever a library raises into one error, and keep its warnings from failing a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except SubnetError:
            raise
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{what}: {safe(error.name)} is not installed; pip install {safe(error.name)}"
            ) from error
        except Exception as error:  # transformers, tokenizers and torch have no error in common
            first = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{what}: {safe(first or type(error).__name__)}") from error
