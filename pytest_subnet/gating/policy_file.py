"""A policy: what a release must satisfy, as a TOML file says it; checked, not yet judged."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.files import stamp, unreadable
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.gating.policy_gates import OTHER, Gate, gate, gate_names, objection
from pytest_subnet.gating.policy_lines import Lines
from pytest_subnet.pairs.opening import Vocab
from pytest_subnet.text import nearest, redacted, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SOURCES = ("base", "tuned", "trajectory", "pattern")
"""The keys at the top of a policy: what it judges."""

OPENING = ("rename", "vocab", "as_dtype")
"""The keys beside them: how `open_pair` aligns the two sides."""

_LARGEST = 32 * 1024
"""Bytes: some hundred tables, more than anyone writes."""
_LONGEST_LINE = 2_000
"""Characters: a key of 15,000 steps takes the parser a minute."""
_WHERE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_TWICE = re.compile(r"\s*\[(\w+)\]\s*(?:#.*)?")
_SPELLED = {"int": "a number", "float": "a number", "list": "an array", "dict": "a table"}


@dataclass(frozen=True, slots=True)
class Table:
    """One assertion of a policy.

    Attributes:
        name: unlike that of any other table of the policy; safe to print.
        gate: the assertion.
        arguments: its keywords.
        other: where the second pair's tuned checkpoint is, for an assertion on two.
        line: where it stands; None where that is not known.
    """

    name: str
    gate: Gate
    arguments: Mapping[str, object]
    other: str | None
    line: int | None


@dataclass(frozen=True, slots=True)
class Policy:
    """What a policy file says.

    Attributes:
        label: how messages name the file.
        base: as written: a path, a hub id or an address; None if it is not.
        tuned: likewise.
        trajectory: the directory of a run; then there are no `base` and `tuned`.
        pattern: which of its directories are checkpoints.
        opening: the keywords of `open_pair`, or of `open_trajectory`, that it gives.
        tables: the assertions, in the order of the file.
    """

    label: str
    base: str | None
    tuned: str | None
    trajectory: str | None
    pattern: str
    opening: Mapping[str, Any]
    tables: tuple[Table, ...]


def read_policy(path: Path, label: str) -> Policy:
    """Read and check a policy; no checkpoint is opened.

    Args:
        path: the file.
        label: how messages name it; safe to print.

    Raises:
        SubnetError: it cannot be read, is no TOML, or says what cannot be meant; with the line.
    """
    return _Reader(label, _text(path, label)).policy()


def _text(path: Path, label: str) -> str:
    try:
        if stamp(path).size > _LARGEST:
            raise SubnetError(
                f"{label} has more than {_LARGEST:,} bytes, too many for a policy; split it"
            )
        with path.open("rb") as file:
            raw = file.read(_LARGEST)
    except CheckpointError:  # a pipe, a directory: what it is, is said there
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SubnetError(
            f"{label}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


class _Reader:
    """Reads one policy; errors name the file and the line."""

    def __init__(self, label: str, text: str) -> None:
        self.label = label
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > _LONGEST_LINE:
                raise SubnetError(
                    f"{label}:{number}: more than {_LONGEST_LINE:,} characters in a line; write an "
                    "array on several lines"
                )
        self.content = self._parsed(text)
        self.lines = Lines(text)

    def _parsed(self, text: str) -> dict[str, object]:
        try:
            return tomllib.loads(text)
        except RecursionError:
            raise SubnetError(f"{self.label}: nested too deeply to be a policy") from None
        except ValueError as error:
            raise SubnetError(self._no_toml(text, str(error))) from None

    def _no_toml(self, text: str, reason: str) -> str:
        where = _WHERE.search(reason)
        if where is None:  # an integer of endless length
            return f"{self.label}: not TOML: {short(reason)}"
        lines = text.replace("\r\n", "\n").split("\n")
        line = int(where[1] or len(lines))
        column = int(where[2] or len(lines[line - 1]) + 1)
        reason = short(reason[: where.start()])
        twice = _TWICE.fullmatch(lines[line - 1])
        if reason.endswith(" twice") and twice:
            reason += f"; several of a name are written [[{safe(twice[1])}]], the first one too"
        shown = short(redacted(lines[line - 1]))
        return f"{self.label}:{line}:{column}: not TOML: {reason}\n    {shown}"

    def _fail(
        self, text: str, name: str, number: int | None = None, key: str | None = None
    ) -> NoReturn:
        line = self.lines.of(name, number, key)
        raise SubnetError(f"{self.label}{'' if line is None else f':{line}'}: {redacted(text)}")

    def policy(self) -> Policy:
        """The whole of it."""
        sources = {key: self._source(key) for key in SOURCES if key in self.content}
        self._check_sources(sources)
        is_run = "trajectory" in sources
        tables = [
            self._table(name, number, values, is_run=is_run)
            for name, number, values in self._tables()
        ]
        if not tables:
            raise SubnetError(
                f"{self.label}: no assertion, so the policy gates nothing; add a table named after "
                "one, as [assert_same_structure]"
            )
        tables.sort(key=lambda table: table.line or 0)
        return Policy(
            label=self.label,
            base=sources.get("base"),
            tuned=sources.get("tuned"),
            trajectory=sources.get("trajectory"),
            pattern=sources.get("pattern", "checkpoint-*"),
            opening=self._opening(is_run=is_run),
            tables=tuple(_told_apart(tables)),
        )

    def _source(self, key: str) -> str:
        value = self.content[key]
        if not isinstance(value, str):
            self._fail(f"{key} is {_spelled(value)}; it takes a string", key)
        if not value:
            self._fail(f"{key} is empty; name a checkpoint, or leave the line out", key)
        return value

    def _opening(self, *, is_run: bool) -> dict[str, Any]:
        """What aligns the two sides; checked as far as it can be without them."""
        given = {key: self.content[key] for key in OPENING if key in self.content}
        for key in given:
            if is_run and key != "as_dtype":
                self._fail(
                    f"{key} beside trajectory: the checkpoints of a run have the same names and "
                    "rows; leave it out",
                    key,
                )
        for key, known in (("vocab", get_args(Vocab)), ("as_dtype", tuple(ARITHMETIC))):
            if key in given and given[key] not in known:
                words = ", ".join(f'"{each}"' for each in known)
                self._fail(f"{key} is {_spelled(given[key])}; it takes one of {words}", key)
        names = given.get("rename", {})
        if not isinstance(names, dict):
            self._fail(
                f"rename is {_spelled(names)}; it takes a table from names in tuned to names in "
                "base",
                "rename",
            )
        for name, new in names.items():
            if not isinstance(new, str):
                self._fail(
                    f"rename of {short(name)} is {_spelled(new)}; it takes a name in base, and a "
                    "name with dots stands in quotes",
                    "rename",
                    0,
                    name,
                )
        return given

    def _check_sources(self, sources: Mapping[str, str]) -> None:
        sides = [key for key in ("base", "tuned") if key in sources]
        if "trajectory" in sources and sides:
            self._fail(
                f"{' and '.join(sides)} beside trajectory: a policy judges a pair or a run; leave "
                "one of them out, or write two files",
                "trajectory",
            )
        if "pattern" in sources and "trajectory" not in sources:
            self._fail(
                "pattern without trajectory: it chooses among the checkpoints of a run", "pattern"
            )

    def _tables(self) -> Iterator[tuple[str, int, dict[str, object]]]:
        """Name, number among those of the name, and content of every table."""
        known = gate_names()
        for name, value in self.content.items():
            if name in (*SOURCES, *OPENING):
                continue
            if name not in known:
                hint = nearest(name, (*SOURCES, *OPENING, *known)) or (
                    f"; a policy has {', '.join((*SOURCES, *OPENING))}, and tables named after "
                    f"assertions: {', '.join(known)}"
                )
                what = "table" if isinstance(value, dict | list) else "key"
                self._fail(f"unknown {what} {safe(name)}{hint}", name)
            tables = value if isinstance(value, list) else [value]
            if not tables or not all(isinstance(each, dict) for each in tables):
                self._fail(
                    f"{name} is {_spelled(value)}, not a table; write [{name}] on a line of its "
                    "own, and its keywords below",
                    name,
                )
            for number, each in enumerate(tables):
                yield name, number, each

    def _table(self, name: str, number: int, values: dict[str, object], *, is_run: bool) -> Table:
        each = gate(name)
        self._check_subject(each, number, is_run=is_run)
        for key, value in values.items():
            self._check_value(each, number, key, value)
        missing = [key for key in each.required if key not in values]
        if missing:
            self._fail(f"[{name}] needs {' and '.join(missing)}", name, number)
        arguments = {
            key: None if key in each.unset and value == "none" else value
            for key, value in values.items()
            if not (key == OTHER and each.other)
        }
        wrong = objection(each, arguments)
        if wrong:
            self._fail(f"[{name}] {wrong}", name, number)
        other = values[OTHER] if each.other else None
        return Table(
            name=_named(name, values),
            gate=each,
            arguments=arguments,
            other=other if isinstance(other, str) else None,
            line=self.lines.of(name, number),
        )

    def _check_subject(self, each: Gate, number: int, *, is_run: bool) -> None:
        if each.needs_python:
            self._fail(
                f"[{each.name}] needs Python: its arguments cannot be written in TOML; call it in "
                "a test",
                each.name,
                number,
            )
        if is_run and each.subject == "pair":
            self._fail(
                f"[{each.name}] judges a pair, and the policy names a trajectory; put it into "
                "another file, with base and tuned",
                each.name,
                number,
            )
        if not is_run and each.subject == "trajectory":
            self._fail(
                f"[{each.name}] judges a run; name its directory in this file: trajectory = …",
                each.name,
                number,
            )

    def _check_value(self, each: Gate, number: int, key: str, value: object) -> None:
        place = (each.name, number, key)
        if key not in each.keys:
            known = each.sayable
            if key in (*SOURCES, *OPENING):
                hint = "; it belongs at the top of the file, above the first table"
            elif known:
                hint = nearest(key, known) or f"; it takes {', '.join(known)}"
            else:
                hint = "; it takes none"
            self._fail(f"unknown key {safe(key)} in [{each.name}]{hint}", *place)
        if key not in each.sayable:
            self._fail(f"{key} of [{each.name}] needs Python: call it in a test", *place)
        if not each.accepts(key, value):
            self._fail(
                f"{key} of [{each.name}] is {_spelled(value)}; it takes {each.takes(key)}", *place
            )
        if value == "" and key == OTHER:
            self._fail(f"{key} of [{each.name}] is empty; name a checkpoint", *place)


def _spelled(value: object) -> str:
    """What a value of TOML is, shown where it is short."""
    kind = type(value).__name__
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f'the string "{short(value)}"'
    return _SPELLED.get(kind, f"a {kind}")


def _named(name: str, values: Mapping[str, object]) -> str:
    """The assertion with what tells it from others of its name: which tensors it is about."""
    parts: list[str] = []
    for key in (OTHER, "include", "kinds"):
        value = values.get(key, [])
        parts += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return f"{name}[{short(redacted(','.join(parts)))}]" if parts else name


def _told_apart(tables: Sequence[Table]) -> Iterator[Table]:
    """The tables with a number where names are equal."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for table in tables:
        name, number = table.name, counts[table.name]
        while name in taken:
            number = max(number + 1, 2)
            stem = table.name.removesuffix("]")
            name = f"{stem}-{number}]" if stem != table.name else f"{stem}[{number}]"
        counts[table.name] = number
        taken.add(name)
        yield replace(table, name=name)
