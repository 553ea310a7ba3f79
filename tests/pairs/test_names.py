"""How names meet: as they are, without wrappers, by the user's word; never by a guess."""

from __future__ import annotations

import pytest
import torch

from pytest_subnet import ModelPair, SelectionError, open_pair

PLAIN = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight")
SHAPES = dict(zip(PLAIN, [(4, 4), (4,), (8, 4)], strict=True))


def tensors(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in names.items()}


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return tensors({prefix + name: shape for name, shape in SHAPES.items()})


def problems(pair: ModelPair) -> list[tuple[str, str]]:
    return [(problem.kind, problem.name) for problem in pair.problems]


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
        "_orig_mod.base_model.model.",
    ],
)
def test_wrappers_are_looked_through_on_either_side(prefix: str) -> None:
    for base, tuned in ((wrapped(""), wrapped(prefix)), (wrapped(prefix), wrapped(""))):
        pair = open_pair(base, tuned)
        assert (len(pair.tensors), pair.problems) == (3, ())
        assert pair.renamed == dict(zip(tuned, base, strict=True))
        assert [tensor.kind for tensor in pair.tensors] == ["q_proj", "norm", "head"]


def test_wrappers_that_both_sides_have_stay_in_the_names() -> None:
    pair = open_pair(wrapped("module."), wrapped("module."))
    assert [tensor.name for tensor in pair.tensors] == [f"module.{name}" for name in PLAIN]
    assert pair.renamed == {}


def test_wrappers_inside_a_name_and_adapters_beside_it() -> None:
    base = tensors({"model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight": (4, 4)})
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    tuned = tensors(
        {f"{prefix}.base_layer.weight": (4, 4), f"{prefix}.lora_A.default.weight": (2, 4)}
    )
    pair = open_pair(base, tuned)
    assert pair.renamed == {f"{prefix}.base_layer.weight": next(iter(base))}
    assert problems(pair) == [("only tuned", f"{prefix}.lora_A.default.weight")]


@pytest.mark.parametrize("backbone", ["model.", "transformer.", "model.language_model."])
def test_the_backbone_may_be_missing_from_the_names(backbone: str) -> None:
    bare = {"h.0.attn.c_attn.weight": (4, 12), "ln_f.weight": (4,)}
    full = {backbone + name: shape for name, shape in bare.items()}
    for base, tuned in ((bare, full), (full, bare)):
        pair = open_pair(tensors(base), tensors(tuned))
        assert pair.renamed == dict(zip(tuned, base, strict=True))
        assert pair.problems == ()


def test_names_meet_one_to_one_before_they_lose_anything() -> None:
    names = {"model.norm.weight": (4,), "norm.weight": (4,)}
    pair = open_pair(tensors(names), tensors(names))
    assert pair.renamed == {}
    assert {tensor.base_name: tensor.tuned_name for tensor in pair.tensors} == {
        name: name for name in names
    }


def test_two_candidates_are_a_problem_and_not_a_guess() -> None:
    base = tensors({"norm.weight": (4,)})
    tuned = tensors({"module.norm.weight": (4,), "_orig_mod.norm.weight": (4,)})
    pair = open_pair(base, tuned)
    assert pair.tensors == ()
    assert problems(pair) == [("ambiguous", name) for name in (*base, *tuned)]
    assert pair.problems[0].text == "could be, in tuned: module.norm.weight, _orig_mod.norm.weight"
    assert pair.problems[1].text == "could be, in base: norm.weight"
    assert problems(open_pair(tuned, base)) == [("ambiguous", name) for name in (*tuned, *base)]


def test_names_without_wrappers_meet_only_where_shapes_agree() -> None:
    pair = open_pair(tensors({"norm.weight": (4,)}), tensors({"module.norm.weight": (5,)}))
    assert problems(pair) == [("only base", "norm.weight"), ("only tuned", "module.norm.weight")]


def test_a_resized_vocabulary_meets_through_wrappers() -> None:
    base = tensors({"lm_head.weight": (8, 4)})
    pair = open_pair(base, tensors({"module.lm_head.weight": (9, 4)}), vocab="common")
    assert pair.renamed == {"module.lm_head.weight": "lm_head.weight"}


RENAMED = tensors({f"policy.{name}": shape for name, shape in SHAPES.items()})


def test_rename_as_a_mapping() -> None:
    pair = open_pair(wrapped(""), RENAMED, rename={f"policy.{name}": name for name in PLAIN})
    assert pair.problems == ()
    assert pair.renamed == {f"policy.{name}": name for name in PLAIN}


def test_rename_of_some_names_leaves_the_others() -> None:
    pair = open_pair(wrapped(""), RENAMED, rename={"policy.lm_head.weight": "lm_head.weight"})
    assert pair.renamed == {"policy.lm_head.weight": "lm_head.weight"}
    assert [kind for kind, _ in problems(pair)] == ["only base", "only base"] + ["only tuned"] * 2


def test_rename_as_a_function() -> None:
    pair = open_pair(wrapped(""), RENAMED, rename=lambda name: name.removeprefix("policy."))
    assert pair.problems == ()
    assert [tensor.tuned_name for tensor in pair.tensors] == list(RENAMED)


def test_rename_is_followed_by_the_removal_of_wrappers() -> None:
    pair = open_pair(
        wrapped(""), wrapped("module.actor."), rename=lambda n: n.replace("actor.", "")
    )
    assert pair.renamed == {f"module.actor.{name}": name for name in PLAIN}


def test_renaming_what_is_not_there_is_an_error_with_a_hint() -> None:
    with pytest.raises(SelectionError, match=r"no tensor lm_heat\.weight; did you mean lm_head\.w"):
        open_pair(wrapped("module."), wrapped(""), rename={"lm_heat.weight": "x"})


def test_renaming_two_tensors_alike_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"rename gives .* and .* the same name x"):
        open_pair(wrapped(""), wrapped("module."), rename=lambda name: "x")


def test_renaming_onto_a_name_that_is_there_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"the same name lm_head\.weight"):
        open_pair(wrapped("m."), wrapped(""), rename={"model.norm.weight": "lm_head.weight"})


def test_a_name_that_is_no_string_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"rename gave NoneType for \S+, not a name"):
        open_pair(wrapped("module."), wrapped(""), rename=lambda name: None)


@pytest.mark.parametrize("digits", ["1" * 5_000, "9" * 10])
def test_a_number_without_end_in_a_name_is_no_block(digits: str) -> None:
    name = f"layers.{digits}.3.weight"
    (tensor,) = open_pair(tensors({name: (2,)}), {name: torch.ones(2)}).tensors
    assert tensor.layer == 3


def test_a_hostile_name_cannot_steer_a_terminal() -> None:
    pair = open_pair(wrapped(""), tensors({"evil\x1b[31m\n.weight": (4,)}))
    with pytest.raises(SelectionError) as caught:
        open_pair(wrapped(""), wrapped("m."), rename={"\x1b[2J": "x"})
    assert "\x1b" not in str(caught.value) + repr(pair)
