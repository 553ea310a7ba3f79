"""Which tensors a measure covers: globs on base names, and kinds."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.problems import describe
from pytest_subnet.text import first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """
    names = [tensor.name for tensor in pair.tensors] + [p.name for p in pair.problems]
    included = _matching("include", include, names)
    excluded = _matching("exclude", exclude, names)

    def wanted(name: str) -> bool:
        return (included is None or name in included) and (
            excluded is None or name not in excluded
        )

    of_kind = _known_kinds(pair, kinds)
    problems = [problem for problem in pair.problems if wanted(problem.name)]
    if problems:
        total = len(pair.tensors) + len(pair.problems)
        raise PairMismatchError(describe(problems, pair=pair.label, total=total), problems)
    chosen = [
        row
        for row, tensor in enumerate(pair.tensors)
        if wanted(tensor.name) and (of_kind is None or tensor.kind in of_kind)
    ]
    if not chosen:
        raise SelectionError(
            f"nothing is selected from {pair.label}: include={include!r}, exclude={exclude!r} and "
            f"kinds={kinds!r} leave none of {plural(len(pair.tensors), 'tensor')}"
        )
    weights = tuple(row for row in chosen if pair.tensors[row].is_weight)
    apart = tuple(row for row in chosen if not pair.tensors[row].is_weight)
    return Selection(weights, apart)


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matching(keyword: str, patterns: Patterns | None, names: Sequence[str]) -> set[str] | None:
    if patterns is None:
        return None
    found: set[str] = set()
    for pattern in _as_list(patterns):
        if not isinstance(pattern, str):
            raise TypeError(f"{keyword} takes globs as strings, not {type(pattern).__name__}")
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
    present = {tensor.kind for tensor in pair.tensors}
    for kind in _as_list(kinds):
        if kind not in present:
            raise SelectionError(
                f"kinds={safe(kind)!r} is no kind of {pair.label}; it has {', '.join(sorted(present))}"
            )
    return set(_as_list(kinds))
