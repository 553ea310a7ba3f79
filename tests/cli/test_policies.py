"""Policies as text."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_subnet.cli.policies import Table, spelled, written

WORDS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = WORDS | st.booleans() | st.floats(0, 1e6) | st.lists(WORDS)


@given(VALUES)
def test_toml_reads_what_was_written(value):
    text = spelled(value)

    assert tomllib.loads(f"value = {text}") == {"value": value}
    assert text.isprintable()


def test_half_a_character_cannot_be_said():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        spelled("\udcff")


def test_tables_of_one_assertion_become_an_array():
    text = written(
        ["About. " * 20, "  a row that is indented, and so long that it goes on in the line " * 2],
        {"base": "a"},
        [
            Table("assert_frozen", {"include": "*", "kinds": ["norm"]}, ["Why."]),
            Table("assert_finite", {}, []),
            Table("assert_frozen", {"include": ["b"]}, []),
        ],
    )

    assert text == (
        "# About. About. About. About. About. About. About. About. About. About. About. About. "
        "About.\n"
        "# About. About. About. About. About. About. About.\n"
        "#   a row that is indented, and so long that it goes on in the line   a row that is "
        "indented, and\n"
        "#     so long that it goes on in the line\n"
        "\n"
        'base = "a"\n'
        "\n"
        "# Why.\n"
        "[[assert_frozen]]\n"
        'include = "*"\n'
        'kinds = ["norm"]\n'
        "\n"
        "[assert_finite]\n"
        "\n"
        "[[assert_frozen]]\n"
        'include = ["b"]\n'
    )
