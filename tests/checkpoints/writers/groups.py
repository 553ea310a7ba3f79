"""What the writing programs share: a tiny model, and ranks that are processes of their own."""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 33,  # no multiple of the ranks
}


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    return LlamaForCausalLM(config)


def train_a_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Every rank learns from tokens of its own."""
    tokens = torch.arange(8).reshape(1, 8) + dist.get_rank()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def run_ranks(root: Path, world: int, run: Callable[[Path, int], None]) -> None:
    """Call `run(root, world)` in `world` processes of one gloo group.

    They are forked, so that the libraries, which take long, are imported once.
    """
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run_rank, args=(root, rank, world, run)) for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"exit codes of {world} ranks: {[rank.exitcode for rank in ranks]}")


def _run_rank(root: Path, rank: int, world: int, run: Callable[[Path, int], None]) -> None:
    store = f"file://{root}/store_of_{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    run(root, world)
    dist.barrier()
    dist.destroy_process_group()
