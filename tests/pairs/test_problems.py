"""What does not align is a problem with a name and a remedy, and never an error at opening."""

from __future__ import annotations

import pytest
import torch

from pytest_subnet import ModelPair, PairMismatchError, open_pair
from pytest_subnet.pairs import Problem, select
from pytest_subnet.pairs.problems import describe

EMBED = "model.embed_tokens.weight"


def grown(rows: int) -> dict[str, torch.Tensor]:
    return {
        EMBED: torch.zeros(rows, 4),
        "lm_head.weight": torch.ones(rows, 4),
        "lm_head.bias": torch.ones(rows),
    }


def only_problem(pair: ModelPair) -> Problem:
    (problem,) = pair.problems
    assert problem.name not in {tensor.name for tensor in pair.tensors}
    return problem


def pair_of(base: torch.Tensor, tuned: torch.Tensor, **options: object) -> ModelPair:
    rest = torch.zeros(3)
    return open_pair({"w": base, "rest": rest}, {"w": tuned, "rest": rest.clone()}, **options)


def test_a_name_on_one_side_only() -> None:
    one, both = {"a.weight": torch.zeros(2)}, {"a.weight": torch.zeros(2), "b": torch.zeros(2)}
    assert only_problem(open_pair(both, one)) == Problem("only base", "b", "")
    assert only_problem(open_pair(one, both)) == Problem("only tuned", "b", "")


@pytest.mark.parametrize("shape", [(4, 2), (3, 4), (12,), (3, 4, 1)])
def test_another_shape(shape: tuple[int, ...]) -> None:
    problem = only_problem(pair_of(torch.zeros(2, 4), torch.zeros(shape)))
    spelled = ",".join(map(str, shape))
    assert problem == Problem("reshaped", "w", f"f32[2,4] -> f32[{spelled}]")


def test_a_resized_vocabulary_is_a_problem_with_its_remedy() -> None:
    pair = open_pair(grown(64), grown(70))
    assert [problem.name for problem in pair.problems] == list(grown(1))
    assert pair.problems[0] == Problem(
        "reshaped", EMBED, 'f32[64,4] -> f32[70,4], 6 rows added; allow with vocab="common"'
    )


@pytest.mark.parametrize(("before", "after", "change"), [(64, 70, "added"), (70, 64, "removed")])
def test_the_common_rows_of_a_resized_vocabulary(before: int, after: int, change: str) -> None:
    pair = open_pair(grown(before), grown(after), vocab="common")
    assert pair.problems == ()
    assert [tensor.shape for tensor in pair.tensors] == [(64, 4), (64, 4), (64,)]
    assert pair.notes[0] == f"{EMBED}: {before} -> {after} rows, 6 rows {change}, not compared"
    assert len(pair.notes) == 3


def test_only_rows_of_a_vocabulary_may_be_left_out() -> None:
    problem = only_problem(pair_of(torch.zeros(2, 4), torch.zeros(3, 4), vocab="common"))
    assert problem.kind == "reshaped"
    wider = {EMBED: torch.zeros(2, 5)}
    assert only_problem(open_pair({EMBED: torch.zeros(2, 4)}, wider, vocab="common")).name == EMBED


def test_another_dtype() -> None:
    problem = only_problem(pair_of(torch.zeros(2), torch.zeros(2).bfloat16()))
    assert problem == Problem(
        "retyped", "w", 'float32 -> bfloat16; cast both with as_dtype="bfloat16"'
    )
    problem = only_problem(pair_of(torch.zeros(2), torch.zeros(2).int()))
    assert problem == Problem("retyped", "w", "float32 -> int32")


def test_a_sum_in_float64_is_not_to_be_rounded() -> None:
    problem = only_problem(pair_of(torch.zeros(2).bfloat16(), torch.zeros(2).double()))
    assert problem.text == 'bfloat16 -> float64; cast both with as_dtype="float64"'


def test_a_cast_makes_dtypes_comparable_and_says_so() -> None:
    pair = pair_of(torch.zeros(2), torch.zeros(2).bfloat16(), as_dtype="bfloat16")
    assert pair.problems == ()
    assert [(t.dtype, t.base_dtype, t.tuned_dtype) for t in pair.tensors] == [
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ]
    assert pair.notes == ("2 tensors cast to bfloat16",)


def test_a_cast_leaves_integers_alone() -> None:
    pair = pair_of(torch.zeros(2).int(), torch.zeros(2).int(), as_dtype="float32")
    assert [(t.dtype, t.is_weight) for t in pair.tensors] == [("int32", False), ("float32", True)]
    assert pair.notes == ("0 tensors cast to float32",)
    problem = only_problem(pair_of(torch.zeros(2).int(), torch.zeros(2), as_dtype="float32"))
    assert problem.kind == "retyped"


@pytest.mark.parametrize("empty_side", ["base", "tuned"])
def test_a_tensor_without_entries(empty_side: str) -> None:
    shapes = {"base": (2, 4), "tuned": (2, 4)} | {empty_side: (0, 4)}
    problem = only_problem(pair_of(torch.zeros(shapes["base"]), torch.zeros(shapes["tuned"])))
    assert problem.kind == "empty"
    assert f"has no entries in {empty_side}" in problem.text


def test_empty_on_both_sides_is_no_match() -> None:
    assert only_problem(pair_of(torch.zeros(0), torch.zeros(0))).kind == "empty"


@pytest.mark.parametrize(
    "extra",
    ["w_scale_inv", "w.absmax", "w.qweight", "w.weight_packed", "w_blocks", "w_scales"],
)
def test_quantised_weights_are_refused_by_name(extra: str) -> None:
    def model() -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(2), extra: torch.zeros(2), "rest": torch.zeros(2)}

    pair = open_pair(model(), model())
    found = {problem.name: problem for problem in pair.problems}
    assert found[extra].kind == "quantised"
    assert ("w" in found) == (extra in ("w_scale_inv", "w.absmax"))
    assert [tensor.name for tensor in pair.tensors] == [n for n in model() if n not in found]
    assert "scales of its own" in found[extra].text


def test_weights_quantised_on_one_side_are_refused_rather_than_retyped() -> None:
    tuned = {
        "up_proj.weight": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "up_proj.weight_scale_inv": torch.zeros(1),
    }
    pair = open_pair({"up_proj.weight": torch.zeros(2).bfloat16()}, tuned)
    assert [(problem.kind, problem.name) for problem in pair.problems] == [
        ("only tuned", "up_proj.weight_scale_inv"),
        ("quantised", "up_proj.weight"),
    ]


def test_a_scale_that_is_a_weight_is_one() -> None:
    names = {"logit_scale": torch.zeros(1), "layer_scale.weight": torch.zeros(1)}
    pair = open_pair(names, {name: tensor.clone() for name, tensor in names.items()})
    assert len(pair.tensors) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vocab": "any"}, "vocab='any' is not one of 'strict', 'common'"),
        ({"as_dtype": "float8_e4m3fn"}, "as_dtype='float8_e4m3fn' is not one of bfloat16, float16"),
        ({"engine": "spark"}, "engine='spark' is not one of 'threads', 'ray'"),
        ({"device": "gpu"}, "device='gpu' is not one of 'cpu', 'cuda', 'cuda:N'"),
    ],
)
def test_options_are_checked_before_anything_is_opened(options: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_pair("no such directory", "nor this one", **options)


@pytest.mark.parametrize("keyword", ["vocab", "as_dtype", "device", "engine"])
def test_an_endless_option_is_shown_short_and_escaped(keyword: str) -> None:
    with pytest.raises(ValueError, match=f"^{keyword}=") as caught:
        open_pair("base", "tuned", **{keyword: "\x1b[2J" + "x" * 100_000})
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_the_whole_message() -> None:
    base = {EMBED: torch.zeros(64, 4), "a": torch.zeros(2), "b": torch.zeros(2)}
    tuned = {EMBED: torch.zeros(70, 4), "a": torch.zeros(2)}
    with pytest.raises(PairMismatchError) as caught:
        select(open_pair(base, tuned))
    assert str(caught.value) == (
        "tensors do not pair: 1 only base, 1 reshaped (of 3 tensors)\n"
        "  pair       dict of tensors -> dict of tensors\n"
        "  only base  b\n"
        "  reshaped   model.embed_tokens.weight  f32[64,4] -> f32[70,4], 6 rows added\n"
        '  to mend    say with rename={"name in tuned": "name in base"} where names differ; '
        'allow with vocab="common"; leave tensors out with exclude=\n'
        "             (rename=, vocab= and as_dtype= go to open_pair, the model_pair marker,\n"
        "             or the top of a policy; as_dtype= also to open_trajectory)"
    )
    assert [problem.name for problem in caught.value.problems] == ["b", EMBED]


def test_a_long_list_is_cut_and_every_kind_keeps_its_remedy() -> None:
    problems = [Problem("empty", f"layer.{i}\x1b", "no entries") for i in range(1200)]
    text = describe([*problems, Problem("quantised", "q", "")], pair="a -> b", total=2000)
    assert "1,200 empty, 1 quantised (of 2,000 tensors)" in text
    assert "… 1,193 more" in text
    assert "gather sharded weights before saving them; dequantise both sides" in text
    assert "\x1b" not in text


def what_to_do(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> list[str]:
    """The lines of the message after the problems."""
    with pytest.raises(PairMismatchError) as caught:
        select(open_pair(base, tuned))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    return lines[2 + len(caught.value.problems) :]


MERGE = (
    "to mend    an adapter is no model by itself: merge it (merge_and_unload), pass its directory "
    "to open_pair(base, DIRECTORY), or open it with open_adapter(DIRECTORY, base); leave tensors "
    "out with exclude="
)


@pytest.mark.parametrize("form", ["bare file", "in memory", "dora", "whole", "loha"])
def test_an_adapter_is_to_be_merged_rather_than_renamed(form: str) -> None:
    base = {"model.a.q.weight": torch.zeros(2, 2), "model.n.weight": torch.zeros(2)}
    prefix = "base_model.model.model."
    around = {
        f"{prefix}a.q.base_layer.weight": torch.zeros(2, 2),
        f"{prefix}n.weight": torch.zeros(2),
    }
    tuned = {
        "bare file": {f"{prefix}a.q.lora_A.weight": torch.zeros(1, 2)},
        "in memory": {**around, f"{prefix}a.q.lora_B.default.weight": torch.zeros(2, 1)},
        "dora": {**around, f"{prefix}a.q.lora_magnitude_vector": torch.zeros(2)},
        "whole": {f"{prefix}n.modules_to_save.default.weight": torch.zeros(2)},
        "loha": {f"{prefix}a.q.hada_w1_a": torch.zeros(2, 2)},
    }[form]
    assert what_to_do(base, tuned) == [MERGE]


def test_a_weight_that_is_called_like_an_adapter_is_renamed() -> None:
    found = what_to_do({"w": torch.zeros(2), "v": torch.zeros(2)}, {"lora.w": torch.zeros(2)})
    assert found[1].startswith("to mend    say with rename=")


@pytest.mark.parametrize(
    "names",
    [
        ("a.q.qweight", "a.q.qzeros", "a.q.scales"),
        ("a.q.weight_packed", "a.q.weight_scale", "a.q.weight_shape"),
        ("a.q_blocks", "a.q_scales"),
        ("a.q.weight", "a.q.weight_scale_inv"),
    ],
)
def test_quantised_on_one_side_is_to_be_dequantised(names: tuple[str, ...]) -> None:
    tuned = {name: torch.zeros(2) for name in (*names, "n.weight")}
    assert what_to_do({"a.q.weight": torch.zeros(2), "n.weight": torch.zeros(2)}, tuned) == [
        "to mend    dequantise both sides before comparing them; fp8 and compressed-tensors files "
        "are read through dequantised(PATH) in place of PATH; leave tensors out with exclude="
    ]


def test_the_same_advice_is_given_once_however_many_tensors_need_it() -> None:
    pair = open_pair(grown(64), grown(70))
    text = describe(pair.problems, pair="a -> b", total=3)
    assert text.count("6 rows added") == 3
    assert text.count("allow with") == 1


def test_exclude_is_not_offered_by_what_does_not_take_it() -> None:
    problems = [Problem("empty", "w", "has no entries in base")]
    assert "exclude=" in describe(problems, pair="a -> b", total=2)
    assert describe(problems, pair="a -> b", total=2, can_exclude=False) == (
        "tensors do not pair: 1 empty (of 2 tensors)\n"
        "  pair       a -> b\n"
        "  empty      w  has no entries in base\n"
        "  to mend    gather sharded weights before saving them"
    )


def test_two_different_models_are_called_so() -> None:
    one = {f"layers.{i}.weight": torch.zeros(4, 4) for i in range(3)}
    said = "probably   two different models; check which checkpoints are compared"
    for other in (
        {name: torch.zeros(5, 5) for name in one},
        {f"blocks.{i}.w": torch.zeros(4, 4) for i in range(3)},
    ):
        with pytest.raises(PairMismatchError) as caught:
            select(open_pair(one, other))
        assert said in str(caught.value)
    with pytest.raises(PairMismatchError) as caught:
        select(open_pair(one, {**one, "layers.0.weight": torch.zeros(5, 5)}))
    assert said not in str(caught.value)


class Masked(torch.nn.Module):
    """A buffer that no list of names knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.register_buffer("curve_table", torch.zeros(size))


def test_a_problem_has_the_kind_of_its_tensor_also_where_only_the_module_knows_it() -> None:
    pair = open_pair(Masked(3), Masked(4))
    assert pair.problem_kinds == {"curve_table": "buffer"}
    with pytest.raises(PairMismatchError, match="curve_table"):
        select(pair, kinds="buffer")
    with pytest.raises(PairMismatchError, match="curve_table"):
        select(pair, kinds=["weight", "buffer"])
    assert [pair.tensors[row].name for row in select(pair, kinds="weight").rows] == ["weight"]


def test_a_parameter_is_no_buffer_whatever_it_is_called() -> None:
    def model() -> torch.nn.Module:
        module = torch.nn.Module()
        module.attn = torch.nn.Linear(4, 4)
        return module

    kinds = {t.name: (t.kind, t.is_weight) for t in open_pair(model(), model()).tensors}
    assert kinds["attn.bias"] == ("bias", True)
    states = [model().state_dict(), model().state_dict()]
    assert {t.name: t.kind for t in open_pair(*states).tensors}["attn.bias"] == "buffer"


@pytest.mark.parametrize("rename", ["norm", ["a", "b"], 3, {"a": 1}, {1: "a"}, {b"a": "a"}])
def test_what_is_no_rename_is_a_type_error_before_anything_is_opened(rename: object) -> None:
    with pytest.raises(TypeError, match=r"^rename(=.* is neither a mapping| maps names to names)"):
        open_pair("no such directory", "nor this one", rename=rename)


def test_a_device_of_torch_is_a_device() -> None:
    one = {"w": torch.zeros(2)}
    assert open_pair(one, {"w": torch.ones(2)}, device=torch.device("cpu")).device == "cpu"
    with pytest.raises(ValueError, match="device='meta' is not one of"):
        open_pair("no such directory", "nor this one", device=torch.device("meta"))
