"""How messages speak of damaged files."""

from __future__ import annotations

import pytest

from pytest_subnet import CheckpointError
from pytest_subnet.checkpoints.wording import broken, short


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a.weight", "a.weight"),
        ([1, 2], "[1, 2]"),
        ("\x1b[2J\n", "\\x1b[2J\\n"),
        ("\ud800", "\\ud800"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "…"),
        ("\n" * 201, "\\n" * 200 + "…"),
    ],
)
def test_values_are_escaped_and_cut(value: object, shown: str) -> None:
    assert short(value) == shown


def test_damaged_file_is_named_with_the_remedy() -> None:
    with pytest.raises(CheckpointError) as caught:
        broken("evil\nname", "its end is missing")
    assert str(caught.value) == (
        "evil\\nname is truncated or corrupt: its end is missing; save or download it again"
    )
