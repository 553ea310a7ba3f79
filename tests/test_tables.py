"""Rows to text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet.tables import bar, table


def test_rows_are_aligned_under_the_keys_of_the_first() -> None:
    rows = [{"tensor": "a", "updated": "1"}, {"tensor": "long name", "updated": "1,234"}]
    assert table(rows, right=["updated"]) == (
        "tensor       updated\n---------  ---------\na                  1\nlong name      1,234"
    )


def test_cells_are_shown_as_they_print() -> None:
    assert table([{"n": 1.50, "text": "007", "none": None}]).splitlines()[-1].split() == [
        "1.5",
        "007",
        "None",
    ]


def test_cells_are_escaped() -> None:
    shown = table([{"tensor": "a\x1b[31m\nb"}])
    assert "a\\x1b[31m\\nb" in shown
    assert len(shown.splitlines()) == 3


def test_nothing_to_show_says_so() -> None:
    assert table([]) == "(nothing to show)"


@pytest.mark.parametrize(
    ("fraction", "drawn", "ascii_drawn"),
    [
        (0.0, "    ", "    "),
        (1e-9, "▏   ", "#   "),
        (0.5, "██  ", "##  "),
        (0.53, "██▏ ", "##  "),
        (1.0, "████", "####"),
        (-1.0, "    ", "    "),
        (7.0, "████", "####"),
    ],
)
def test_a_bar_fills_its_share(fraction: float, drawn: str, ascii_drawn: str) -> None:
    assert bar(fraction, width=4) == drawn
    assert bar(fraction, width=4, ascii_only=True) == ascii_drawn


@settings(derandomize=True, deadline=None, database=None)
@given(st.floats(0, 1), st.integers(1, 60), st.booleans())
def test_a_bar_is_as_wide_as_asked_and_shows_whatever_there_is(
    fraction: float, width: int, ascii_only: bool
) -> None:
    drawn = bar(fraction, width=width, ascii_only=ascii_only)
    assert len(drawn) == width
    assert (drawn.strip() == "") == (fraction == 0)


def test_tabulate_is_imported_by_the_first_table() -> None:
    script = (
        "import sys; from pytest_subnet.tables import bar, table; bar(0.5); print('tabulate' in "
        "sys.modules); table([{'a': 1}]); print('tabulate' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
