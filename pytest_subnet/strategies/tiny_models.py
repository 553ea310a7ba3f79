"""A decoder so small that a training run of it fits into one draw."""

from __future__ import annotations

import torch
from torch import nn

VOCAB, WIDTH, INNER, HEADS, LAYERS = 16, 8, 16, 2, 2
BATCH, LENGTH = 4, 8

PARAMETERS = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{module}.weight"
        for layer in range(LAYERS)
        for module in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
)
"""The names of its parameters, in order: as transformers names those of a Llama."""


class _Unset:
    """Weights are set from a seed; torch's own start takes as long as a step of training."""

    def reset_parameters(self) -> None:
        """Leave them."""


class _Linear(_Unset, nn.Linear):
    pass


class _Embedding(_Unset, nn.Embedding):
    pass


class _Norm(_Unset, nn.LayerNorm):
    pass


class TinyDecoder(nn.Module):
    """A decoder with attention, gated MLPs and norms, without positions: tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = _Embedding(VOCAB, WIDTH)
        self.model.layers = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.model.norm = _Norm(WIDTH, bias=False)
        self.lm_head = _Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, length, VOCAB]` of int64 tokens `[batch, length]`."""
        hidden = self.model.embed_tokens(tokens)  # type: ignore[operator]  # of an nn.Module
        for block in self.model.layers:  # type: ignore[union-attr]
            hidden = block(hidden)
        logits: torch.Tensor = self.lm_head(self.model.norm(hidden))  # type: ignore[operator]
        return logits


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = _Norm(WIDTH, bias=False)
        self.self_attn = _Attention()
        self.post_attention_layernorm = _Norm(WIDTH, bias=False)
        self.mlp = _Mlp()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        result: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = _Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = _Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = _Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = _Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return result


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = _Linear(WIDTH, INNER, bias=False)
        self.up_proj = _Linear(WIDTH, INNER, bias=False)
        self.down_proj = _Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        result: torch.Tensor = self.down_proj(gated)
        return result


def make_decoder(seed: int, dtype: torch.dtype) -> TinyDecoder:
    """The decoder with the weights of `seed`: norms 1, matrices from N(0, 0.02²), as Llama's.

    Torch's own random numbers are not touched.
    """
    model = TinyDecoder().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def make_batches(seed: int, count: int) -> torch.Tensor:
    """Random tokens, int64 `[count, BATCH, LENGTH + 1]`; the first batches of more are the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (count, BATCH, LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of each next token, in float32."""
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
