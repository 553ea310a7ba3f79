"""Fused matrices are measured as those they are made of, which the tests take apart themselves."""

import re

import pytest
import torch

from pytest_subnet import SelectionError, open_pair
from pytest_subnet.findings.geometry.finding import assert_off_principal, update_geometry

transformers = pytest.importorskip("transformers")

HEADS, WIDTH = 4, 32
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SHARED = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def gpt2():
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=64, **ENDS)
    return transformers.GPT2LMHeadModel(config), "*c_attn.weight"


def of_gpt2(name, fused):
    del name
    return dict(zip("qkv", fused.split(WIDTH, dim=1), strict=True))


def neox():
    config = transformers.GPTNeoXConfig(**SHARED, intermediate_size=64, vocab_size=64, **ENDS)
    return transformers.GPTNeoXForCausalLM(config), "*query_key_value.weight"


def of_neox(name, fused):
    del name
    heads = fused.view(HEADS, 3, WIDTH // HEADS, WIDTH)
    return {part: heads[:, at].reshape(WIDTH, WIDTH) for at, part in enumerate("qkv")}


def phi3():
    config = transformers.Phi3Config(
        **SHARED, num_key_value_heads=2, intermediate_size=48, vocab_size=64, pad_token_id=0, **ENDS
    )
    return transformers.Phi3ForCausalLM(config), ["*qkv_proj.weight", "*gate_up_proj.weight"]


def of_phi3(name, fused):
    if "gate_up" in name:
        return dict(zip(("gate", "up"), fused.chunk(2), strict=True))
    return dict(zip("qkv", fused.split([WIDTH, WIDTH // 2, WIDTH // 2]), strict=True))


@pytest.fixture(params=[(gpt2, of_gpt2), (neox, of_neox), (phi3, of_phi3)])
def both(request, tmp_path):
    """A pair of a fused model, which of its matrices are, and the pair of what they are made of."""
    make, apart = request.param
    torch.manual_seed(0)
    model, fused = make()
    model.bfloat16().save_pretrained(tmp_path / "base")
    base = {name: each.clone() for name, each in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight += (
                2e-4
                * torch.randn_like(weight)
                * torch.rand(len(weight)).view(-1, *[1] * (weight.dim() - 1))
            )
    model.save_pretrained(tmp_path / "tuned")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    names = [row.name for row in update_geometry(pair, rank=1, include=fused).per_tensor]
    sides = [
        {
            unfused(f"{name}[{part}]"): weight.contiguous()
            for name in dict.fromkeys(each.partition("[")[0] for each in names)
            for part, weight in apart(name, stored(state, name)).items()
        }
        for state in (base, model.state_dict())
    ]
    return pair, fused, open_pair(*sides)


def unfused(name):
    """A name that does not say that the matrix is fused."""
    return re.sub("c_attn|query_key_value|gate_up_proj|qkv_proj", "apart", name)


def stored(state, name):
    """A tensor of a model by the name in its file, which may lack the model's prefix."""
    (found,) = [each for key, each in state.items() if key == name or key.endswith(f".{name}")]
    return found


@pytest.mark.parametrize("null", ["exponent", "matrix", "rowcol", "pooled"])
def test_fused_and_apart_have_the_same_numbers(both, null):
    pair, fused, apart = both
    settings = {"fraction": 0.25, "rank": 6, "null": null}
    found = update_geometry(pair, include=fused, **settings)
    expected = update_geometry(apart, **settings)

    assert len(found.per_tensor) == len(expected.per_tensor)
    by_name = {row.name: row for row in expected.per_tensor}
    for row in found.per_tensor:
        other = by_name[unfused(row.name)]
        assert (row.shape, row.principal, row.low_magnitude) == (
            other.shape,
            other.principal,
            other.low_magnitude,
        )
        assert 0 < row.principal.both < row.principal.updated < row.numel
    for share, other in (
        (found.principal, expected.principal),
        (found.low_magnitude, expected.low_magnitude),
    ):
        assert (share.both, share.updated, share.members) == (
            other.both,
            other.updated,
            other.members,
        )
        assert share.expected == pytest.approx(other.expected, rel=1e-12)
        assert share.expected_by_rounding == pytest.approx(other.expected_by_rounding, rel=1e-12)
        if null == "rowcol":  # its variance has no closed form
            assert share.z is other.z is None
        else:
            assert share.z == pytest.approx(other.z, rel=1e-9)


def test_parts_say_whose_and_what_they_are(both):
    pair, fused, _ = both
    rows = update_geometry(pair, rank=6, include=fused).per_tensor
    assert {row.layer for row in rows} == {0, 1}
    for row in rows:
        part = row.name[row.name.index("[") + 1 : -1]
        assert row.kind == f"{part}_proj"


def test_a_rank_above_that_of_a_part_is_refused_by_its_name(tmp_path):
    model, _ = phi3()
    model.bfloat16().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    name = re.escape("model.layers.0.self_attn.qkv_proj.weight")
    message = (
        rf"rank=20 is above the rows or columns of 2 selected matri(ces|xs) \({name}\[k\], "
        rf"{name}\[v\]\); pass one of at most 16, or leave them out with exclude="
    )
    with pytest.raises(SelectionError, match=f"^{message}$"):
        assert_off_principal(
            pair, max_principal_lift=0.9, rank=20, include="*layers.0*qkv_proj.weight"
        )


def test_what_cannot_be_taken_apart_is_measured_whole_and_said_to_be():
    weight = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "h.0.attn.query_key_value.weight"
    pair = open_pair({name: weight}, {name: weight * 1.01})  # in memory there is no config
    found = update_geometry(pair, rank=6)
    assert [row.name for row in found.per_tensor] == [name]
    assert found.notes == (
        f"1 fused matrix measured as a whole, such as {name}: the config does not say how it is "
        "made up",
    )
