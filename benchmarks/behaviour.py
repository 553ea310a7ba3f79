"""Behaviour of a pair against the forward passes of its two models, and its peak memory.

python benchmarks/behaviour.py [--pair DIR] [--prompts 64] [--tokens 128] [--rounds 1]
python benchmarks/behaviour.py [--dtype bfloat16]

Without --pair, a Llama of 0.1 B parameters is written for it. DIR holds `base` and `tuned`. In
bfloat16 a CPU without instructions for it takes ten times as long, and hides what we add.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import measure
import torch

from pytest_subnet import behaviour_shift, open_pair
from pytest_subnet.findings.behaviour.prompts import TOKENS
from pytest_subnet.pairs.causal_lm import load_causal_lm_pair

if TYPE_CHECKING:
    from pytest_subnet.pairs.causal_lm import CausalLMPair

FEW = 8

PEAK = """
import sys, torch
from pytest_subnet import behaviour_shift, open_pair
from pytest_subnet.pairs.causal_lm import load_causal_lm_pair
base, tuned, dtype, prompts, tokens = sys.argv[1:]
loaded = load_causal_lm_pair(open_pair(base, tuned), "cpu")
for model in loaded[:2]:
    model.to(getattr(torch, dtype))
ids = torch.randint(loaded.base.config.vocab_size, (int(prompts), int(tokens)))
behaviour_shift(loaded, ids)
"""


def main() -> None:
    """Ask a pair in both ways, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="a directory that holds base and tuned")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.pair or make_pair(Path(scratch))
        size = arguments.prompts, arguments.tokens
        peaks = [peak(directory, arguments.dtype, n, size[1]) for n in (FEW, size[0])]
        loaded = load_causal_lm_pair(open_pair(directory / "base", directory / "tuned"), "cpu")
        for model in loaded[:2]:
            model.to(getattr(torch, arguments.dtype))
        parameters = sum(each.numel() for each in loaded.base.parameters())
        found = ratios(loaded, *size, arguments.rounds)
    what = f"{parameters / 1e9:.2g} B parameters, {size[0]} prompts of {size[1]} tokens, "
    what += arguments.dtype
    measure.show(
        [
            (f"behaviour over both forward passes, {what}", measure.spread(found), "1.15"),
            (
                f"peak memory, {size[0]} prompts over {FEW}",
                f"{peaks[1] / peaks[0]:.3f} ({peaks[1]:,.0f} MB over {peaks[0]:,.0f} MB)",
                "1.0",
            ),
        ]
    )


def ratios(loaded: CausalLMPair, prompts: int, tokens: int, rounds: int) -> list[float]:
    """Time of behaviour over time of plain forward passes on the same batch, in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.base.config.vocab_size, (prompts, tokens), generator=generator)
    batches = ids.split(max(1, TOKENS // tokens))
    found = []
    forward(loaded, batches[0][:1])  # to warm up
    behaviour_shift(loaded, batches[0][:1])
    for number, batch in enumerate(batches * rounds):
        ours, plain = partial(behaviour_shift, loaded, batch), partial(forward, loaded, batch)
        if number % 2:  # each is the first of the two as often as the second
            found += measure.ratios(ours, plain, 1)
        else:
            found += [1 / each for each in measure.ratios(plain, ours, 1)]
    return sorted(found)


def forward(loaded: CausalLMPair, ids: torch.Tensor) -> None:
    """What cannot be spared: both models on the same tokens."""
    with torch.no_grad():
        for model in loaded[:2]:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def peak(directory: Path, dtype: str, prompts: int, tokens: int) -> float:
    """The peak memory of a process that asks a pair, in MB."""
    sides = directory / "base", directory / "tuned"
    return measure.python(PEAK, *sides, dtype, prompts, tokens).peak_mb


def make_pair(root: Path) -> Path:
    """Write a Llama with a real vocabulary, and one whose weights moved a little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=12)).bfloat16()
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += (torch.rand_like(weight) < 0.05) * 0.001
    model.save_pretrained(root / "tuned")
    return root


if __name__ == "__main__":
    main()
