"""`assert_frozen`: not a single bit, and where the first one is."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_frozen,
    open_pair,
    record_update,
    update_movement,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][0] = 2
    pair = pair_of(base, tuned)
    result = assert_frozen(pair, "*", exclude="*up_proj*")
    assert result == update_movement(pair, exclude="*up_proj*")
    assert (result.moved, len(result.per_tensor)) == (0, 3)


def test_one_flipped_bit_fails_and_is_pointed_out(pair_of, base, tuned, fails_with):
    tuned[DOWN].view(torch.int16)[7, 3] += 1
    torch.testing.assert_close(tuned, base)  # what people write by hand does not see it
    pair = pair_of(base, tuned)
    with fails_with("""
        1 of 4 frozen tensors moved by up to 0.00781
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    1 / 100
          worst      model.layers.0.mlp.down_proj.weight  1 / 32  by up to 0.00781  (bf16[8,4])
          first      model.layers.0.mlp.down_proj.weight[7, 3] 1 -> 1.0078125
          usually    weight decay on zero gradients, optimiser state from before freezing, or a
                     tie to a tensor that is trained
          to accept  leave the tensors out with exclude=, or atol=0.0079
    """):
        assert_frozen(pair, "*")
    assert_frozen(pair, "*", exclude=DOWN)
    assert_frozen(pair, "*", atol=0.0079)


def test_the_first_difference_shows_which_side_is_which(pair_of, base, tuned):
    tuned[NORM][2] = 2
    with pytest.raises(AssertionError, match=r"norm\.weight\[2\] 1 -> 2\n"):
        assert_frozen(pair_of(base, tuned), "*")
    with pytest.raises(AssertionError, match=r"norm\.weight\[2\] 2 -> 1\n"):
        assert_frozen(pair_of(tuned, base), "*")


def test_each_way_to_move_is_told_apart(fails_with):
    base = {
        "a.weight": torch.zeros(4),
        "b.weight": torch.ones(4),
        "c.weight": torch.tensor([1.0, float("nan"), 1.0, 1.0]),
        "d.steps": torch.zeros(8, dtype=torch.int64),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["a.weight"][:3] = -0.0
    tuned["b.weight"][:2] = float("inf")
    tuned["c.weight"][2:] = torch.tensor([1.5, float("nan")])
    tuned["d.steps"][0] = 1
    with fails_with("""
        3 of 3 frozen tensors moved by up to 0.5
          pair       dict of tensors -> dict of tensors   (same bits, f32, 3/4 tensors, 12 entries)
          updated    7 / 12
          worst      a.weight  3 / 4  only signs of zeros                   (f32[4])
                     b.weight  2 / 4  2 NaN or Inf, 0 before                (f32[4])
                     c.weight  2 / 4  by up to 0.5, 2 NaN or Inf, 1 before  (f32[4])
          first      a.weight[0] 0 -> -0
          usually    weight decay on zero gradients, optimiser state from before freezing, or a
                     tie to a tensor that is trained
          to accept  leave the tensors out with exclude=
    """):
        assert_frozen(open_pair(base, tuned), "*.weight")
    with pytest.raises(AssertionError, match=r"worst +d\.steps  1 / 8  other bits  \(i64\[8\]\)"):
        assert_frozen(open_pair(base, tuned), "*.steps")


def test_the_tensor_that_moved_most_comes_first_and_the_rest_are_counted(pair_of, base, tuned):
    for name, count in zip(base, (1, 2, 3, 4), strict=True):
        tuned[name].view(-1)[:count] = 2
    with pytest.raises(AssertionError) as caught:
        assert_frozen(pair_of(base, tuned), "*")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 4 frozen tensors moved by up to 1"
    assert lines[3].split()[:4] == ["worst", NORM, "4", "/"]
    assert lines[6].strip() == "… 1 more"


def test_under_a_tolerance_only_what_is_beyond_it_moved(pair_of, base, tuned):
    tuned[UP][0, 0] += 2**-7
    tuned[DOWN][0, 0] += 1
    with pytest.raises(AssertionError) as caught:
        assert_frozen(pair_of(base, tuned), "*", rtol=0.01)
    text = str(caught.value)
    assert text.startswith("1 of 4 frozen tensors moved by up to 1\n")
    assert "rtol=0.01" in text
    assert "  first " not in text  # the first other bits may be within the tolerance


@pytest.mark.parametrize("flip", [0x7FC0, 0x7FC1])
def test_a_nan_is_frozen_only_with_its_payload(pair_of, flip):
    words = torch.full((4,), 0x7FC0, dtype=torch.int16)
    other = words.clone()
    other[3] = flip
    pair = pair_of(
        {"w.weight": words.view(torch.bfloat16)}, {"w.weight": other.view(torch.bfloat16)}
    )
    if flip == 0x7FC0:
        assert assert_frozen(pair, "*").nonfinite_tuned == 4
    else:
        with pytest.raises(AssertionError, match=r"w\.weight\[3\] 0x7fc0 -> 0x7fc1"):
            assert_frozen(pair, "*")


def test_the_verdict_stands_when_the_weights_have_moved_on():
    model = torch.nn.Linear(2, 2)
    with record_update(model) as update, torch.no_grad():
        model.weight += 1
    with pytest.raises(AssertionError, match=r"\n  first +weight\[0, 0\] "):
        assert_frozen(update, "*")
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(
        AssertionError, match=r"\A1 of 2 frozen tensors moved by up to 1\n"
    ) as caught:
        assert_frozen(update, "*")
    assert "  first " not in str(caught.value)


def test_hostile_names_are_escaped():
    base = {"a\x1b[2J\n.weight": torch.ones(2)}
    with pytest.raises(AssertionError) as caught:
        assert_frozen(open_pair(base, {"a\x1b[2J\n.weight": torch.zeros(2)}), "*")
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).count(r"a\x1b[2J\n.weight") == 2


def test_one_tensor_is_one_tensor(pair_of):
    pair = pair_of({"w.weight": torch.ones(1)}, {"w.weight": torch.zeros(1)})
    with pytest.raises(AssertionError) as caught:
        assert_frozen(pair, "*")
    assert str(caught.value).splitlines()[:2] == [
        "1 of 1 frozen tensor moved by up to 1",
        "  pair       base -> tuned   (same bits, f32, 1/1 tensor, 1 entry)",
    ]


def test_a_message_can_be_reworded(pair_of, base, tuned):
    tuned[UP][0] = 2
    with pytest.raises(AssertionError, match=r"\AFROZEN: 1 of 4"):
        assert_frozen(pair_of(base, tuned), "*", message=lambda text: "FROZEN: " + text)


@pytest.mark.parametrize(
    ("include", "options", "error"),
    [
        ("*nothing*", {}, SelectionError),
        ("embed_tokens", {}, SelectionError),
        ([], {}, SelectionError),
        ("*", {"exclude": "*"}, SelectionError),
        (3, {}, TypeError),
        ("*", {"atol": 1e-5, "rtol": 1e-5}, ValueError),
        ("*", {"atol": float("nan")}, ValueError),
        ("*", {"message": "text"}, TypeError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, include, options, error):
    with pytest.raises(error):
        assert_frozen(pair_of(base, tuned), include, **options)


def test_a_frozen_tensor_that_was_dropped_is_an_error(pair_of, base, tuned):
    del tuned[NORM]
    with pytest.raises(PairMismatchError, match=r"only base +model\.norm\.weight"):
        assert_frozen(pair_of(base, tuned), "*norm*")


def test_the_result_is_recorded_also_when_the_assertion_fails(pair_of, base, tuned, recorded):
    tuned[UP][0] = 2
    with pytest.raises(AssertionError):
        assert_frozen(pair_of(base, tuned), "*")
    assert [(each.to_dict()["finding"], each.moved) for each in recorded] == [
        ("update_movement", 1)
    ]
