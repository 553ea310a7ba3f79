"""On which line of a TOML file a key stands: the standard library's parser does not tell."""

from __future__ import annotations

import tomllib
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

Place: TypeAlias = "tuple[str, int | None, str | None]"
"""A name at the top of the file, which of the tables of that name, and a key in it."""

_LONGEST = 100
"""Lines of one statement: what is longer was not written by a person, and is left unnumbered."""


class Lines:
    r"""Where the keys of a TOML text stand that was parsed before, as a whole.

    >>> lines = Lines('base = "a"\n\n[[gate]]\nat_most = 1\n[[gate]]\n"at_most" = 2\n')
    >>> lines.of("base"), lines.of("gate", 1), lines.of("gate", 1, "at_most"), lines.of("gates")
    (1, 5, 6, None)
    """

    def __init__(self, text: str) -> None:
        """Look through `text`, statement by statement."""
        self._known: dict[Place, int] = {}
        tables: Counter[str] = Counter()
        within: dict[str, object] = {}
        for line, statement, parsed in _statements(text):
            if statement.lstrip(" \t").startswith("["):
                within = parsed
                tables[next(iter(parsed))] += statement.lstrip(" \t").startswith("[[")
            name = next(iter(within or parsed))
            # Keys stand below a header, or inside `name.key = …` and `name = {key = …}`.
            inner = parsed if within and parsed is not within else parsed[name]
            number = max(tables[name] - 1, 0)
            for key in (*(inner if isinstance(inner, dict) else ()), None):
                self._known.setdefault((name, number, key), line)
            self._known.setdefault((name, None, None), line)

    def of(self, name: str, number: int | None = None, key: str | None = None) -> int | None:
        """The line of a key in a table, else that of the table; None where it was not found."""
        for place in ((name, number, key), (name, number, None), (name, None, None)):
            if place in self._known:
                return self._known[place]
        return None


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, object]]]:
    """Each statement with the line it starts on: the shortest run of lines that is TOML by itself.

    Every statement starts a line, so that blank lines and comments stand alone as well.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    start = 0
    while start < len(lines):
        for end in range(start + 1, min(start + _LONGEST, len(lines)) + 1):
            statement = "\n".join(lines[start:end])
            try:
                parsed = tomllib.loads(statement)
            except (ValueError, RecursionError):  # as a whole it is TOML
                continue
            if parsed:
                yield start + 1, statement, parsed
            start = end
            break
        else:
            return  # from inside a statement nothing can be told of what follows
