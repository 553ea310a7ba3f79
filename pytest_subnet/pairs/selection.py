"""Which tensors a measure covers: globs on base names, and kinds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.pairs.problems import describe
from pytest_subnet.text import first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.pairs.model_pair import ModelPair

Patterns: TypeAlias = "str | Sequence[str]"


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
        TypeError: a pattern or a kind is no string.
    """
    names = [tensor.name for tensor in pair.tensors] + [p.name for p in pair.problems]
    included = _matching("include", include, names)
    excluded = _matching("exclude", exclude, names)
    of_kind = _known_kinds(pair, kinds)

    def wanted(name: str, kind: str) -> bool:
        return (
            (included is None or name in included)
            and (excluded is None or name not in excluded)
            and (of_kind is None or kind in of_kind)
        )

    problems = [p for p in pair.problems if wanted(p.name, kind_of(p.name))]
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


def _as_list(keyword: str, patterns: Patterns) -> list[str]:
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{keyword} takes strings, not {type(patterns).__name__}")
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise TypeError(f"{keyword} takes strings, not {type(pattern).__name__}")
    return wanted


def _matching(keyword: str, patterns: Patterns | None, names: Sequence[str]) -> set[str] | None:
    if patterns is None:
        return None
    found: set[str] = set()
    for pattern in _as_list(keyword, patterns):
        match = re.compile(fnmatch.translate(pattern)).match
        hits = [name for name in names if match(name)]
        if not hits:
            raise SelectionError(
                f"{keyword}={safe(pattern)!r} matches none of {plural(len(names), 'tensor')} "
                f"({first_few(names, 2)}){_hint(pattern, names)}"
            )
        found.update(hits)
    return found


def _hint(pattern: str, names: Iterable[str]) -> str:
    if any(name.startswith(pattern) or name.endswith(pattern) for name in names):
        return "; a glob matches the whole name, write *…* around a part of one"
    return nearest(pattern, names)


def _known_kinds(pair: ModelPair, kinds: Patterns | None) -> set[str] | None:
    if kinds is None:
        return None
    present = {tensor.kind for tensor in pair.tensors} | {kind_of(p.name) for p in pair.problems}
    wanted = _as_list("kinds", kinds)
    for kind in wanted:
        if kind not in present:
            known = ", ".join(safe(each) for each in sorted(present))
            raise SelectionError(f"kinds={safe(kind)!r} is no kind of {pair.label}; it has {known}")
    return set(wanted)
