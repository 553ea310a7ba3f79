"""What a tensor is for and in which block it sits, read off its name.

The families name the same matrix differently (`c_fc`, `fc1`, `dense_h_to_4h`, `w3`); one word per
idea makes tables and selections carry over. An unknown module keeps its own name as its kind.
"""

from __future__ import annotations

import functools
import re

_NORM = re.compile(r"norm|^ln(_|\d|$)|layernorm", re.IGNORECASE)

_BY_MODULE = {
    "embed": ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared"),
    "position": ("wpe", "embed_positions", "position_embeddings"),
    "head": ("lm_head", "embed_out"),
    "router": ("gate", "router", "gate_network"),
    "qkv_proj": ("c_attn", "query_key_value", "Wqkv", "qkv"),
    "o_proj": ("out_proj",),
    "gate_proj": ("w1",),
    "down_proj": ("w2", "fc2", "dense_4h_to_h"),
    "up_proj": ("w3", "fc1", "c_fc", "dense_h_to_4h"),
}
VOCABULARY = tuple(
    f"{module}{wrapper}.weight"
    for kind in ("embed", "head")
    for module in _BY_MODULE[kind]
    for wrapper in ("", ".base_layer")
)
"""How the names of embeddings and heads end."""

_KIND = {module: kind for kind, modules in _BY_MODULE.items() for module in modules}
_ATTENTION = frozenset({"attn", "attention", "self_attn", "self_attention"})

_BUFFERS = frozenset(
    {
        "inv_freq",
        "original_inv_freq",
        "masked_bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "position_ids",
        "e_score_correction_bias",  # DeepSeek's router balance: moved by hand, never by a gradient
    }
)
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


_MOST_DIGITS = 9  # a longer number in a name from a file is no block


def layer_of(name: str) -> int | None:
    """The block a tensor belongs to: the first number in its name.

    >>> layer_of("model.layers.12.mlp.experts.3.up_proj.weight"), layer_of("lm_head.weight")
    (12, None)
    """
    for part in name.split("."):
        if part.isdecimal() and len(part) <= _MOST_DIGITS:
            return int(part)
    return None


def kind_of(name: str, *, is_parameter: bool = False) -> str:
    """What a tensor is for; `is_parameter` says that it is no buffer, whatever its name suggests.

    >>> kind_of("model.layers.0.mlp.down_proj.weight"), kind_of("transformer.h.0.ln_1.bias")
    ('down_proj', 'norm')
    >>> kind_of("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    'down_proj'
    """
    path = tuple([part for part in name.split(".") if not part.isdecimal()])
    return _kind(path, is_parameter)


@functools.lru_cache(maxsize=4096)  # the blocks of a model repeat the same few names
def _kind(path: tuple[str, ...], is_parameter: bool) -> str:
    *parts, leaf = [part for part in path if part != "base_layer"] or [""]
    for part in (leaf, *parts):
        if part in _ADAPTERS:
            return part
    parent = parts[-1] if parts else ""
    is_causal_mask = leaf == "bias" and parent in ("attn", "attention")
    if not is_parameter and (leaf in _BUFFERS or is_causal_mask):
        return "buffer"
    # A fused expert is a parameter itself (`mlp.experts.down_proj`): then the leaf is the module.
    module = leaf if leaf not in ("weight", "bias") else parent
    if _NORM.search(module):
        return "norm"
    if leaf == "bias":
        return "bias"
    if module in ("c_proj", "dense"):
        return "o_proj" if _ATTENTION & set(parts) else "down_proj"
    return _KIND.get(module, module or leaf)
