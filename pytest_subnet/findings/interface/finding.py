"""Whether a release changed what lies beside its weights: configs, tokenizer, chat template."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.errors import CheckpointError, SelectionError
from pytest_subnet.findings.common.bounds import check_message
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.interface.files import CONFIG, Side, read_side
from pytest_subnet.findings.interface.texts import ABSENT, NOT_THERE, differs, same, spell_two
from pytest_subnet.pairs.model_pair import check_pair
from pytest_subnet.pairs.selection import as_list
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

_SET_WHEN_SAVED = ("architectures",)
"""What the config of a model in memory does not state yet."""
_RECORDED = 20
"""Differences that a report lists by name."""


class Difference(NamedTuple):
    """One key that is not the same on both sides.

    Attributes:
        file: where it stands; `"chat_template"` for a template, wherever it stands.
        key: dotted path in the file; empty where the file as a whole differs.
        base: its value in the base as text, shortened and escaped.
        tuned: its value in the tuned checkpoint, likewise.
    """

    file: str
    key: str
    base: str
    tuned: str

    @property
    def place(self) -> str:
        """`file:key`, as `allow=` takes it."""
        return f"{self.file}:{self.key}" if self.key else self.file


@dataclass(frozen=True, slots=True, repr=False)
class SameInterface:
    """What differs between base and tuned beside their weights.

    Attributes:
        pair: `base -> tuned`.
        compared: the files looked at, those on one side only among them.
        keys: how many keys were compared.
        differences: what differs and was not allowed.
        allowed: what differs and was.
        left_out: `file:key` of what says nothing about behaviour, and was not compared.
        notes: what could not be compared.
    """

    pair: str
    compared: tuple[str, ...]
    keys: int
    differences: tuple[Difference, ...]
    allowed: tuple[Difference, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, object]]:
        """One row a difference."""
        return [
            {**each._asdict(), "allowed": "yes" if each in self.allowed else ""}
            for each in (*self.differences, *self.allowed)
        ]

    def table(self) -> str:
        """The rows as text, under what was compared and what was left out."""
        lines = [("pair", self.pair), ("compared", ", ".join(self.compared))]
        if self.left_out:
            lines.append(("left out", first_few(self.left_out, 8)))
        lines += column("note", self.notes)
        return f"{facts(repr(self), lines)}\n\n{table(self.rows())}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "same_interface",
            "pair": self.pair,
            "compared": list(self.compared),
            "keys": self.keys,
            "differences": len(self.differences),
            "differing": [safe(each.place) for each in self.differences[:_RECORDED]],
            "allowed": len(self.allowed),
            "left_out": [safe(place) for place in self.left_out[:_RECORDED]],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        allowed = f", {len(self.allowed):,} allowed" if self.allowed else ""
        return (
            f"SameInterface({plural(len(self.differences), 'difference')}{allowed}, "
            f"{plural(self.keys, 'key')} in {plural(len(self.compared), 'file')})"
        )


def same_interface(pair: ModelPair) -> SameInterface:
    """Compare what lies beside the weights: config, generation config, tokenizer, chat template.

    Reads the files of both directories as they are: nothing is loaded, no template is run. Where a
    side has no directory, a model in memory or a remote checkpoint, its config alone is compared,
    and a note says so.

    Args:
        pair: base and tuned.

    Returns:
        The keys that differ, with both values.

    Raises:
        CheckpointError: a file cannot be read, or is no JSON.
        SelectionError: there is nothing to compare on either side.
        TypeError: `pair` is no pair.

    >>> result = same_interface(open_pair("base", "tuned"))
    >>> len(result.differences), result.compared
    (0, ('config.json', 'generation_config.json'))
    """
    result = _measured(pair, ())
    record(result)
    return result


def assert_same_interface(
    pair: ModelPair, *, allow: Patterns = (), message: Message | None = None
) -> SameInterface:
    """Fail unless config, generation config, tokenizer and chat template are those of the base.

    A file or a key on one side only is a difference. Keys that say nothing about behaviour are left
    out: `_name_or_path`, `transformers_version`, `torch_dtype` and `dtype` (which
    `assert_same_structure` holds to the tensors), and how versions of transformers spell one thing.

    Valid usages:
        assert_same_interface(pair)
        assert_same_interface(pair, allow="generation_config.json:*")       # a file
        assert_same_interface(pair, allow=["use_cache", "chat_template"])   # a key, the template

    Args:
        pair: base and tuned.
        allow: glob or globs on `file:key`, on the key, or on the file, for what may differ.
        message: rewords a failure.

    Returns:
        What differs and was allowed.

    Raises:
        AssertionError: something differs.
        SelectionError: a pattern in `allow` matches nothing that was compared, or there is nothing
            to compare on either side.
        CheckpointError: a file cannot be read, or is no JSON.
        TypeError: `pair` is no pair, or `allow` holds no strings.

    >>> assert_same_interface(open_pair("base", "tuned"))
    SameInterface(0 differences, 28 keys in 2 files)
    """
    __tracebackhide__ = True
    check_message(message)
    result = _measured(pair, as_list("allow", allow))
    record(result)
    if result.differences:
        raise AssertionError(reworded(differs(result), message))
    return result


def _measured(pair: ModelPair, allow: Sequence[str]) -> SameInterface:
    check_pair(pair)
    pair.check_unchanged()
    try:
        return _compared(pair, read_side(pair.base), read_side(pair.tuned), allow)
    except RecursionError:
        raise CheckpointError(
            f"{pair.label}: a config or a tokenizer is nested too deeply to be one; save it again"
        ) from None


def _compared(pair: ModelPair, base: Side, tuned: Side, allow: Sequence[str]) -> SameInterface:
    files = _comparable(base, tuned)
    places = {(file, key) for file in files for key in _keys(base, tuned, file)}
    if not places:
        raise SelectionError(_nothing_there(pair, base, tuned))
    permitted = _permitted(allow, places)
    found = [each for file in files for each in _differences(base, tuned, file)]
    return SameInterface(
        pair=pair.label,
        compared=tuple(files),
        keys=len(places),
        differences=tuple(each for each in found if each[:2] not in permitted),
        allowed=tuple(each for each in found if each[:2] in permitted),
        left_out=tuple(sorted(base.left_out | tuned.left_out)),
        notes=tuple(dict.fromkeys(_notes(base, tuned))),
    )


def _comparable(base: Side, tuned: Side) -> list[str]:
    """The files to compare, in the order of the base's."""
    files = [*dict.fromkeys((*base.files, *tuned.files))]
    if not (base.is_directory and tuned.is_directory):
        return [CONFIG] if CONFIG in base.files and CONFIG in tuned.files else []
    return [file for file in files if file in tuned.files or not tuned.is_adapter]


def _keys(base: Side, tuned: Side, file: str) -> list[str]:
    """The keys to compare in `file`; none of a file on one side, which differs as a whole."""
    one, other = base.files.get(file), tuned.files.get(file)
    if one is None or other is None:
        return [""]
    if base.states_defaults != tuned.states_defaults:
        return [key for key in one if key in other and key not in _SET_WHEN_SAVED]
    return [*dict.fromkeys((*one, *other))]


def _differences(base: Side, tuned: Side, file: str) -> Iterator[Difference]:
    one, other = base.files.get(file), tuned.files.get(file)
    if one is None or other is None:
        sides = [NOT_THERE if each is None else "(there)" for each in (one, other)]
        yield Difference(file, "", *sides)
        return
    for key in _keys(base, tuned, file):
        values = one.get(key, ABSENT), other.get(key, ABSENT)
        if not same(*values):
            yield Difference(file, key, *spell_two(*values))


def _permitted(allow: Sequence[str], places: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The places that a pattern allows to differ; each pattern must name one that is there."""
    found: set[tuple[str, str]] = set()
    for pattern in allow:
        hits = {
            (file, key)
            for file, key in places
            if any(fnmatch.fnmatchcase(name, pattern) for name in (f"{file}:{key}", key, file))
        }
        if not hits:
            names = sorted({name for file, key in places for name in (key, f"{file}:{key}") if key})
            raise SelectionError(
                f"allow={safe(pattern)!r} matches none of {plural(len(places), 'key')} compared"
                f"{nearest(pattern, names)}"
            )
        found |= hits
    return found


def _notes(base: Side, tuned: Side) -> Iterator[str]:
    for side in (base, tuned):
        if not side.is_directory:
            yield (
                f"generation config, tokenizer and chat template are not compared: "
                f"{safe(side.label)} is not in a directory of this machine"
            )
    if base.states_defaults != tuned.states_defaults:
        yield "a model in memory states its defaults too: of config.json, the keys both sides state"
    if tuned.is_adapter:
        yield "the tuned checkpoint is an adapter: what does not lie beside it is the base's"


def _nothing_there(pair: ModelPair, base: Side, tuned: Side) -> str:
    if base.is_directory and tuned.is_directory:
        return (
            f"nothing lies beside the weights of {pair.label}: no config, tokenizer or chat "
            "template, so there is nothing to compare; copy them there, or leave "
            "assert_same_interface out"
        )
    return (
        f"{pair.label}: nothing to compare beside the weights: one side is not in a directory of "
        "this machine, and there are not two configs; pass directories, or models with a config"
    )
