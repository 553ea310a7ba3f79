"""A policy as text: tables of TOML with their reasons above them."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pytest_subnet.text import redacted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Value: TypeAlias = "bool | float | str | list[str]"

_WIDTH = 96


class Table(NamedTuple):
    """One table of a policy.

    Attributes:
        assertion: its name.
        keywords: what it is called with, besides the pair.
        reasons: why these; a paragraph each, safe to print.
    """

    assertion: str
    keywords: dict[str, Value]
    reasons: Sequence[str]


def written(head: Sequence[str], names: dict[str, Value], tables: Iterable[Table]) -> str:
    """The text of a policy.

    Args:
        head: paragraphs of the comment at its top.
        names: `base` and `tuned`.
        tables: in their order; those of one assertion become an array of tables.
    """
    tables = list(tables)
    times = Counter(table.assertion for table in tables)
    blocks = ["".join([*_comments(head), "\n", *_pairs(names)])]
    for table in tables:
        title = f"[{table.assertion}]" if times[table.assertion] == 1 else f"[[{table.assertion}]]"
        blocks.append("".join([*_comments(table.reasons), f"{title}\n", *_pairs(table.keywords)]))
    return "\n".join(blocks)


def _comments(paragraphs: Iterable[str]) -> list[str]:
    return [
        f"# {line}\n"
        for paragraph in paragraphs
        for line in textwrap.wrap(
            redacted(paragraph),
            _WIDTH,
            subsequent_indent="    " if paragraph.startswith(" ") else "",
            break_on_hyphens=False,
        )
    ]


def _pairs(keywords: dict[str, Value]) -> list[str]:
    return [f"{key} = {spelled(value)}\n" for key, value in keywords.items()]


def spelled(value: Value) -> str:
    r"""A value as TOML has it, with nothing in it that could steer a terminal.

    Raises:
        ValueError: a string holds half a character, which TOML cannot say.

    >>> print(spelled(True), spelled(1e-05), spelled(["a", "say \"b\"\x1b"]))
    true 1e-05 ["a", "say \"b\"\U0000001b"]
    """
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{"".join(map(_character, value))}"'
        case list():
            return f"[{', '.join(map(spelled, value))}]"
        case _:
            return repr(value)


def _character(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    char.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return f"\\U{ord(char):08x}"
