"""`subnetwork_recovery`: θ_sub against θ_full, inside the mask and apart from the rest."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    SubnetError,
    UpdateMask,
    open_pair,
    subnetwork_recovery,
    train_inside,
    update_mask,
)

DOCS = Path(__file__).parents[2] / "docs" / "findings"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def three(seed=0, dtype=torch.float32, step=0.01):
    """Base, full and sub; full moved about half, sub went the same way with some noise."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        UP: torch.randn(9, 7, generator=generator).to(dtype),
        NORM: torch.randn(5, generator=generator).to(dtype),
    }
    full, sub = {}, {}
    for name, each in base.items():
        moved = torch.rand(each.shape, generator=generator) < 0.5
        far = step * torch.randn(each.shape, generator=generator)
        noise = step * 0.3 * torch.randn(each.shape, generator=generator)
        noise *= torch.rand(each.shape, generator=generator) < 0.5
        full[name] = torch.where(moved, each.float() + far, each.float()).to(dtype)
        sub[name] = torch.where(moved, each.float() + far + noise, each.float()).to(dtype)
    return base, full, sub


def brute_force(base, full, sub, atol, mask=None):
    """The same counts by plain tensors."""
    wide = torch.float64 if base[UP].dtype == torch.float32 else torch.float32
    limit = torch.tensor(atol, dtype=wide)
    counts = dict.fromkeys(
        (
            *("inside", "matching", "missed", "regained"),
            *("matching_everywhere", "base_matching_everywhere", "outside_moved"),
        ),
        0,
    )
    for name in base:
        inside = base[name] != full[name] if mask is None else torch.from_numpy(mask[name])
        agrees = (sub[name].to(wide) - full[name].to(wide)).abs() <= limit
        base_agrees = (base[name].to(wide) - full[name].to(wide)).abs() <= limit
        for key, entries in (
            ("inside", inside),
            ("matching", inside & agrees),
            ("missed", inside & ~base_agrees),
            ("regained", inside & ~base_agrees & agrees),
            ("matching_everywhere", agrees),
            ("base_matching_everywhere", base_agrees),
            ("outside_moved", ~inside & (sub[name] != base[name])),
        ):
            counts[key] += int(entries.sum())
    return counts


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 1e-5, 1e-3, 0.01, 1.0]),
    st.booleans(),
)
def test_counts_are_those_of_brute_force(seed, dtype, atol, given_mask):
    base, full, sub = three(seed, dtype)
    mask = None
    if given_mask:
        draw = np.random.default_rng(seed)
        mask = UpdateMask.of({name: draw.random(each.shape) < 0.6 for name, each in base.items()})
    result = subnetwork_recovery(full, sub, base=base, atol=atol, mask=mask)
    expected = brute_force(base, full, sub, atol, mask)
    assert {key: getattr(result, key) for key in expected} == expected
    for key, total in expected.items():
        assert sum(getattr(each, key) for each in result.per_tensor) == total


def test_the_numbers_of_the_paper_come_apart():
    """94.0 % of all entries agree, and the mask is 18.6 %: inside it 68 %."""
    base = {"w": torch.zeros(1000)}
    full = {"w": (torch.arange(1000) < 186).float()}
    sub = {"w": (torch.arange(1000) < 126).float()}
    result = subnetwork_recovery(full, sub, base=base, atol=1e-5)
    assert result.whole_match == 0.94
    assert result.base_whole_match == 0.814
    assert result.match == result.recovered == 126 / 186
    assert result.base_match == 0


def test_where_the_tolerance_hides_the_update_the_base_agrees_as_well():
    base, full, sub = three(step=1e-4)
    result = subnetwork_recovery(full, sub, base=base, atol=0.1)
    assert (result.match, result.base_match, result.recovered, result.missed) == (1, 1, None, 0)


def test_tensors_that_the_mask_does_not_name_are_outside():
    base, full, sub = three()
    mask = UpdateMask.of({UP: np.ones((9, 7), bool)})
    result = subnetwork_recovery(full, sub, base=base, atol=1e-5, mask=mask)
    assert result.inside == 63
    assert result.outside_moved == int((sub[NORM] != base[NORM]).sum()) > 0
    assert result.mask == "given"


def test_a_selection_and_an_own_mask():
    base, full, sub = three()
    whole = subnetwork_recovery(full, sub, base=base, atol=1e-5)
    own = update_mask(open_pair(base, full))
    assert subnetwork_recovery(full, sub, base=base, atol=1e-5, mask=own).match == whole.match
    one = subnetwork_recovery(full, sub, base=base, atol=1e-5, include="*up_proj*")
    assert one.per_tensor == whole.per_tensor[:1]
    assert one.numel == 63
    assert one.coverage.tensors_total == 2
    assert subnetwork_recovery(full, sub, base=base, atol=1e-5, kinds="norm").numel == 5


def test_names_with_patterns_in_them_are_names():
    base, full, sub = ({"w[0]*": each[UP], "w0x": each[NORM]} for each in three())
    result = subnetwork_recovery(full, sub, base=base, atol=1e-5, exclude="w0x")
    assert [each.name for each in result.per_tensor] == ["w[0]*"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_may_call_its_tensors_otherwise(which):
    checkpoints = list(three())
    expected = subnetwork_recovery(checkpoints[1], checkpoints[2], base=checkpoints[0], atol=1e-5)
    checkpoints[which] = {f"module.{name}": each for name, each in checkpoints[which].items()}
    base, full, sub = checkpoints
    for patterns in ({}, {"exclude": "*norm*"}):
        result = subnetwork_recovery(full, sub, base=base, atol=1e-5, **patterns)
        rows = len(result.per_tensor)
        assert [each[3:] for each in result.per_tensor] == [
            each[3:] for each in expected.per_tensor[:rows]
        ]


def test_files_and_modules(save):
    base, full, sub = three(dtype=torch.bfloat16)
    sources = save(full, "full"), save(sub, "sub")
    expected = brute_force(base, full, sub, 1e-5)
    result = subnetwork_recovery(*sources, base=save(base, "base"), atol=1e-5)
    assert result.matching == expected["matching"]
    assert repr(result).startswith("SubnetworkRecovery(recovered=")
    assert result.coverage.pair == "full against sub, both from base"
    assert result.coverage.dtype == "bf16"


def test_as_dtype():
    base, full, sub = three(dtype=torch.bfloat16)
    wide = {name: each.float() for name, each in sub.items()}
    with pytest.raises(PairMismatchError):
        subnetwork_recovery(full, wide, base=base, atol=1e-5)
    result = subnetwork_recovery(full, wide, base=base, atol=1e-5, as_dtype="bfloat16")
    assert result.matching == brute_force(base, full, sub, 1e-5)["matching"]


def test_what_does_not_align_is_named_by_its_role_and_mended_here():
    base, full, sub = three(dtype=torch.bfloat16)
    wide = {name: each.float() for name, each in sub.items()}
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_recovery(full, wide, base=base, atol=1e-5)
    assert str(caught.value).splitlines() == [
        "tensors of full and sub do not pair: 2 retyped",
        "  pair       dict of tensors -> dict of tensors",
        f"  retyped    {UP}  bfloat16 -> float32",
        f"  retyped    {NORM}  bfloat16 -> float32",
        '  to mend    compare all three in one dtype with as_dtype="bfloat16"; leave tensors out '
        "with exclude=",
    ]
    assert [each.kind for each in caught.value.problems] == ["retyped", "retyped"]
    with pytest.raises(PairMismatchError, match="tensors of base and full do not pair: 2 retyped"):
        subnetwork_recovery(wide, sub, base=base, atol=1e-5)
    nasty = {f"evil\x1b[31m{number}": torch.ones(1) for number in range(5)}
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_recovery({**full, **nasty}, sub, base=base, atol=1e-5)
    text = str(caught.value)
    assert text.startswith("tensors of base and full do not pair: 5 only tuned")
    assert "\x1b" not in text
    assert "  … 2 more" in text
    assert "as_dtype" not in text


@pytest.mark.parametrize(
    ("same", "text"),
    [
        ({"full": "tuned", "sub": "tuned"}, "full and sub are the same: tuned; base, full and sub"),
        ({"full": "tuned", "sub": "base"}, "base and sub are the same: base; base, full and sub"),
        ({"full": "base", "sub": "tuned"}, "base and full are the same: base; base, full and sub"),
    ],
)
def test_a_checkpoint_given_twice_is_named_by_its_roles(save, same, text):
    base, full, _ = three()
    paths = {"base": save(base, "base"), "tuned": save(full, "tuned")}
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_recovery(paths[same["full"]], paths[same["sub"]], base=paths["base"], atol=1e-5)
    assert str(caught.value).startswith(text)
    assert caught.value.__suppress_context__


def test_scores_are_asked_of_what_was_given():
    base, full, sub = three()
    asked = []

    def score(model):
        asked.append(model)
        return float(len(asked))

    result = subnetwork_recovery(full, sub, base=base, atol=1e-5, score=score)
    assert [id(each) for each in asked] == [id(full), id(sub), id(base)]
    assert (result.full_score, result.sub_score, result.base_score) == (1, 2, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "good"])
def test_a_score_that_is_no_number(value):
    base, full, sub = three()
    with pytest.raises(SubnetError, match=r"score gave .* no finite number to compare"):
        subnetwork_recovery(full, sub, base=base, atol=1e-5, score=lambda model: value)


def test_it_is_recorded_shown_and_stored(recorded):
    base, full, sub = three()
    result = subnetwork_recovery(full, sub, base=base, atol=1e-5)
    assert recorded == [result]
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["finding"] == "subnetwork_recovery"
    assert stored["match"] == result.match
    assert stored["tolerance"] == "atol=1e-05"
    assert UP in result.table()
    assert [row["tensor"] for row in result.rows()] == [UP, NORM]


def test_training_inside_the_final_mask_arrives_at_the_same_values():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(5):
            yield optimizer
            optimizer.zero_grad()
            model(torch.eye(6)[:3] * (number + 1)).square().sum().backward()
            optimizer.step()

    base, full, sub = model(), model(), model()
    for _ in train(full):  # inputs 3 to 5 are always 0, and so are the gradients of their weights
        pass
    mask = update_mask(open_pair(base, full))
    steps = train(sub)
    with train_inside(sub, next(steps), mask) as training:
        for _ in steps:
            pass
    result = subnetwork_recovery(full, sub, base=base, atol=0.0)
    assert training.steps == 5
    assert (result.match, result.recovered, result.outside_moved) == (1, 1, 0)
    assert 0 < result.inside < result.numel


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.booleans(),
)
def test_nothing_agrees_with_nan_and_inf_of_full(seed, dtype, atol, given_mask):
    base, full, sub = three(seed, dtype)
    draw = np.random.default_rng(seed)
    mask = None
    if given_mask:
        mask = UpdateMask.of({name: draw.random(each.shape) < 0.6 for name, each in base.items()})
    for each in (full, sub, base):  # some at the same places, with the same bits
        places = torch.from_numpy(draw.random((9, 7)) < 0.3)
        each[UP] = each[UP].where(
            ~places, torch.tensor([torch.nan, torch.inf, -torch.inf] * 2 + [1])
        )
        each[UP] = each[UP].to(dtype)
    result = subnetwork_recovery(full, sub, base=base, atol=atol, mask=mask)
    moved = {name: words(base[name]) != words(full[name]) for name in base}
    inside = {n: moved[n] if mask is None else torch.from_numpy(mask[n]) for n in base}
    matching = missed = regained = nonfinite = 0
    for name, each in full.items():
        agrees = ((sub[name].double() - each.double()).abs() <= atol) & each.isfinite()
        base_agrees = ((base[name].double() - each.double()).abs() <= atol) & each.isfinite()
        nonfinite += int((~each.isfinite() & inside[name]).sum())
        matching += int((agrees & inside[name]).sum())
        missed += int((~base_agrees & inside[name]).sum())
        regained += int((~base_agrees & inside[name] & agrees).sum())
    assert (result.matching, result.missed, result.regained) == (matching, missed, regained)
    assert result.nonfinite_inside == nonfinite
    assert result.nonfinite_full == int((~full[UP].isfinite()).sum())
    assert result.nonfinite_sub == int((~sub[UP].isfinite()).sum())
    assert result.full_moved == sum(int(each.sum()) for each in moved.values())
    assert result.to_dict()["nonfinite_sub"] == result.nonfinite_sub


def words(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_nan_beyond_the_first_run_of_words():
    count = 2**23 + 64 * 3 + 5  # a run is 1 MB of bits
    base = {"w": torch.zeros(count, dtype=torch.bfloat16)}
    full, sub = {"w": base["w"].clone()}, {"w": base["w"].clone()}
    for each in (full, sub):
        each["w"][[1, 2**23 + 1, count - 1]] = torch.nan
        each["w"][[2, 2**23 + 2]] = 1.0
    result = subnetwork_recovery(full, sub, base=base, atol=0.0)
    assert (result.inside, result.matching, result.nonfinite_inside) == (5, 2, 3)


def test_a_cast_may_overflow():
    base = {"w": torch.zeros(4)}
    full, sub = {"w": torch.tensor([1e30, 1.0, 0, 0])}, {"w": torch.tensor([1e30, 1.0, 0, 0.0])}
    result = subnetwork_recovery(full, sub, base=base, atol=0.0, as_dtype="float16")
    assert (result.nonfinite_full, result.nonfinite_inside, result.nonfinite_sub) == (1, 1, 1)
    assert result.recovered == 0.5


def tied(weight):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 4), "norm": torch.nn.LayerNorm(4)})
    model["head"] = torch.nn.Linear(4, 6, bias=False)
    model["embed"].weight = model["head"].weight = torch.nn.Parameter(weight.clone())
    return model


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_a_tied_tensor_is_known_by_any_of_its_names(names):
    base, full, sub = (tied(torch.full((6, 4), value)) for value in (0.0, 1.0, 1.0))
    entries = np.arange(24).reshape(6, 4) % 3 == 0
    mask = UpdateMask.of(dict.fromkeys(names, entries))
    result = subnetwork_recovery(full, sub, base=base, atol=1e-5, mask=mask)
    assert (result.inside, result.regained, result.outside_moved) == (8, 8, 16)
    other = UpdateMask.of({"embed.weight": entries, "head.weight": ~entries})
    with pytest.raises(PairMismatchError) as caught:
        subnetwork_recovery(full, sub, base=base, atol=1e-5, mask=other)
    assert str(caught.value) == (
        "embed.weight and head.weight are one tensor in the base, and the mask of given holds "
        "other entries of each; leave one of them out of the mask"
    )
    wrong = UpdateMask.of({"head.weight": entries[:2]})
    with pytest.raises(
        PairMismatchError, match=r"shape \[2, 4\] for head.weight, the base \[6, 4\]"
    ):
        subnetwork_recovery(full, sub, base=base, atol=1e-5, mask=wrong)


def test_what_cannot_be_measured():
    base, full, sub = three()
    measure = subnetwork_recovery
    with pytest.raises(PairMismatchError, match="same"):
        measure(full, full, base=base, atol=1e-5)
    with pytest.raises(PairMismatchError):
        measure(full, {UP: sub[UP]}, base=base, atol=1e-5)
    with pytest.raises(PairMismatchError):
        measure(full, {UP: sub[UP][:3], NORM: sub[NORM]}, base=base, atol=1e-5)
    with pytest.raises(SelectionError, match="matches none"):
        measure(full, sub, base=base, atol=1e-5, include="*down*")
    empty = UpdateMask.of({UP: np.zeros((9, 7), bool)})
    with pytest.raises(SelectionError, match="the mask of given has no entry in what is compared"):
        measure(full, sub, base=base, atol=1e-5, mask=empty)
    with pytest.raises(PairMismatchError, match=r"shape \[1, 7\] for .*, the base \[9, 7\]"):
        measure(full, sub, base=base, atol=1e-5, mask=UpdateMask.of({UP: np.ones((1, 7), bool)}))
    other = UpdateMask.of({"layers.0.mlp.up_proj.weight": np.ones((9, 7), bool)})
    with pytest.raises(PairMismatchError, match="names none of the 2 tensors compared; did you"):
        measure(full, sub, base=base, atol=1e-5, mask=other)
    both = UpdateMask.of({UP: np.ones((9, 7), bool), "evil\x1b[31m": np.ones(1, bool)})
    with pytest.raises(PairMismatchError, match=r"evil\\x1b\[31m, which what is compared lacks"):
        measure(full, sub, base=base, atol=1e-5, mask=both)
    integers = {"steps": torch.ones(2, dtype=torch.int64)}
    others = [{name: each + more for name, each in integers.items()} for more in (1, 2)]
    with pytest.raises(SelectionError, match="only buffers and integer tensors are selected"):
        measure(*others, base=integers, atol=1e-5)
    with pytest.raises(TypeError, match="mask is dict, not an UpdateMask"):
        measure(full, sub, base=base, atol=1e-5, mask={})
    with pytest.raises(TypeError, match=r"score=0\.5 is not a function"):
        measure(full, sub, base=base, atol=1e-5, score=0.5)
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="is not a finite number of at least 0"):
            measure(full, sub, base=base, atol=wrong)


@pytest.mark.slow
def test_the_picture_and_the_table_of_the_page_are_what_their_script_measures():
    threads = torch.get_num_threads()
    try:
        script = runpy.run_path(str(DOCS / "draw_recovery.py"))
        results = script["measured"]()
    finally:
        torch.set_num_threads(threads)
    assert script["draw"](results) == (DOCS / "recovery.svg").read_text(encoding="utf-8")
    page = (DOCS / "recovery.md").read_text(encoding="utf-8")
    printed = [line for line in page.splitlines() if "| 1e-" in line]
    assert len(printed) == 9
    assert set(printed) <= set(script["rows"](results))
