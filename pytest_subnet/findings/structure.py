"""Whether both checkpoints are the same model: same tensors, and ties that still hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.result import Message, reworded
from pytest_subnet.pairs.problems import describe
from pytest_subnet.pairs.ties import find_head
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair, Problem


@dataclass(frozen=True, slots=True, repr=False)
class SameStructure:
    """How base and tuned align.

    Attributes:
        pair: `base -> tuned`.
        tensors: how many tensors align.
        problems: what does not.
        renamed: names in the tuned checkpoint that differ from the base's, with the base's.
        notes: casts, rows left out.
    """

    pair: str
    tensors: int
    problems: tuple[Problem, ...]
    renamed: dict[str, str]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, object]]:
        """One row a problem."""
        return [{"kind": p.kind, "tensor": p.name, "what": p.text} for p in self.problems]

    def table(self) -> str:
        """The rows as text, under a line that says what was compared."""
        return f"{self!r}\n\n{table(self.rows())}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "same_structure",
            "pair": self.pair,
            "tensors": self.tensors,
            "problems": len(self.problems),
            "problem_kinds": dict(Counter(problem.kind for problem in self.problems)),
            "renamed": len(self.renamed),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"SameStructure({plural(self.tensors, 'tensor')} align, "
            f"{plural(len(self.problems), 'problem')}, {len(self.renamed):,} renamed)"
        )


def assert_same_structure(pair: ModelPair, *, message: Message | None = None) -> SameStructure:
    """Fail unless every tensor of both checkpoints aligns: same names, shapes and dtypes.

    Reads headers only. Names that wrappers changed align, and are listed in the result.

    Valid usages:
        assert_same_structure(pair)

    Args:
        pair: base and tuned.
        message: rewords a failure.

    Returns:
        What aligns and what does not.

    Raises:
        AssertionError: tensors on one side only, of other shapes, other dtypes or without entries.

    >>> assert_same_structure(pair)
    SameStructure(3 tensors align, 0 problems, 0 renamed)
    """
    __tracebackhide__ = True
    result = SameStructure(
        pair.label, len(pair.tensors), pair.problems, pair.renamed, pair.notes
    )
    record(result)
    if pair.problems:
        total = len(pair.tensors) + len(pair.problems)
        text = describe(pair.problems, pair=pair.label, total=total)
        raise AssertionError(reworded(text, message))
    return result


@dataclass(frozen=True, slots=True, repr=False)
class Ties:
    """Which tensors are tied on each side.

    Attributes:
        pair: `base -> tuned`.
        ties: second name, first name, and how the tie stands in base and in tuned: `"one storage"`,
            `"same bits"`, `"differs"` or `"not tied"`.
    """

    pair: str
    ties: tuple[tuple[str, str, str, str], ...]

    def rows(self) -> list[dict[str, object]]:
        """One row a tie."""
        columns = ("tensor", "tied to", "base", "tuned")
        return [dict(zip(columns, tie, strict=True)) for tie in self.ties]

    def table(self) -> str:
        """The rows as text, under a line that says what was compared."""
        return f"{self!r}\n\n{table(self.rows())}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {"finding": "ties", "pair": self.pair, "ties": len(self.ties)}

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return f"Ties({plural(len(self.ties), 'tie')}: {safe(self.pair)})"


def assert_tied(pair: ModelPair, *, message: Message | None = None) -> Ties:
    """Fail unless what the base ties is still tied in the tuned checkpoint.

    A tie holds where there is one storage, or where both names store the same bits.

    Valid usages:
        assert_tied(pair)

    Args:
        pair: base and tuned.
        message: rewords a failure.

    Returns:
        Each tie and how it stands on both sides.

    Raises:
        AssertionError: a tie of the base came apart.
        SelectionError: the base ties nothing, so there is nothing to assert.

    >>> assert_tied(tied_pair)
    Ties(1 tie: tied_base -> tied_tuned)
    """
    __tracebackhide__ = True
    pair.check_unchanged()
    names = _ties_of(pair.base)
    if not names:
        raise SelectionError(
            f"{safe(pair.base.label)} ties nothing that can be seen: no shared storage, and no "
            "tie_word_embeddings in a config.json beside it; leave assert_tied out, or add the config"
        )
    new_names = {base: tuned for tuned, base in pair.renamed.items()}
    ties = []
    for name, source in names.items():
        tuned_name, tuned_source = new_names.get(name, name), new_names.get(source, source)
        ties.append(
            (
                name,
                source,
                _standing(pair.base, name, source),
                _standing(pair.tuned, tuned_name, tuned_source),
            )
        )
    result = Ties(pair.label, tuple(ties))
    record(result)
    broken = [tie for tie in ties if {"differs", "not tied"} & set(tie[2:])]
    if broken:
        raise AssertionError(reworded(_came_apart(pair, broken), message))
    return result


def _ties_of(checkpoint: Checkpoint) -> dict[str, str]:
    ties = dict(checkpoint.ties)
    head = find_head(checkpoint)
    if head.embedding is not None and head.is_tied(ask_transformers=True):
        ties.pop(head.embedding, None)
        ties[head.head or "lm_head.weight"] = head.embedding
    return ties


def _standing(checkpoint: Checkpoint, name: str, source: str) -> str:
    if checkpoint.ties.get(name) == source or checkpoint.ties.get(source) == name:
        return "one storage"
    stored = set(checkpoint.names())
    if name in stored and source in stored:
        same = checkpoint.fingerprint(name) == checkpoint.fingerprint(source)
        return "same bits" if same else "differs"
    return "one storage" if find_head(checkpoint).is_tied(ask_transformers=True) else "not tied"


def _came_apart(pair: ModelPair, broken: list[tuple[str, str, str, str]]) -> str:
    return facts(
        f"{plural(len(broken), 'tie')} came apart",
        [
            ("pair", pair.label),
            *(
                ("tie", f"{safe(name)} = {safe(source)}:  base {base}, tuned {tuned}")
                for name, source, base, tuned in broken
            ),
            ("usually", "sharding or to_empty() split the storage, or a merge trained one name only"),
            ("to accept", 'set "tie_word_embeddings": false in the tuned config.json'),
        ],
    )
