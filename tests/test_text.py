"""How numbers and names are written for people."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet.text import (
    facts,
    first_few,
    nearest,
    percent,
    plural,
    printable,
    safe,
    short_dtype,
    size,
    spell_tensor,
)

steady = settings(derandomize=True, deadline=None, database=None)


@steady
@given(st.text())
def test_no_name_can_steer_a_terminal_or_break_a_line(name: str) -> None:
    assert safe(name).isprintable()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("größe", "größe"),
        ("a\tb\r\n", "a\\tb\\r\\n"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        (None, "None"),
    ],
)
def test_what_cannot_be_shown_is_escaped(name: object, written: str) -> None:
    assert safe(name) == written


def test_an_endless_name_is_shortened_in_its_middle_and_only_where_it_is_shown() -> None:
    name = "a" * 150 + "\x1b" * 100_000 + "z" * 149

    assert safe(name) == "a" * 150 + "…" + "z" * 149
    assert safe(safe(name)) == safe(name)
    assert safe("x" * 300) == "x" * 300
    assert len(printable(name)) == 299 + 400_000
    assert len(first_few([name, name])) == 602
    assert nearest("x" * 301, ["x" * 301]) == ""


@pytest.mark.parametrize(
    ("fraction", "written"),
    [
        (0.0, "0.00%"),
        (1.0, "100.00%"),
        (0.718449, "71.84%"),
        (0.00004, "<0.01%"),
        (0.99996, ">99.99%"),
        (5e-324, "<0.01%"),
        (1 - 2**-53, ">99.99%"),
    ],
)
def test_percent_rounds_to_nothing_and_to_everything_only_when_it_is(
    fraction: float, written: str
) -> None:
    assert percent(fraction) == written


def test_percent_with_other_digits() -> None:
    assert (percent(0.12345, 1), percent(0.9999, 1), percent(0.0001, 1)) == (
        "12.3%",
        ">99.9%",
        "<0.1%",
    )


@pytest.mark.parametrize(
    ("count", "noun", "written"),
    [
        (0, "tensor", "0 tensors"),
        (1, "entry", "1 entry"),
        (7_615_616_512, "entry", "7,615,616,512 entries"),
        (2, "matrix", "2 matrices"),
    ],
)
def test_counts_with_their_nouns(count: int, noun: str, written: str) -> None:
    assert plural(count, noun) == written


@pytest.mark.parametrize(
    ("nbytes", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (2_283_000, "2.28 MB"),
        (350e6, "350 MB"),
        (140e9, "140 GB"),
        (1.4e12, "1.4 TB"),
    ],
)
def test_sizes_in_decimal_units(nbytes: int, written: str) -> None:
    assert size(nbytes) == written


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        ("bfloat16", "bf16"),
        ("float64", "f64"),
        ("float8_e5m2", "f8_e5m2"),
        ("int8", "i8"),
        ("uint16", "u16"),
        ("complex64", "c64"),
        ("bool", "bool"),
    ],
)
def test_dtypes_as_the_field_abbreviates_them(dtype: str, written: str) -> None:
    assert short_dtype(dtype) == written


def test_a_tensor_is_its_dtype_and_shape() -> None:
    assert spell_tensor("float32", (2, 3)) == "f32[2,3]"
    assert spell_tensor("int64", ()) == "i64[]"


def test_the_first_few_names_and_how_many_more() -> None:
    assert first_few([]) == ""
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a"] * 2003, 2) == "a, a, … 2,001 more"
    assert first_few(["\x1b"]) == "\\x1b"


def test_the_nearest_known_word_is_offered_if_there_is_one() -> None:
    assert nearest("lm_haed", ["lm_head", "norm"]) == "; did you mean lm_head?"
    assert nearest("anything", ["lm_head", "norm"]) == ""
    assert nearest("evil\x1b", ["evil\x1b["]) == "; did you mean evil\\x1b[?"


def test_facts_stand_in_one_column_under_their_verdict() -> None:
    assert facts("too dense", [("pair", "a -> b"), ("worst", "x"), ("", "y")]) == (
        "too dense\n  pair       a -> b\n  worst      x\n             y"
    )
    assert facts("nothing more", []) == "nothing more"


def test_the_nearest_of_many_names_is_found_among_those_with_the_same_parts() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(60) for j in range(60)
    ]
    assert len(names) == 3600
    wrong = "model.layers.57.mlp.expert.31.up_proj.weight"
    assert nearest(wrong, names) == f"; did you mean {wrong.replace('expert', 'experts')}?"
