"""`update_sparsity` against plain torch and closed forms, and its result."""

import json
import math

import pytest
import torch

from pytest_subnet import (
    SelectionError,
    assert_update_sparsity,
    update_sparsity,
)
from pytest_subnet.scan import PAPER, Tolerance
from pytest_subnet.scan.gathering import declare

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def plain_updated(base, tuned, atol=None, rtol=None):
    """The definition, entry by entry, for finite values."""
    if atol is None and rtol is None:
        return int(
            (base.view(torch.uint8) != tuned.view(torch.uint8))
            .reshape(*base.shape, base.element_size())
            .any(-1)
            .sum()
        )
    wide = torch.float32 if base.element_size() == 2 else torch.float64
    before, after = base.to(wide), tuned.to(wide)
    allowed = atol if atol is not None else rtol * torch.maximum(before.abs(), after.abs())
    return int(((after - before).abs() > allowed).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [{}, {"atol": 1e-5}, {"atol": 1e-3}, {"rtol": 1e-2}])
def test_it_counts_as_plain_torch_does(pair_of, dtype, tolerance):
    generator = torch.Generator().manual_seed(5)
    base, tuned = {}, {}
    for name, shape in {"a.weight": (33, 7), "b.weight": (129,), "c.weight": (3, 5, 7)}.items():
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02
        step = torch.randn(shape, generator=generator, dtype=torch.float64) * 1e-4
        base[name], tuned[name] = weight.to(dtype), (weight + step).to(dtype)
    result = update_sparsity(pair_of(base, tuned), **tolerance)
    expected = {name: plain_updated(base[name], tuned[name], **tolerance) for name in base}
    assert {each.name: each.updated for each in result.per_tensor} == expected
    assert result.updated == sum(expected.values())
    assert result.numel == sum(each.numel() for each in base.values())
    assert result.sparsity == pytest.approx(1 - result.updated / result.numel, abs=1e-15)
    assert result.updated_under["same bits"] == sum(
        plain_updated(base[name], tuned[name]) for name in base
    )
    assert result.updated_under["atol=1e-05"] == sum(
        plain_updated(base[name], tuned[name], atol=1e-5) for name in base
    )


@pytest.mark.parametrize("rms", [1e-6, 1e-5, 1e-4, 1e-3])
def test_unstructured_steps_give_the_density_that_rounding_predicts(pair_of, rms):
    """E[density] = mean of erfc(ulp / (2 sqrt(2) s)), for d ~ N(0, s²) on bfloat16 weights."""
    generator = torch.Generator().manual_seed(11)
    weight = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    step = torch.randn(512, 512, generator=generator) * rms
    result = update_sparsity(
        pair_of({"w.weight": weight}, {"w.weight": (weight.float() + step).bfloat16()})
    )
    size = weight.double().abs()
    ulp = 2.0 ** (size.log2().floor() - 7)
    below = torch.where(size.log2() == size.log2().floor(), ulp / 2, ulp)
    sides = [torch.erfc(gap / (2 * math.sqrt(2) * rms)) for gap in (ulp, below)]
    predicted = float((sum(sides) / 2).nan_to_num(1.0).mean())
    spread = math.sqrt(predicted / weight.numel())
    assert result.density == pytest.approx(predicted, abs=4 * spread)


def test_a_step_of_one_ulp_everywhere_is_hidden_from_the_paper_below_2_to_the_minus_9(pair_of):
    words = torch.arange(0, 0x7F7F, dtype=torch.int16)  # every finite magnitude but the largest
    base, tuned = words.view(torch.bfloat16), (words + 1).view(torch.bfloat16)
    pair = pair_of({"w.weight": base}, {"w.weight": tuned})
    assert update_sparsity(pair).sparsity == 0
    hidden = update_sparsity(pair, atol=1e-5)
    assert hidden.numel - hidden.updated == int((base.abs() < 2**-9).sum())


def test_one_flipped_bit_of_one_entry_is_one_update(pair_of, base, tuned):
    tuned[DOWN].view(torch.int16)[7, 3] ^= 1
    result = update_sparsity(pair_of(base, tuned))
    assert (result.updated, result.numel) == (1, 100)
    assert result.sparsity == 0.99
    assert [each.name for each in result.per_tensor if each.updated] == [DOWN]


def test_zeros_that_only_change_sign_are_other_bits_and_the_same_value(pair_of):
    base = {"w.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    tuned = {"w.weight": -base["w.weight"]}
    tuned["w.weight"][0, 0] = 1.0
    pair = pair_of(base, tuned)
    result = update_sparsity(pair)
    assert (result.updated, result.zero_sign_flips, result.nothing_moved) == (16, 15, False)
    assert update_sparsity(pair, atol=0).updated == 1


@pytest.mark.parametrize(
    ("base_word", "tuned_word", "updated", "nonfinite"),
    [
        (0x7FC0, 0x7FC0, 0, 2),  # NaN, same payload
        (0x7FC0, 0x7FC1, 1, 2),  # NaN, other payload
        (0x7F80, 0x7F80, 0, 2),  # Inf
        (0x3F80, 0x7FC0, 1, 1),  # 1 -> NaN
        (0x3F80, 0x7F80, 1, 1),  # 1 -> Inf
        (0x7F80, 0x3F80, 1, 1),  # Inf -> 1
    ],
)
@pytest.mark.parametrize("tolerance", [{}, {"atol": 1e9}, {"rtol": 1.0}])
def test_nan_and_inf_are_close_to_nothing_but_the_same_bits(
    pair_of, base_word, tuned_word, updated, nonfinite, tolerance
):
    words = torch.ones(2, 4, 4, dtype=torch.bfloat16).view(torch.int16).clone()
    words[0, 1, 2], words[1, 1, 2] = base_word, tuned_word
    base, tuned = ({"w.weight": side.view(torch.bfloat16).clone()} for side in words)
    result = update_sparsity(pair_of(base, tuned), **tolerance)
    assert (result.updated, result.nonfinite) == (updated, nonfinite)


def test_buffers_and_integer_tensors_stay_apart(pair_of, base, tuned):
    base["model.rotary.inv_freq"] = torch.ones(2)
    base["model.steps"] = torch.zeros(3, dtype=torch.int64)
    tuned["model.rotary.inv_freq"] = torch.ones(2)
    tuned["model.steps"] = torch.ones(3, dtype=torch.int64)
    result = update_sparsity(pair_of(base, tuned))
    assert result.numel == 100
    assert {each.name: each.updated for each in result.apart} == {
        "model.rotary.inv_freq": 0,
        "model.steps": 3,
    }
    assert (result.coverage.tensors, result.coverage.tensors_total) == (4, 4)


def test_a_selection_of_buffers_only_is_refused(pair_of, base, tuned):
    base["model.steps"], tuned["model.steps"] = (
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
    )
    with pytest.raises(SelectionError) as caught:
        update_sparsity(pair_of(base, tuned), include="*.steps")
    assert str(caught.value) == (
        "only buffers and integer tensors are selected (1), which sparsity leaves apart; "
        "assert_frozen and assert_updated compare them by bits"
    )


def test_a_tensor_tied_on_both_sides_is_counted_once(pair_of):
    weight = torch.ones(8, 4, dtype=torch.bfloat16)
    base = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[0] = 2
    result = update_sparsity(pair_of(base, tuned, config={"tie_word_embeddings": True}))
    assert (result.updated, result.numel) == (4, 32)
    assert result.coverage.notes == ("lm_head.weight is tied, counted once",)


def test_include_exclude_and_kinds_choose_tensors(pair_of, base, tuned):
    tuned[UP][0] = 2
    tuned["model.norm.weight"][0] = 2
    pair = pair_of(base, tuned)
    assert update_sparsity(pair, include="*.layers.*").updated == 8
    assert update_sparsity(pair, exclude=["*norm*", "*up*"]).updated == 0
    assert update_sparsity(pair, kinds="norm").sparsity == 0.75
    assert update_sparsity(pair, include="*.layers.*").coverage.tensors_total == 4


def test_every_declared_tolerance_is_shown_beside_the_one_asked_for(pair_of, base, tuned):
    tuned[UP] += 2**-7
    pair = pair_of(base, tuned)
    declare(pair, [Tolerance(atol=1.0)])
    assert update_sparsity(pair, rtol=0.5).updated_under == {
        "same bits": 32,
        "atol=1e-05": 32,
        "atol=1": 0,
        "rtol=0.5": 0,
    }


def test_a_tolerance_declared_after_the_scan_is_left_out_until_it_is_counted(pair_of, base, tuned):
    pair = pair_of(base, tuned)
    assert update_sparsity(pair).updated == 0
    declare(pair, [Tolerance(rtol=0.5)])
    assert list(update_sparsity(pair).updated_under) == ["same bits", str(PAPER)]
    assert list(update_sparsity(pair, rtol=0.5).updated_under) == [
        "same bits",
        str(PAPER),
        "rtol=0.5",
    ]
    assert list(update_sparsity(pair).updated_under)[-1] == "rtol=0.5"


# The result


def test_the_result_is_frozen_plain_and_one_line(pair_of, base, tuned):
    tuned[UP][0] = 2
    result = update_sparsity(pair_of(base, tuned))
    assert repr(result) == "UpdateSparsity(sparsity=0.92, updated=8 of 100, same bits, bf16)"
    with pytest.raises(AttributeError):
        result.updated = 0
    with pytest.raises(AttributeError):
        result.per_tensor[0].updated = 0
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "finding": "update_sparsity",
        "sparsity": 0.92,
        "density": 0.08,
        "expected_sparsity": result.expected_sparsity,
        "updated": 8,
        "zero_sign_flips": 0,
        "nonfinite": 0,
        "updated_under": {"same bits": 8, "atol=1e-05": 8},
        "spread": 0.16666666666666666,
        "pair": "base -> tuned",
        "tolerance": "same bits",
        "dtype": "bf16",
        "tensors": 4,
        "tensors_total": 4,
        "numel": 100,
        "notes": [],
    }


def test_rows_and_totals_carry_the_same_fields(pair_of, base, tuned):
    tuned[UP][0] = 2
    result = update_sparsity(pair_of(base, tuned), include=UP)
    (row,) = result.per_tensor
    assert (row.name, row.shape, row.kind, row.layer) == (UP, (4, 8), "up_proj", 0)
    assert row.dtype == "bfloat16"
    assert result.dtype == "bf16"
    for field in ("numel", "updated", "sparsity", "density", "zero_sign_flips", "nonfinite"):
        assert getattr(row, field) == getattr(result, field)


def test_the_table_is_text_with_every_tensor(pair_of, base, tuned):
    tuned[UP][0] = 2
    assert update_sparsity(pair_of(base, tuned), include="*proj*").table() == "\n".join(
        [
            "UpdateSparsity(sparsity=0.875, updated=8 of 64, same bits, bf16)",
            "  pair       base -> tuned   (same bits, bf16, 2/4 tensors, 64 entries)",
            "",
            "tensor                               kind         layer    entries    updated"
            "    sparsity    density    expected",
            "-----------------------------------  ---------  -------  ---------  ---------"
            "  ----------  ---------  ----------",
            "model.layers.0.mlp.down_proj.weight  down_proj        0         32          0"
            "     100.00%      0.00%     100.00%",
            "model.layers.0.mlp.up_proj.weight    up_proj          0         32          8"
            "      75.00%     25.00%       0.47%",
        ]
    )


def test_names_that_could_steer_a_terminal_are_escaped(pair_of):
    hostile = "evil\x1b[31m\n| <b>.weight"
    base = {hostile: torch.ones(4, 4)}
    pair = pair_of(base, {hostile: torch.zeros(4, 4)})
    result = update_sparsity(pair)
    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(pair, at_least=0.5)
    for text in (repr(result), result.table(), str(caught.value)):
        assert "\x1b" not in text
    assert r"evil\x1b[31m\n| <b>.weight" in str(caught.value)
    assert r"evil\x1b[31m\n| <b>.weight" in result.table()


def test_it_stands_beside_the_nearest_published_numbers(base, tuned, pair_of):
    tuned[UP][:3] = 2
    result = update_sparsity(pair_of(base, tuned), atol=1e-5)
    beside = result.compare_published(algorithm="grpo", count=2)
    assert (beside.sparsity, beside.tolerance, beside.dtype) == (0.76, PAPER, "bf16")
    assert [row.sparsity for row in beside.comparable] == [0.698, 0.688]
    text = beside.table()
    assert text.startswith("sparsity 76.00% beside the nearest published numbers for GRPO\n")
    assert "learning rate, number of steps, batch size and optimiser move the number" in text
