"""What tiny models of the known families call their tensors, and of which shapes they are."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """The sizes of a decoder-only model; few entries each.

    Attributes:
        hidden: of the residual stream.
        inner: of the feed-forward part.
        vocabulary: rows of the embedding.
        layers: how many blocks.
        experts: how many in each block, where the family has them.
    """

    hidden: int
    inner: int
    vocabulary: int
    layers: int
    experts: int


class Family(NamedTuple):
    """Names and shapes, a side of which is one of `h`, `3h`, `i`, `v`, `e`.

    A name with `{layer}` stands once a block, one with `{expert}` once an expert of it.

    Attributes:
        embedding: the name of the input embedding.
        parts: all that may be left out, with shapes.
        head: the name of the output head, which is of the embedding's shape.
    """

    embedding: str
    parts: dict[str, tuple[str, ...]]
    head: str


_HH, _IH, _HI, _H = ("h", "h"), ("i", "h"), ("h", "i"), ("h",)

FAMILIES = {
    "llama": Family(
        "model.embed_tokens.weight",
        {
            "model.layers.{layer}.self_attn.q_proj.weight": _HH,
            "model.layers.{layer}.self_attn.k_proj.weight": _HH,
            "model.layers.{layer}.self_attn.v_proj.weight": _HH,
            "model.layers.{layer}.self_attn.o_proj.weight": _HH,
            "model.layers.{layer}.mlp.gate_proj.weight": _IH,
            "model.layers.{layer}.mlp.up_proj.weight": _IH,
            "model.layers.{layer}.mlp.down_proj.weight": _HI,
            "model.layers.{layer}.input_layernorm.weight": _H,
            "model.layers.{layer}.post_attention_layernorm.weight": _H,
            "model.norm.weight": _H,
        },
        "lm_head.weight",
    ),
    "gpt2": Family(
        "transformer.wte.weight",
        {
            "transformer.wpe.weight": ("v", "h"),
            "transformer.h.{layer}.ln_1.weight": _H,
            "transformer.h.{layer}.attn.c_attn.weight": ("h", "3h"),
            "transformer.h.{layer}.attn.c_attn.bias": ("3h",),
            "transformer.h.{layer}.attn.c_proj.weight": _HH,
            "transformer.h.{layer}.ln_2.weight": _H,
            "transformer.h.{layer}.mlp.c_fc.weight": _HI,
            "transformer.h.{layer}.mlp.c_fc.bias": ("i",),
            "transformer.h.{layer}.mlp.c_proj.weight": _IH,
            "transformer.ln_f.weight": _H,
        },
        "lm_head.weight",
    ),
    "gpt_neox": Family(
        "gpt_neox.embed_in.weight",
        {
            "gpt_neox.layers.{layer}.input_layernorm.weight": _H,
            "gpt_neox.layers.{layer}.attention.query_key_value.weight": ("3h", "h"),
            "gpt_neox.layers.{layer}.attention.query_key_value.bias": ("3h",),
            "gpt_neox.layers.{layer}.attention.dense.weight": _HH,
            "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight": _IH,
            "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": _HI,
            "gpt_neox.final_layer_norm.weight": _H,
        },
        "embed_out.weight",
    ),
    "mixtral": Family(
        "model.embed_tokens.weight",
        {
            "model.layers.{layer}.self_attn.q_proj.weight": _HH,
            "model.layers.{layer}.self_attn.k_proj.weight": _HH,
            "model.layers.{layer}.self_attn.v_proj.weight": _HH,
            "model.layers.{layer}.self_attn.o_proj.weight": _HH,
            "model.layers.{layer}.block_sparse_moe.gate.weight": ("e", "h"),
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": _IH,
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": _HI,
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": _IH,
            "model.layers.{layer}.input_layernorm.weight": _H,
            "model.norm.weight": _H,
        },
        "lm_head.weight",
    ),
}
"""By the name that transformers gives the model type; the simplest first."""

MOST_PARTS = max(len(family.parts) for family in FAMILIES.values())


def shapes_of(family: Family, sizes: Sizes, present: list[bool]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model by the names of its tensors, block by block, without its head.

    Args:
        family: of which family.
        sizes: how large.
        present: for each part of the family, whether the model has it; may be longer.
    """
    known = {
        "h": sizes.hidden,
        "3h": 3 * sizes.hidden,
        "i": sizes.inner,
        "v": sizes.vocabulary,
        "e": sizes.experts,
    }
    parts = {
        name: tuple(known[side] for side in shape)
        for (name, shape), here in zip(family.parts.items(), present, strict=False)
        if here
    }
    shapes: dict[str, tuple[int, ...]] = {family.embedding: (sizes.vocabulary, sizes.hidden)}
    for layer in range(sizes.layers):
        for name, shape in parts.items():
            if "{expert}" in name:
                for expert in range(sizes.experts):
                    shapes[name.format(layer=layer, expert=expert)] = shape
            elif "{layer}" in name:
                shapes[name.format(layer=layer)] = shape
    return shapes | {name: shape for name, shape in parts.items() if "{" not in name}
