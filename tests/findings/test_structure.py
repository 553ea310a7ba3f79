"""`assert_same_structure`: every tensor of both checkpoints aligns."""

import json

import pytest
import torch

from pytest_subnet import CheckpointError, assert_same_structure, open_pair, update_sparsity
from pytest_subnet.pairs.problems import describe

DOWN = "model.layers.0.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_and_says_how_much_aligns(pair_of, base, tuned):
    pair = pair_of(base, tuned)
    result = assert_same_structure(pair)
    assert repr(result) == "SameStructure(4 tensors align, 0 problems, 0 renamed)"
    assert (result.tensors, result.problems, result.renamed, result.notes) == (4, (), {}, ())


def test_only_headers_are_read(pair_of, base, tuned, monkeypatch):
    pair = pair_of(base, tuned)

    def read(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(type(pair.base), "read_into", read)
    monkeypatch.setattr(type(pair.base), "extents", read)
    assert_same_structure(pair)


def drop(tuned):
    del tuned[NORM]


def add(tuned):
    tuned["lm_head.weight"] = torch.ones(8, 4, dtype=torch.bfloat16)


def reshape(tuned):
    tuned[UP] = tuned[UP].T.contiguous()


def cast(tuned):
    tuned[DOWN] = tuned[DOWN].float()


def empty(tuned):
    tuned[UP] = torch.empty(0, dtype=torch.bfloat16)


def resize(tuned):
    tuned[EMBED] = torch.ones(10, 4, dtype=torch.bfloat16)


FAULTS = {
    drop: ("only base", NORM),
    add: ("only tuned", "lm_head.weight"),
    reshape: ("reshaped", UP),
    cast: ("retyped", DOWN),
    empty: ("empty", UP),
    resize: ("reshaped", EMBED),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_tensor(pair_of, base, tuned, fault):
    kind, name = FAULTS[fault]
    fault(tuned)
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_same_structure(pair)
    total = 5 if fault is add else 4
    assert str(caught.value) == describe(
        pair.problems, pair="base -> tuned", total=total, can_exclude=False
    )
    assert "exclude=" not in str(caught.value)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"tensors do not pair: 1 {kind} (of {total} tensors)"
    assert lines[1] == "  pair       base -> tuned"
    assert lines[2].startswith(f"  {kind:<11}{name}")


def test_all_faults_are_listed_at_once(pair_of, base, tuned):
    for fault in (drop, add, cast):
        fault(tuned)
    with pytest.raises(AssertionError) as caught:
        assert_same_structure(pair_of(base, tuned))
    first, *others = str(caught.value).splitlines()
    counts, _, total = first.removeprefix("tensors do not pair: ").partition(" (")
    assert set(counts.split(", ")) == {"1 only base", "1 only tuned", "1 retyped"}
    assert total == "of 5 tensors)"
    for name in (NORM, "lm_head.weight", DOWN):
        assert sum(name in line.split() for line in others) == 1


def test_what_the_caller_allows_is_no_fault(pair_of, base, tuned):
    resize(tuned)
    cast(tuned)
    result = assert_same_structure(pair_of(base, tuned, vocab="common", as_dtype="bfloat16"))
    assert len(result.notes) == 2
    assert all(note in result.table() for note in result.notes)


def test_what_was_renamed_is_reported(pair_of, base, tuned):
    wrapped = {f"module.{name}": tensor for name, tensor in tuned.items()}
    result = assert_same_structure(pair_of(base, wrapped))
    assert result.renamed == {f"module.{name}": name for name in base}
    assert repr(result) == "SameStructure(4 tensors align, 0 problems, 4 renamed)"
    assert f"  renamed    module.{EMBED} -> {EMBED}, " in result.table()
    assert result.table().splitlines()[2].endswith(", … 1 more")


def test_a_checkpoint_that_was_written_since_is_an_error(pair_of, save, base, tuned):
    pair = pair_of(base, tuned)
    drop(tuned)
    save(tuned, "tuned")
    with pytest.raises(CheckpointError, match="changed after the pair was opened"):
        assert_same_structure(pair)


def test_the_result_is_plain_and_has_a_row_for_each_problem(pair_of, base, tuned, recorded):
    drop(tuned)
    cast(tuned)
    with pytest.raises(AssertionError):
        assert_same_structure(pair_of(base, tuned))
    (result,) = recorded
    assert [(row["kind"], row["tensor"]) for row in result.rows()] == [
        ("only base", NORM),
        ("retyped", DOWN),
    ]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "finding": "same_structure",
        "pair": "base -> tuned",
        "tensors": 2,
        "problems": 2,
        "problem_kinds": {"only base": 1, "retyped": 1},
        "renamed": 0,
        "notes": [],
    }
    assert result.table().splitlines()[:2] == [
        "SameStructure(2 tensors align, 2 problems, 0 renamed)",
        "  pair       base -> tuned",
    ]
    assert f"retyped    {DOWN}" in result.table()
    with pytest.raises(AttributeError):
        result.problems = ()


def test_hostile_names_are_escaped(recorded):
    hostile = "evil\x1b[31m\n.weight"
    pair = open_pair({hostile: torch.ones(2)}, {"w.weight": torch.ones(2)})
    with pytest.raises(AssertionError) as caught:
        assert_same_structure(pair)
    for text in (str(caught.value), recorded[0].table(), repr(recorded[0])):
        assert "\x1b" not in text
    assert r"evil\x1b[31m\n.weight" in str(caught.value)


def test_a_message_can_be_reworded_and_is_a_function(pair_of, base, tuned):
    drop(tuned)
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError, match=r"\Asave: tensors do not pair: 1 only base"):
        assert_same_structure(pair, message=lambda text: "save: " + text)
    with pytest.raises(TypeError, match="message='text' is not a function"):
        assert_same_structure(pair, message="text")


def test_what_does_not_align_can_be_left_out_by_a_measure_that_says_so(pair_of, base, tuned):
    drop(tuned)
    tuned[UP][0] = 2
    result = update_sparsity(pair_of(base, tuned), exclude="*norm*")
    assert "  note       1 tensor left out that cannot be compared" in result.table()
