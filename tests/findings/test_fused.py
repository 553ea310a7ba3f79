"""Against the models themselves: a part gives what its model computes with it."""

from pathlib import Path

import pytest
import torch
import transformers

from pytest_subnet import open_checkpoint, open_pair
from pytest_subnet.findings.matrices.fused import parts_of
from pytest_subnet.findings.rotation.finding import singular_rotation

HEADS, WIDTH = 4, 32


def saved(model: torch.nn.Module, where: Path):
    model.save_pretrained(where)
    return open_checkpoint(where)


def projected(checkpoint, name: str, inputs: torch.Tensor, *, transposed: bool = False):
    """What each part gives of `inputs`."""
    matrix = checkpoint.read(name)
    parts = parts_of(name, tuple(matrix.shape), checkpoint.config)
    return {
        part.name: inputs @ (part.of(matrix) if transposed else part.of(matrix).T) for part in parts
    }


def test_gpt2_has_transposed_thirds(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config)
    attention = model.transformer.h[0].attn
    inputs = torch.randn(5, WIDTH)
    with torch.no_grad():
        expected = attention.c_attn(inputs).split(WIDTH, dim=-1)
    name = "transformer.h.0.attn.c_attn.weight"
    found = projected(saved(model, tmp_path), name, inputs, transposed=True)
    assert list(found) == ["q", "k", "v"]
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_neox_is_interleaved_by_heads(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=64,
        vocab_size=64,
    )
    model = transformers.GPTNeoXForCausalLM(config)
    attention = model.gpt_neox.layers[0].attention
    inputs = torch.randn(5, WIDTH)
    with torch.no_grad():
        fused = attention.query_key_value(inputs).view(5, HEADS, 3 * WIDTH // HEADS)
        expected = [each.reshape(5, WIDTH) for each in fused.chunk(3, dim=-1)]
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    found = projected(saved(model, tmp_path), name, inputs)
    assert list(found) == ["q", "k", "v"]
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other + 0 * one, atol=1e-5, rtol=1e-5)


def test_phi3_has_grouped_keys_and_halves(tmp_path: Path) -> None:
    config = transformers.Phi3Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        pad_token_id=0,
    )
    model = transformers.Phi3ForCausalLM(config)
    layer = model.model.layers[0]
    inputs = torch.randn(5, WIDTH)
    checkpoint = saved(model, tmp_path)
    with torch.no_grad():
        queries, keys, values = layer.self_attn.qkv_proj(inputs).split([32, 16, 16], dim=-1)
        gate, up = layer.mlp.gate_up_proj(inputs).chunk(2, dim=-1)
    found = projected(checkpoint, "model.layers.0.self_attn.qkv_proj.weight", inputs)
    for one, other in zip(found.values(), (queries, keys, values), strict=True):
        torch.testing.assert_close(one, other)
    found = projected(checkpoint, "model.layers.0.mlp.gate_up_proj.weight", inputs)
    assert list(found) == ["gate", "up"]
    for one, other in zip(found.values(), (gate, up), strict=True):
        torch.testing.assert_close(one, other)


def test_a_rotation_of_one_part_is_of_that_part(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    saved(model, tmp_path / "base")
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight
        weight[:, WIDTH : 2 * WIDTH] += 0.5 * weight.std() * torch.randn(WIDTH, WIDTH)
    saved(model, tmp_path / "tuned")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    rows = singular_rotation(pair, k=4, include="*c_attn.weight", null=None).per_tensor
    assert [row.name.rpartition("[")[2] for row in rows] == ["q]", "k]", "v]"]
    assert [row.shape for row in rows] == [(WIDTH, WIDTH)] * 3
    assert [row.mean_deg > 1 for row in rows] == [False, True, False]


def test_what_the_config_does_not_say_is_measured_whole() -> None:
    base = {"h.0.attn.query_key_value.weight": torch.randn(48, 16)}
    tuned = {name: 1.1 * each for name, each in base.items()}
    result = singular_rotation(open_pair(base, tuned), k=2, null=None)
    assert len(result.per_tensor) == 1
    assert result.notes == (
        "1 fused matrix measured as a whole, such as h.0.attn.query_key_value.weight: the config "
        "does not say how it is made up",
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_attention_heads": 5},
        {"num_attention_heads": 4, "multi_query": True},
        {"num_attention_heads": 4, "new_decoder_architecture": True},
        {"num_attention_heads": 4, "num_kv_heads": 2},
        {"num_attention_heads": "four"},
        {"num_attention_heads": True},
    ],
)
def test_layouts_that_are_not_known(config: dict) -> None:
    assert parts_of("h.0.query_key_value.weight", (48, 16), config) is None
