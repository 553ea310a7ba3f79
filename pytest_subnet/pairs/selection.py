"""Which tensors a measure covers: globs on base names, and kinds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.alignment import names_in_base
from pytest_subnet.pairs.model_pair import check_pair
from pytest_subnet.pairs.problems import describe
from pytest_subnet.text import first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.pairs.model_pair import ModelPair

Patterns: TypeAlias = "str | Sequence[str]"

_LONGEST_WORD = 100  # of a pattern; to compare endless words with all names would take minutes


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of `pair.tensors`.

    Attributes:
        rows: the tensors measured.
        apart: buffers and integer tensors among the selected ones, compared by bits and reported
            apart.
    """

    rows: tuple[int, ...]
    apart: tuple[int, ...]


def select(
    pair: ModelPair,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> Selection:
    """Choose tensors of `pair`.

    Args:
        pair: where to choose.
        include: glob or globs on base names (`*` crosses dots); None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds, as in `TensorPair.kind`.

    Raises:
        SelectionError: a pattern matches no tensor, or nothing is left.
        PairMismatchError: a tensor that does not align is among the selected ones.
        TypeError: a pattern or a kind is no string, or `pair` is no pair.
    """
    check_pair(pair)
    names = [tensor.name for tensor in pair.tensors] + [p.name for p in pair.problems]
    aliases = _names_in_base(pair)
    included = matching("include", include, names, aliases)
    excluded = matching("exclude", exclude, names, aliases)
    of_kind = _known_kinds(pair, kinds)

    def wanted(name: str, kind: str) -> bool:
        return (
            (included is None or name in included)
            and (excluded is None or name not in excluded)
            and (of_kind is None or kind in of_kind)
        )

    problems = [p for p in pair.problems if wanted(p.name, pair.problem_kinds[p.name])]
    if problems:
        total = len(pair.tensors) + len(pair.problems)
        raise PairMismatchError(describe(problems, pair=pair.label, total=total), problems)
    chosen = [row for row, tensor in enumerate(pair.tensors) if wanted(tensor.name, tensor.kind)]
    if not chosen:
        raise SelectionError(
            f"nothing is selected from {pair.label}: include={include!r}, exclude={exclude!r} and "
            f"kinds={kinds!r} leave none of {plural(len(pair.tensors), 'tensor')}"
        )
    weights = tuple(row for row in chosen if pair.tensors[row].is_weight)
    apart = tuple(row for row in chosen if not pair.tensors[row].is_weight)
    return Selection(weights, apart)


def as_list(keyword: str, patterns: Patterns) -> list[str]:
    """One pattern or several as a list; `TypeError` where one is no string."""
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{keyword} takes strings, not {type(patterns).__name__}")
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise TypeError(f"{keyword} takes strings, not {type(pattern).__name__}")
    return wanted


def _names_in_base(pair: ModelPair) -> dict[str, str]:
    """What the base would call tensors that only the tuned checkpoint has, with their own names."""
    alone = [p.name for p in pair.problems if p.kind in ("only tuned", "ambiguous")]
    return names_in_base(alone, pair.base.names()) if alone else {}


def matching(
    keyword: str,
    patterns: Patterns | None,
    names: Sequence[str],
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> set[str] | None:
    """Those of `names` that a pattern matches, be it by an alias; None where all are meant."""
    if patterns is None:
        return None
    found: set[str] = set()
    for pattern in as_list(keyword, patterns):
        match = re.compile(fnmatch.translate(pattern)).match
        hits = [name for name in names if match(name)]
        hits += [name for alias, name in aliases.items() if match(alias)]
        if not hits:
            raise SelectionError(
                f"{keyword}={safe(pattern)!r} matches none of {plural(len(names), 'tensor')} "
                f"({first_few(names, 2)}){_hint(pattern, names)}"
            )
        found.update(hits)
    return found


def _hint(pattern: str, names: Sequence[str]) -> str:
    """What was probably meant by a pattern that matches nothing."""
    if any(name.startswith(pattern) or name.endswith(pattern) for name in names):
        return "; a glob matches the whole name, write *…* around a part of one"
    glob = pattern.strip("^$").replace(".*", "*").replace("\\.", ".")
    if glob != pattern and any(fnmatch.fnmatchcase(name, glob) for name in names):
        return f"; patterns are globs, not regular expressions, write {safe(glob)}"
    return _nearest_part(pattern, names) or nearest(pattern, names)


def _nearest_part(pattern: str, names: Sequence[str]) -> str:
    """The pattern with its longest piece of text as the names spell it, where that is near."""
    import difflib  # deferred: only a wrong pattern pays for it

    pieces = re.split(r"[*?\[\]]", pattern)
    word = max(pieces, key=len).strip(".")
    if len(pieces) == 1 or not 0 < len(word) <= _LONGEST_WORD:
        return ""
    size = word.count(".") + 1
    split = (name.split(".") for name in names)
    parts = {".".join(part[at : at + size]) for part in split for at in range(len(part) - size + 1)}
    for close in difflib.get_close_matches(word, sorted(parts), n=3, cutoff=0.7):
        meant = pattern.replace(word, close)
        if any(fnmatch.fnmatchcase(name, meant) for name in names):
            return f"; did you mean {safe(meant)}?"
    return ""


def _known_kinds(pair: ModelPair, kinds: Patterns | None) -> set[str] | None:
    if kinds is None:
        return None
    present = {tensor.kind for tensor in pair.tensors} | set(pair.problem_kinds.values())
    wanted = as_list("kinds", kinds)
    for kind in wanted:
        if kind not in present:
            known = ", ".join(safe(each) for each in sorted(present))
            raise SelectionError(
                f"kinds={safe(kind)!r} is no kind of {pair.label}; it has {known}"
                f"{nearest(kind, present)}"
            )
    return set(wanted)
