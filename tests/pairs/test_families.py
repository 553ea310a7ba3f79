"""The names of every family, in memory and on disk: all pair, and each has a layer and a kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_subnet import open_pair
from pytest_subnet.pairs.kinds import kind_of, layer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from pytest_subnet import ModelPair

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
NORM, BIAS = ["norm"], ["bias"]


@dataclass(frozen=True)
class Family:
    """What a tiny model of a family holds: kinds block by block, in memory and on disk."""

    blocks: list[list[str]]
    outside: list[str]
    disk_blocks: list[list[str]] | None = None
    config: dict[str, object] = field(default_factory=dict)
    tied: str = ""

    def on_disk(self) -> list[list[str]]:
        return self.disk_blocks or self.blocks


LLAMA = [*ATTENTION, *MLP, *NORM * 2]
UNTIED = ["embed", "norm", "head"]

FAMILIES = {
    "llama": Family([LLAMA] * 2, UNTIED),
    "mistral": Family([LLAMA] * 2, UNTIED),
    "mixtral": Family(
        [[*ATTENTION, "router", "gate_up_proj", "down_proj", *NORM * 2]] * 2,
        UNTIED,
        [[*ATTENTION, "router", *MLP * 2, *NORM * 2]] * 2,
        config={"num_local_experts": 2},
    ),
    "qwen2": Family([[*LLAMA, *BIAS * 3]] * 2, UNTIED),
    "qwen3_moe": Family(
        [[*ATTENTION, "router", "gate_up_proj", "down_proj", *NORM * 4]] * 2,
        UNTIED,
        [[*ATTENTION, "router", *MLP * 2, *NORM * 4]] * 2,
        config={"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    ),
    "deepseek_v3": Family(
        [
            [*MLA, *MLP, *NORM * 4],
            [*MLA, "router", "buffer", "gate_up_proj", "down_proj", *MLP, *NORM * 4],
        ],
        UNTIED,
        [[*MLA, *MLP, *NORM * 4], [*MLA, "router", "buffer", *MLP * 4, *MLP, *NORM * 4]],
        config={
            "first_k_dense_replace": 1,
            "head_dim": 4,
            "kv_lora_rank": 4,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 4,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "topk_group": 1,
            "v_head_dim": 4,
        },
    ),
    "gemma": Family([LLAMA] * 2, ["embed", "norm"], tied="model.embed_tokens.weight"),
    "gemma3_text": Family(
        [[*LLAMA, *NORM * 4]] * 2, ["embed", "norm"], tied="model.embed_tokens.weight"
    ),
    "phi": Family(
        [[*ATTENTION, "up_proj", "down_proj", *NORM * 2, *BIAS * 6]] * 2,
        [*UNTIED, "norm", "bias"],
        config={"num_key_value_heads": 2},
    ),
    "phi3": Family([["qkv_proj", "o_proj", "gate_up_proj", "down_proj", *NORM * 2]] * 2, UNTIED),
    "gpt2": Family(
        [["qkv_proj", "o_proj", "up_proj", "down_proj", *NORM * 4, *BIAS * 4]] * 2,
        ["embed", "position", *NORM * 2],
        config={"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 32},
        tied="transformer.wte.weight",
    ),
    "gpt_neox": Family(
        [["qkv_proj", "o_proj", "up_proj", "down_proj", *NORM * 4, *BIAS * 4]] * 2,
        [*UNTIED, "norm"],
        config={"max_position_embeddings": 8},
    ),
}
FUSED = {name for name, family in FAMILIES.items() if family.disk_blocks is not None}
"""Families whose experts are one tensor in memory and one matrix an expert on disk."""


@dataclass(frozen=True)
class Built:
    """Two models of one family and where each is saved."""

    family: Family
    base: PreTrainedModel
    tuned: PreTrainedModel
    base_path: Path
    tuned_path: Path


@pytest.fixture(params=FAMILIES)
def built(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    build_model: Callable[..., PreTrainedModel],
) -> Built:
    family = FAMILIES[request.param]
    models = [build_model(request.param, seed=seed, **family.config) for seed in (0, 1)]
    paths = [tmp_path / "base", tmp_path / "tuned"]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    return Built(family, *models, *paths)


def kinds_by_block(pair: ModelPair) -> dict[int | None, Counter[str]]:
    found: dict[int | None, Counter[str]] = {}
    for tensor in pair.tensors:
        found.setdefault(tensor.layer, Counter())[tensor.kind] += 1
    return found


def expected(blocks: list[list[str]], outside: list[str]) -> dict[int | None, Counter[str]]:
    return {None: Counter(outside)} | {
        number: Counter(block) for number, block in enumerate(blocks)
    }


def test_in_memory_every_tensor_pairs_with_its_layer_and_kind(built: Built) -> None:
    pair = open_pair(built.base, built.tuned)
    assert pair.problems == ()
    assert kinds_by_block(pair) == expected(built.family.blocks, built.family.outside)


def test_on_disk_every_tensor_pairs_with_its_layer_and_kind(built: Built) -> None:
    pair = open_pair(built.base_path, built.tuned_path)
    assert pair.problems == ()
    assert pair.renamed == {}
    assert kinds_by_block(pair) == expected(built.family.on_disk(), built.family.outside)


def test_tied_embeddings_are_counted_once(built: Built) -> None:
    tied = {"lm_head.weight": built.family.tied} if built.family.tied else {}
    assert open_pair(built.base, built.tuned).tied == tied
    assert open_pair(built.base, built.tuned_path).tied == tied


def test_in_memory_against_disk(built: Built) -> None:
    pair = open_pair(built.base, built.tuned_path)
    assert pair.problems == ()
    assert kinds_by_block(pair) == expected(built.family.on_disk(), built.family.outside)
    fused = built.base.config.model_type in FUSED
    assert any("fused experts" in note for note in pair.notes) == fused


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.block_sparse_moe.experts.1.w1.weight", 3, "gate_proj"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", 3, "down_proj"),
        ("model.layers.3.block_sparse_moe.experts.1.w3.weight", 3, "up_proj"),
        ("model.layers.3.block_sparse_moe.gate.weight", 3, "router"),
        ("model.layers.3.mlp.gate_proj.weight", 3, "gate_proj"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 1, "buffer"),
        ("model.layers.1.mlp.experts.down_proj", 1, "down_proj"),
        ("transformer.h.10.attn.c_proj.weight", 10, "o_proj"),
        ("transformer.h.10.mlp.c_proj.weight", 10, "down_proj"),
        ("h.10.attn.bias", 10, "buffer"),
        ("h.10.attn.masked_bias", 10, "buffer"),
        ("gpt_neox.layers.0.attention.dense.weight", 0, "o_proj"),
        ("gpt_neox.layers.0.attention.dense.bias", 0, "bias"),
        ("gpt_neox.layers.0.attention.bias", 0, "buffer"),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", 0, "buffer"),
        ("embed_out.weight", None, "head"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", 0, "q_proj"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", 0, "lora_A"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 0, "lora_magnitude_vector"),
        ("lm_head.bias", None, "bias"),
        ("0.weight", 0, "weight"),
        ("scale", None, "scale"),
        ("", None, ""),
    ],
)
def test_layer_and_kind_of_a_name(name: str, layer: int | None, kind: str) -> None:
    assert (layer_of(name), kind_of(name)) == (layer, kind)
