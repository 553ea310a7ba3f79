"""Whether both checkpoints are the same model: same tensors, and ties that still hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_message
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.pairs.model_pair import check_pair
from pytest_subnet.pairs.problems import describe
from pytest_subnet.pairs.ties import config_flag, find_head, tied_by_config
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        fingerprints: of the content of base and tuned; each is taken when it is asked for.
    """

    pair: str
    tensors: int
    problems: tuple[Problem, ...]
    renamed: dict[str, str]
    notes: tuple[str, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def rows(self) -> list[dict[str, object]]:
        """One row a problem."""
        return [{"kind": p.kind, "tensor": p.name, "what": p.text} for p in self.problems]

    def table(self) -> str:
        """The rows as text, under what was compared, cast, left out and renamed."""
        lines = [("pair", self.pair)]
        lines += column("note", self.notes)
        if self.renamed:
            lines.append(
                ("renamed", first_few([f"{old} -> {new}" for old, new in self.renamed.items()]))
            )
        return f"{facts(repr(self), lines)}\n\n{table(self.rows())}"

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
        TypeError: `pair` is no pair.

    >>> assert_same_structure(pair)
    SameStructure(3 tensors align, 0 problems, 0 renamed)
    """
    __tracebackhide__ = True
    check_message(message)
    check_pair(pair)
    pair.check_unchanged()
    result = SameStructure(
        pair.label,
        len(pair.tensors),
        pair.problems,
        dict(pair.renamed),
        pair.notes,
        of_pair(pair),
    )
    record(result)
    if pair.problems:
        total = len(pair.tensors) + len(pair.problems)
        text = describe(pair.problems, pair=pair.label, total=total, can_exclude=False)
        raise AssertionError(reworded(text, message))
    return result


class Tie(NamedTuple):
    """One tensor under two names.

    Attributes:
        name: the second name, as the base calls it.
        source: the first name.
        base: how the tie stands in the base: `"one storage"`, `"same bits"`, `"differs"`,
            `"not tied"`, `"not stored"` or `"no config says"`.
        tuned: how it stands in the tuned checkpoint.
    """

    name: str
    source: str
    base: str
    tuned: str

    @property
    def holds(self) -> bool:
        """Whether it is one tensor on both sides."""
        return {self.base, self.tuned} <= {"one storage", "same bits"}


@dataclass(frozen=True, slots=True, repr=False)
class Ties:
    """Which tensors are tied on each side.

    Attributes:
        pair: `base -> tuned`.
        ties: what the base ties, and how it stands on both sides.
        fingerprints: of the content of base and tuned; each is taken when it is asked for.
    """

    pair: str
    ties: tuple[Tie, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def broken(self) -> tuple[Tie, ...]:
        """The ties that came apart."""
        return tuple(tie for tie in self.ties if not tie.holds)

    def rows(self) -> list[dict[str, object]]:
        """One row a tie."""
        columns = ("tensor", "tied to", "base", "tuned")
        return [dict(zip(columns, tie, strict=True)) for tie in self.ties]

    def table(self) -> str:
        """The rows as text, under a line that says what was compared."""
        return f"{self!r}\n\n{table(self.rows())}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "ties",
            "pair": self.pair,
            "ties": len(self.ties),
            "broken": len(self.broken),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        broken = f", {len(self.broken):,} broken" if self.broken else ""
        return f"Ties({plural(len(self.ties), 'tie')}{broken}: {self.pair})"


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
        TypeError: `pair` is no pair.

    >>> assert_tied(tied_pair)
    Ties(1 tie: tied_base -> tied_tuned)
    """
    __tracebackhide__ = True
    check_message(message)
    check_pair(pair)
    pair.check_unchanged()
    ties = _ties_of(pair.base)
    if not ties:
        raise SelectionError(
            f"{safe(pair.base.label)} ties nothing that can be seen: no shared storage, and "
            f"{_stated(pair.base.config)}"
        )
    sides = (pair.base, {name: name for name in pair.base.names()}), (pair.tuned, pair.tuned_names)
    result = Ties(
        pair.label,
        tuple(
            Tie(name, source, *(_standing(side, names, name, source) for side, names in sides))
            for name, source in ties.items()
        ),
        of_pair(pair),
    )
    record(result)
    if result.broken:
        raise AssertionError(reworded(_came_apart(result), message))
    return result


def _ties_of(checkpoint: Checkpoint) -> dict[str, str]:
    ties = dict(checkpoint.ties)
    head = find_head(checkpoint)
    if head.embedding is not None and head.is_tied(ask_transformers=True):
        ties.pop(head.embedding, None)
        ties[head.head_name] = head.embedding
    return ties


def _stated(config: Mapping[str, object]) -> str:
    flag = config_flag(config)
    if flag is None:
        return (
            "no tie_word_embeddings in a config.json beside it; leave assert_tied out, or add the "
            "config"
        )
    return (
        f'its config states "tie_word_embeddings": {str(flag).lower()}; leave assert_tied out, or '
        "correct the config or the weights"
    )


def _standing(checkpoint: Checkpoint, names: Mapping[str, str], name: str, source: str) -> str:
    """How the tie stands in `checkpoint`, whose own names are in `names` by those of the base."""
    one, other = names.get(name), names.get(source)
    if one is not None and other is not None:
        if checkpoint.ties.get(one, one) == checkpoint.ties.get(other, other):
            return "one storage"
        same = checkpoint.fingerprint(one) == checkpoint.fingerprint(other)
        return "same bits" if same else "differs"
    # A config speaks of the head only.
    if (one is None and other is None) or kind_of(name) != "head":
        return "not stored"
    tied = tied_by_config(checkpoint.config)
    return "no config says" if tied is None else "one storage" if tied else "not tied"


def _came_apart(result: Ties) -> str:
    return facts(
        f"{plural(len(result.broken), 'tie')} came apart",
        [
            ("pair", result.pair),
            *column(
                "tie",
                (
                    f"{safe(tie.name)} = {safe(tie.source)}:  base {tie.base}, tuned {tie.tuned}"
                    for tie in result.broken
                ),
            ),
            (
                "usually",
                "sharding or to_empty() split the storage, or a merge trained one name only",
            ),
            ("to accept", 'leave assert_tied out, and say "tie_word_embeddings": false in the'),
            ("", "config.json of the tuned checkpoint, or loading it ties them again"),
        ],
    )
