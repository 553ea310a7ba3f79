"""Which tensors a measure covers: globs, kinds, and never nothing."""

from __future__ import annotations

import pytest
import torch

from pytest_subnet import ModelPair, PairMismatchError, SelectionError, open_pair
from pytest_subnet.pairs import select

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.norm.weight",
]


@pytest.fixture
def pair() -> ModelPair:
    def model() -> dict[str, torch.Tensor]:
        return {name: torch.zeros(4, 4) for name in NAMES} | {"steps": torch.zeros(1).long()}

    return open_pair(model(), model())


def chosen(pair: ModelPair, **keywords: object) -> list[str]:
    return [pair.tensors[row].name for row in select(pair, **keywords).rows]


def test_everything_by_default_with_integers_apart(pair: ModelPair) -> None:
    selection = select(pair)
    assert [pair.tensors[row].name for row in selection.rows] == NAMES
    assert [pair.tensors[row].name for row in selection.apart] == ["steps"]


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"include": "*.up_proj.*"}, [NAMES[1], NAMES[4]]),
        ({"include": ["*norm*", "*.embed_tokens.*"]}, [NAMES[0], NAMES[3], NAMES[5]]),
        ({"include": "model.layers.1?.*"}, [NAMES[4]]),
        ({"include": "model.layers.*", "exclude": "*.0.*"}, [NAMES[4]]),
        ({"exclude": ["*norm*", "*embed*", "steps"]}, [NAMES[1], NAMES[2], NAMES[4]]),
        ({"kinds": "up_proj"}, [NAMES[1], NAMES[4]]),
        ({"kinds": ("norm", "embed")}, [NAMES[0], NAMES[3], NAMES[5]]),
        ({"kinds": "norm", "exclude": "model.norm.*"}, [NAMES[3]]),
        ({"include": NAMES[0]}, [NAMES[0]]),
    ],
)
def test_globs_and_kinds(pair: ModelPair, keywords: dict[str, object], expected: list[str]) -> None:
    assert chosen(pair, **keywords) == expected


def test_globs_tell_upper_case_from_lower(pair: ModelPair) -> None:
    with pytest.raises(SelectionError):
        select(pair, include="*.UP_PROJ.*")


@pytest.mark.parametrize("keyword", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(pair: ModelPair, keyword: str) -> None:
    with pytest.raises(SelectionError) as caught:
        select(pair, **{keyword: ["*norm*", "*lora*"]})
    assert str(caught.value) == (
        f"{keyword}='*lora*' matches none of 7 tensors (model.embed_tokens.weight, "
        "model.layers.0.mlp.up_proj.weight, … 5 more)"
    )


def test_a_part_of_a_name_gets_a_hint(pair: ModelPair) -> None:
    with pytest.raises(SelectionError, match=r"matches the whole name, write \*…\* around"):
        select(pair, include="model.layers.0")


def test_a_name_that_is_nearly_right_gets_a_hint(pair: ModelPair) -> None:
    with pytest.raises(SelectionError, match=r"did you mean model\.norm\.weight\?"):
        select(pair, include="model.nomr.weight")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*nrom*", "; did you mean *norm*?"),
        ("*.0.*.up_porj.weight", "; did you mean *.0.*.up_proj.weight?"),
        ("*.10.*.down_porj.weight", "; did you mean *.10.*.up_proj.weight?"),
        ("*.up_porj.weight", "; did you mean *.up_proj.weight?"),
        ("*input_layernrom.weight", "; did you mean *input_layernorm.weight?"),
        (".*norm.*", "; patterns are globs, not regular expressions, write *norm*"),
        (
            r"^model\.layers\..*$",
            "; patterns are globs, not regular expressions, write model.layers.*",
        ),
        ("*" + "x" * 100_000, ""),
        ("*", None),
    ],
)
def test_what_was_probably_meant_is_said(pair: ModelPair, pattern: str, hint: str | None) -> None:
    if hint is None:
        assert select(pair, include=pattern).rows
        return
    with pytest.raises(SelectionError) as caught:
        select(pair, include=pattern)
    assert str(caught.value).endswith(f"… 5 more){hint}")
    assert len(str(caught.value)) < 600


def test_a_kind_that_is_nearly_right_gets_a_hint(pair: ModelPair) -> None:
    with pytest.raises(SelectionError, match=r"up_proj; did you mean up_proj\?$"):
        select(pair, kinds="upproj")


@pytest.mark.parametrize("wrong", ["runs/tuned", None, 3, ({"w": 1}, {"w": 2})])
def test_what_is_no_pair_is_a_type_error_that_says_what_to_pass(wrong: object) -> None:
    with pytest.raises(TypeError) as caught:
        select(wrong)
    assert str(caught.value) == (
        f"a ModelPair is needed, got {type(wrong).__name__}; make one with open_pair(base, tuned), "
        "or take the fixture model_pair"
    )


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_what_only_the_wrapped_tuned_side_has_does_not_escape_a_pattern_of_the_base(
    prefix: str,
) -> None:
    base = {name: torch.zeros(4, 4) for name in NAMES}
    extra = "model.layers.11.mlp.up_proj.weight"
    tuned = {prefix + name: torch.zeros(4, 4) for name in [*NAMES, extra]}
    pair = open_pair(base, tuned)
    assert [problem.name for problem in pair.problems] == [prefix + extra]
    for pattern in ("model.layers.*", extra, "*.up_proj.*", f"{prefix}*.11.*"):
        with pytest.raises(PairMismatchError, match=extra):
            select(pair, include=pattern)
    assert chosen(pair, exclude=extra) == NAMES
    assert chosen(pair, include="*norm*") == [NAMES[3], NAMES[5]]


def test_an_unknown_kind_is_an_error_that_lists_the_known(pair: ModelPair) -> None:
    with pytest.raises(
        SelectionError,
        match=r"kinds='q_proj' is no kind of dict of tensors -> dict of tensors; "
        "it has down_proj, embed, norm, steps, up_proj",
    ):
        select(pair, kinds="q_proj")


@pytest.mark.parametrize(
    "keywords",
    [
        {"include": []},
        {"kinds": []},
        {"exclude": "*"},
        {"include": "*norm*", "kinds": "embed"},
        {"include": "*norm*", "exclude": "*norm*"},
    ],
)
def test_an_empty_selection_is_an_error(pair: ModelPair, keywords: dict[str, object]) -> None:
    with pytest.raises(SelectionError, match=r"nothing is selected from .* leave none of 7"):
        select(pair, **keywords)


@pytest.mark.parametrize("keyword", ["include", "exclude", "kinds"])
@pytest.mark.parametrize("wrong", [[3], 3, [["a"]]])
def test_what_is_no_string_is_a_type_error(pair: ModelPair, keyword: str, wrong: object) -> None:
    with pytest.raises(TypeError):
        select(pair, **{keyword: wrong})


@pytest.fixture
def broken() -> ModelPair:
    base = {name: torch.zeros(4, 4) for name in NAMES}
    return open_pair(base, {name: torch.zeros(4, 5 if "embed" in name else 4) for name in NAMES})


def test_a_problem_inside_the_selection_is_an_error(broken: ModelPair) -> None:
    for keywords in ({}, {"include": "*embed*"}, {"exclude": "*norm*"}, {"kinds": "embed"}):
        with pytest.raises(PairMismatchError, match=r"model\.embed_tokens\.weight") as caught:
            select(broken, **keywords)
        assert [problem.name for problem in caught.value.problems] == [NAMES[0]]


def test_a_problem_outside_the_selection_is_none(broken: ModelPair) -> None:
    assert chosen(broken, exclude="*embed*") == NAMES[1:]
    assert chosen(broken, include="*norm*") == [NAMES[3], NAMES[5]]
    assert chosen(broken, kinds="norm") == [NAMES[3], NAMES[5]]
