"""Pairs of checkpoints to measure on: real layouts, random weights, written without torch."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

MOVED = 0.15
"""Share of the entries that are one bfloat16 step apart, about what RL leaves behind."""


class Shape(NamedTuple):
    """A Llama: enough of its config to know every tensor."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in storage order."""
        kv = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {
            "lm_head.weight": (self.vocab, self.hidden),
            "model.embed_tokens.weight": (self.vocab, self.hidden),
        }
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found |= {
                f"{block}.input_layernorm.weight": (self.hidden,),
                f"{block}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{block}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{block}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{block}.post_attention_layernorm.weight": (self.hidden,),
                f"{block}.self_attn.k_proj.weight": (kv, self.hidden),
                f"{block}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{block}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{block}.self_attn.v_proj.weight": (kv, self.hidden),
            }
        return found | {"model.norm.weight": (self.hidden,)}

    def config(self) -> dict[str, object]:
        """A config.json that transformers can load."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


LLAMA_1B = Shape(layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=32000)
LLAMA_300M = Shape(layers=16, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocab=32000)
"""1.10 and 0.27 billion parameters."""


def build_llama_pair(root: Path, shape: Shape, *, shards: int = 4) -> tuple[Path, Path]:
    """Write `root/base` and `root/tuned` in bfloat16 shards, unless they are there."""
    return _build_pair(root, shape.tensors(), shards, shape.config())


def build_small_tensors_pair(root: Path, tensors: int) -> tuple[Path, Path]:
    """Write a pair of mixture-of-experts checkpoints: many matrices of 64 x 64, unless there."""
    names = {
        f"model.layers.{i // 512}.mlp.experts.{i % 512}.up_proj.weight": (64, 64)
        for i in range(tensors)
    }
    return _build_pair(root, names, 1, {"model_type": "llama"})


def _build_pair(
    root: Path, tensors: dict[str, tuple[int, ...]], shards: int, config: dict[str, object]
) -> tuple[Path, Path]:
    base, tuned = root / "base", root / "tuned"
    if (root / "complete").exists():
        return base, tuned
    names = list(tensors)
    per_shard = math.ceil(len(names) / shards)
    groups = [names[i : i + per_shard] for i in range(0, len(names), per_shard)]
    for directory in (base, tuned):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        weight_map |= dict.fromkeys(group, file)
        _write_shard(base / file, tuned / file, {name: tensors[name] for name in group}, number)
    if len(groups) > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        for directory in (base, tuned):
            (directory / "model.safetensors.index.json").write_text(index)
    (root / "complete").touch()
    return base, tuned


def _write_shard(base: Path, tuned: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    header, position = {}, 0
    for name, shape in tensors.items():
        end = position + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(seed)
    with open(base, "wb") as left, open(tuned, "wb") as right:
        for file in (left, right):
            file.write(len(raw).to_bytes(8, "little") + raw)
        entries = position // 2
        for start in range(0, entries, 1 << 22):
            count = min(1 << 22, entries - start)
            weights = random.standard_normal(count, np.float32) * np.float32(0.02)
            words = (weights.view(np.uint32) >> 16).astype(np.uint16)
            left.write(words.tobytes())
            right.write((words + (random.random(count, np.float32) < MOVED)).tobytes())
