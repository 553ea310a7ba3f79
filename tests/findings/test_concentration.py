"""Where a mask lies and how large it is: shares, lifts, plurality, sizes, what failures say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pytest_subnet import (
    SelectionError,
    UpdateMask,
    VacuousBoundWarning,
    assert_mask_concentration,
    assert_mask_density,
    assert_subnetwork_size,
    mask_concentration,
    open_pair,
    update_mask,
)
from pytest_subnet.reports.measured import measured

Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


def first(count, *shape):
    """The first `count` entries in row order."""
    return (np.arange(np.prod(shape)) < count).reshape(shape)


@pytest.fixture
def mask():
    """200 entries of 1,200, half of them in the first MLP, which has a sixth of the entries."""
    return UpdateMask.of(
        {
            EMBED: first(10, 40, 10),
            NORM: first(0, 100),
            Q.format(0): first(30, 10, 10),
            UP.format(0): first(60, 10, 10),
            DOWN.format(0): first(40, 10, 10),
            Q.format(1): first(20, 10, 10),
            UP.format(1): first(10, 10, 20),
            DOWN.format(1): first(30, 10, 10),
        }
    )


def test_shares_of_constructed_counts(mask, recorded):
    result = mask_concentration(mask, "module")
    assert (result.count, result.numel, result.plurality) == (200, 1200, "model.layers.0.mlp")
    assert [(each.name, each.inside, each.numel) for each in result.groups] == [
        ("model.layers.0.mlp", 100, 200),
        ("model.layers.1.mlp", 40, 300),
        ("model.layers.0.self_attn", 30, 100),
        ("model.layers.1.self_attn", 20, 100),
        ("model.embed_tokens", 10, 400),
        ("model.layers.0.input_layernorm", 0, 100),
    ]
    top = result["model.layers.0.mlp"]
    assert (top.share, top.parameter_share, top.lift, top.density) == (0.5, 1 / 6, 3, 0.5)
    assert sum(each.share for each in result.groups) == pytest.approx(1)
    assert recorded == [result]
    assert measured(result, with_tensors=True)["numbers"]["plurality"] == "model.layers.0.mlp"
    assert repr(result) == (
        "MaskConcentration(model.layers.0.mlp: share 0.5, lift 3, of 6 groups by module, 200 of "
        "1,200 in the mask)"
    )
    assert "of parameters" in result.table()
    assert dict(result.fingerprints) == {"base": "", "tuned": ""}


def test_the_denominator_is_what_is_selected(mask):
    result = mask_concentration(mask, "kind", exclude=[EMBED, "*norm*"])
    assert (result.count, result.numel, result.tensors, result.tensors_total) == (190, 700, 6, 8)
    assert {each.name: each.inside for each in result.groups} == {
        "up_proj": 70,
        "down_proj": 70,
        "q_proj": 50,
    }
    assert result.plurality is None
    layers = mask_concentration(mask, "layer")
    assert {each.name: each.inside for each in layers.groups} == {"0": 130, "1": 60, "outside": 10}
    own = mask_concentration(mask, {"mlp": "*.mlp.*", "attention": ["*.0.self*", "*.1.self*"]})
    assert {each.name: each.inside for each in own.groups} == {
        "mlp": 140,
        "attention": 50,
        "others": 10,
    }


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 5))
def test_a_uniform_mask_has_a_lift_of_one_everywhere(rows, every):
    entries = {
        f"h.{layer}.mlp.w": np.tile([True] + [False] * every, (height, 1))
        for layer, height in enumerate(rows)
    }
    for by in ("kind", "layer", "module"):
        result = mask_concentration(UpdateMask.of(entries), by)
        assert all(each.lift == 1 for each in result.groups)


def test_fused_queries_keys_and_values_by_the_layout_of_the_model(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        config = GPTNeoXConfig(**sizes, num_hidden_layers=1, vocab_size=16)
        model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():  # the keys of each head, as the model itself takes them apart
        fused = model.gpt_neox.layers[0].attention.query_key_value.weight
        fused.view(2, 3, 4, 8)[:, 1] += 1
        fused.view(2, 3, 4, 8)[0, 2, 0, :3] += 1
    model.save_pretrained(tmp_path / "tuned")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    mask = update_mask(pair, kinds="qkv_proj", include="*.weight")
    apart = mask_concentration(mask, config=pair.base.config)
    assert {each.name: (each.inside, each.numel) for each in apart.groups} == {
        "k_proj": (64, 64),
        "v_proj": (3, 64),
        "q_proj": (0, 64),
    }
    assert apart.notes == ()
    whole = mask_concentration(mask)
    assert {each.name: each.inside for each in whole.groups} == {"qkv_proj": 67}
    assert whole.notes == (
        "1 fused tensor is one group whole: how queries, keys and values lie in "
        "gpt_neox.layers.0.attention.query_key_value.weight is known from the model's config=",
    )
    contiguous = mask_concentration(mask, {"thirds": "*"})
    assert contiguous["thirds"].lift == 1


def test_gpt2_needs_no_config_and_gates_are_the_first_half():
    flags = np.zeros((4, 12), bool)
    flags[:, 4:8] = True
    halves = np.zeros((6, 2), bool)
    halves[:3] = True
    mask = UpdateMask.of(
        {"h.0.attn.c_attn.weight": flags, "layers.0.mlp.gate_up_proj.weight": halves}
    )
    result = mask_concentration(mask)
    assert {each.name: each.inside for each in result.groups} == {
        "k_proj": 16,
        "gate_proj": 6,
        "q_proj": 0,
        "v_proj": 0,
        "up_proj": 0,
    }


def test_a_group_with_enough_of_the_mask(mask):
    pattern = "*.layers.0.mlp.*"
    result = assert_mask_concentration(mask, pattern, min_share=0.5, min_lift=3, plurality=True)
    assert result[pattern].share == 0.5
    assert result.plurality == pattern
    both = assert_mask_concentration(mask, ["*.layers.0.mlp.*", "*q_proj*"], min_share=0.75)
    assert both.groups[0].name == "*.layers.0.mlp.*, *q_proj*"


def test_a_group_with_too_little(mask, fails_with):
    with fails_with("""
        *.layers.0.mlp.* has 50.00% of the mask, below the required 60.00%
          mask       given: 200 / 1,200 entries   (density 16.67%, 8/8 tensors)
          group      50.00% of the mask, 16.67% of the parameters, lift 3   (2 tensors)
          beside it  model.layers.1.mlp: 20.00% of the mask, 25.00% of the parameters, lift 0.8
                     model.layers.0.self_attn: 15.00% of the mask, 8.33% of the parameters, lift 1.8
                     model.layers.1.self_attn: 10.00% of the mask, 8.33% of the parameters, lift 1.2
                     … 2 more
          to accept  min_share=0.5
    """):
        assert_mask_concentration(mask, "*.layers.0.mlp.*", min_share=0.6)
    with pytest.raises(AssertionError) as caught:
        assert_mask_concentration(mask, "*.layers.0.mlp.*", min_lift=3.01)
    lines = str(caught.value).splitlines()
    assert lines[0] == "*.layers.0.mlp.* has 3 times its share of the mask, required 3.01"
    assert lines[-1] == "  to accept  min_lift=3.0"
    with pytest.raises(AssertionError) as caught:
        assert_mask_concentration(mask, "*.layers.0.self_attn.*", plurality=True)
    assert str(caught.value).splitlines()[0] == (
        "*.layers.0.self_attn.* has 15.00% of the mask, no plurality: model.layers.0.mlp has 50.00%"
    )


def test_a_plurality_that_another_group_has_too():
    mask = UpdateMask.of({"h.0.mlp.w": first(3, 9), "h.1.mlp.w": first(3, 4)})
    with pytest.raises(AssertionError, match=r"no plurality: h\.1\.mlp has as much"):
        assert_mask_concentration(mask, "h.0.*", plurality=True)


def test_a_group_that_is_most_of_the_model_has_most_of_any_mask(mask, fails_with):
    with fails_with("""
        *.layers.* has 95.00% of the mask, and 66.67% of the parameters, so that the required \
60.00% says nothing
          mask       given: 200 / 1,200 entries   (density 16.67%, 8/8 tensors)
          group      95.00% of the mask, 66.67% of the parameters, lift 1.43   (7 tensors)
          beside it  model.embed_tokens: 5.00% of the mask, 33.33% of the parameters, lift 0.15
          usually    a pattern that names most of the model, which has most of any mask
          to accept  min_share=0.95
    """):
        assert_mask_concentration(mask, "*.layers.*", min_share=0.6)
    assert assert_mask_concentration(mask, "*.layers.*", min_share=0.7)


def test_a_size(mask, fails_with, recorded):
    result = assert_subnetwork_size(mask, at_least=0.16, at_most=0.17)
    assert (result.count, result.numel, result.density) == (200, 1200, 1 / 6)
    assert recorded == [result]
    assert assert_subnetwork_size(mask, at_most=0.28, exclude=[EMBED, "*norm*"]).numel == 700
    with fails_with("""
        subnetwork size 16.67% is above the allowed 10.00%
          mask       given: 200 / 1,200 entries   (density 16.67%, 8/8 tensors)
          to accept  at_most=0.17
    """):
        assert_subnetwork_size(mask, at_most=0.1)
    with pytest.raises(AssertionError, match=r"^subnetwork size 16\.67% is below the required 20"):
        assert_subnetwork_size(mask, at_least=0.2)


def test_a_density_in_each_matrix_with_one_entry_of_slack():
    kept = 10 - int((1 - 0.9) * 10)  # the published count: all ten of ten
    assert kept == 10
    mask = UpdateMask.of({"a": first(kept, 10), "b": first(9, 10), "c": first(89, 100)})
    result = assert_mask_density(mask, at_least=0.9, at_most=0.9)
    assert [each.inside for each in result.per_tensor] == [10, 9, 89]
    assert measured(result, with_tensors=True)["tensors"]["rows"][2][0] == "c"
    two_off = UpdateMask.of({"a": first(10, 10), "c": first(88, 100), "d": first(92, 100)})
    with pytest.raises(AssertionError) as caught:
        assert_mask_density(two_off, at_least=0.9, at_most=0.9)
    assert str(caught.value).splitlines() == [
        "mask density outside 90.00% to 90.00%: 1 below and 1 above, of 3 tensors",
        "  mask       given: 190 / 210 entries   (density 90.48%, 3/3 tensors)",
        "  densities  88.00% to 100.00%, one entry of slack in each",
        "  worst      c  88.00%  88 in the mask  (bool[100])",
        "             d  92.00%  92 in the mask  (bool[100])",
        "  usually    a density that differs by layer, or that is counted over all of them:",
        '             per="all" bounds the whole',
        "  to accept  at_least=0.88, at_most=0.92",
    ]
    assert assert_mask_density(two_off, at_least=0.9, at_most=0.9, per="all").density == 190 / 210
    none = UpdateMask.of({"w": [False] * 20, "v": [True] * 20})
    with pytest.raises(AssertionError, match="leave out with exclude= those of which none is in"):
        assert_mask_density(none, at_least=0.9)


def test_a_density_over_all_of_it(fails_with):
    mask = UpdateMask.of({"a": first(50, 100), "b": first(53, 100)})
    assert assert_mask_density(mask, at_most=0.505, per="all")  # two tensors, two entries
    with fails_with("""
        mask density 51.50% is above the allowed 50.00%
          mask       given: 103 / 200 entries   (density 51.50%, 2/2 tensors)
          to accept  at_most=0.52
    """):
        assert_mask_density(mask, at_most=0.5, per="all")
    with pytest.raises(AssertionError, match=r"^mask density 51\.50% is below the required 53"):
        assert_mask_density(mask, at_least=0.53, per="all")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda mask: mask_concentration(mask, "kinds"), ValueError, "by='kinds' is none of kind, "
         "layer, module, nor a mapping from names of groups to globs; did you mean kind?"),
        (lambda mask: mask_concentration({}), TypeError, "mask is dict, not an UpdateMask; make "
         "one with update_mask(pair), UpdateMask.of({name: booleans}) or UpdateMask.load(path)"),
        (
            lambda mask: mask_concentration(mask, {"others": "*.mlp.*"}),
            ValueError,
            "by has a group named 'others', which is what tensors in no group are called; name it "
            "otherwise",
        ),
        (lambda mask: mask_concentration(mask, "layer", config={}), ValueError, "config says how "
         'fused tensors are taken apart, which by="kind" does'),
        (lambda mask: mask_concentration(mask, config=3), TypeError, "config is int, not a "
         "mapping; pass model.config.to_dict()"),
        (lambda mask: mask_concentration(mask, include=NORM), SelectionError, "the mask of given "
         "has no entry in 1 tensor selected: it is empty, and has no shares"),
        (lambda mask: mask_concentration(mask, include=NORM, exclude=NORM), SelectionError,
         "nothing is selected: include='model.layers.0.input_layernorm.weight' and "
         "exclude='model.layers.0.input_layernorm.weight' leave none of 8 tensors"),
        (lambda mask: mask_concentration(mask, {"a": "*.mlp.*", "b": UP.format(0)}), SelectionError,
         "model.layers.0.mlp.up_proj.weight is in two groups, a and b; shares would count it "
         "twice"),
        (lambda mask: assert_mask_concentration(mask, "*", min_share=0.5), SelectionError,
         "pattern='*' matches all that is selected, which has all of the mask; name a part"),
        (lambda mask: assert_mask_concentration(mask, "*.mlp.*"), ValueError, "no bound: give one "
         "of min_share, min_lift, plurality=True, or the assertion says nothing"),
        (lambda mask: assert_mask_concentration(mask, "*.mlp.*", min_share=50), ValueError,
         "min_share=50 is not a fraction in [0, 1]; 50% is min_share=0.5"),
        (lambda mask: assert_mask_concentration(mask, "*.mlp.*", plurality=1), TypeError,
         "plurality=1 is neither True nor False"),
        (lambda mask: assert_mask_density(mask, at_most=0.5, per="row"), ValueError, "per='row' is "
         "none of matrix, all"),
        (lambda mask: assert_subnetwork_size(mask), ValueError, "no bound: give at_least, at_most "
         "or both, or the assertion says nothing"),
    ],
)  # fmt: skip
def test_misuse(mask, call, error, text):
    with pytest.raises(error) as caught:
        call(mask)
    assert str(caught.value) == text


def test_a_pattern_that_matches_nothing_offers_the_nearest(mask):
    with pytest.raises(SelectionError, match=r"^pattern='\*\.mlps\.\*' matches none of 8 tensors"):
        assert_mask_concentration(mask, "*.mlps.*", min_share=0.5)


def test_bounds_that_nothing_could_fail_are_warned_of(mask):
    with pytest.warns(VacuousBoundWarning, match="min_lift=0 is no bound"):
        assert_mask_concentration(mask, "*.mlp.*", min_lift=0)
    with pytest.warns(VacuousBoundWarning, match="at_most=1 is no bound"):
        assert_subnetwork_size(mask, at_most=1)
    with pytest.warns(VacuousBoundWarning, match="at_least=0 is no bound"):
        assert_mask_density(mask, at_least=0)
