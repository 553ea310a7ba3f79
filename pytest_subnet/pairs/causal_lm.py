"""Both models of a pair, whole, for what only a forward pass can tell."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.held import without_warnings
from pytest_subnet.text import first_few, safe, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs.model_pair import ModelPair

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class CausalLMPair(NamedTuple):
    """Two causal language models in eval mode on one device.

    They share no memory unless that was asked for.

    Attributes:
        base: the model before.
        tuned: the model after.
        tokenizer: of the tuned model, or else of the base; None where neither has one.
    """

    base: PreTrainedModel
    tuned: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def room_for(pair: ModelPair, device: str, *, share_identical: bool = False) -> str:
    """What loading both models needs and what is free, in words.

    Args:
        pair: base and tuned.
        device: where the models go.
        share_identical: what of the tuned model needs no room of its own is known only when it is
            loaded; then only what the base needs must be free for certain.

    Raises:
        SubnetError: they do not fit.
    """
    sizes = [
        sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        for checkpoint in (pair.base, pair.tuned)
    ]
    free = free_bytes(device)
    most = "up to " if share_identical else ""
    needed = f"{size(sizes[0])} + {most}{size(sizes[1])} needed on {device}"
    if free is None:
        return f"{needed}; how much is free is not known here"
    if (sizes[0] if share_identical else sum(sizes)) > free:
        what = "the base does" if share_identical else "both models do"
        raise SubnetError(
            f"{what} not fit: {needed}, {size(free)} free; take a larger device with "
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


def load_causal_lm_pair(
    pair: ModelPair, device: str, *, share_identical: bool = False
) -> CausalLMPair:
    """Load both models of `pair` with transformers; no code from a repository is run.

    Args:
        pair: base and tuned, two directories written by `save_pretrained`.
        device: where the models go.
        share_identical: keep what is bit-identical in both models once, in the base's memory. A
            write to such a weight then shows in the other model, so no parameter of either takes
            gradients. The tuned model passes through the CPU's memory, a tensor at a time.

    Raises:
        CheckpointError: a side is not a directory that transformers can load, or lacks weights,
            which transformers would fill with random numbers.
    """
    base = _load(pair.base, device)
    if not share_identical:
        return CausalLMPair(base, _load(pair.tuned, device), _tokenizer(pair))
    tuned: Any = _load(pair.tuned, "cpu")
    share(base, tuned)
    return CausalLMPair(base, tuned.to(device), _tokenizer(pair))


def share(base: torch.nn.Module, tuned: torch.nn.Module) -> int:
    """Have `tuned` use the memory of `base` for every tensor that has the same bits in both.

    The others go to the device of the tensor of that name in the base.

    Returns:
        How many bytes `tuned` no longer needs for itself.
    """
    known = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    saved = 0
    for name, tensor in (*tuned.named_parameters(), *tuned.named_buffers()):  # a tie comes once
        other = known.get(name)
        if other is None:
            continue
        placed = tensor.detach().to(other.device)
        if _same_bits(other.detach(), placed):
            placed = other.detach()
            saved += tensor.nbytes
        tensor.data = placed
    base.requires_grad_(False)
    tuned.requires_grad_(False)
    return saved


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    words = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*words)


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
        if tokenizer_files(directory):
            return load_tokenizer(directory, label=checkpoint.label)
    return None


def tokenizer_files(directory: Path) -> list[Path]:
    """The files in `directory` that make a tokenizer; none where there is none."""
    return [directory / name for name in _TOKENIZER_FILES if (directory / name).exists()]


def load_tokenizer(directory: Path, *, label: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `directory` with transformers; no code that lies there is run.

    Args:
        directory: where its files are.
        label: how messages name the checkpoint.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    with _in_our_words(f"transformers cannot load the tokenizer of {safe(label)}"):
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


@contextmanager
def _in_our_words(what: str) -> Iterator[None]:
    """Turn whatever a library raises into one error, and keep its warnings from failing a test."""
    with without_warnings():
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
