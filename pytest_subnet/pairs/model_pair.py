"""Base and tuned, aligned tensor by tensor."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.errors import CheckpointError, PairMismatchError
from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.errors import Problem


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor on both sides.

    Attributes:
        name: its name in the base (of an untied head, in the checkpoint that has it).
        base_name: the name under which the base stores it.
        tuned_name: the name under which the tuned checkpoint stores it.
        shape: what is compared; with `vocab="common"` the common rows.
        dtype: in which dtype it is compared, as torch names it.
        base_dtype: as which the base stores it.
        tuned_dtype: as which the tuned checkpoint stores it.
        layer: the number of its block; None outside the blocks.
        kind: what it is for: `"q_proj"`, `"down_proj"`, `"norm"`, `"embed"`, …
        is_weight: False for buffers and integer tensors, which are compared by bits and reported
            apart.
    """

    name: str
    base_name: str
    tuned_name: str
    shape: tuple[int, ...]
    dtype: str
    base_dtype: str
    tuned_dtype: str
    layer: int | None
    kind: str
    is_weight: bool

    @property
    def numel(self) -> int:
        """Number of entries compared."""
        return math.prod(self.shape)


class ModelPair:
    """A base and a tuned checkpoint, aligned; made by `open_pair` or `record_update`.

    Opening never fails for tensors that do not align. They are `problems`; every measure that
    would cover one raises `PairMismatchError`, and `assert_same_structure` fails.

    Attributes:
        base: the checkpoint before.
        tuned: the checkpoint after.
        tensors: what can be compared, in the base's storage order.
        problems: what did not align.
        renamed: names in the tuned checkpoint that differ from the base's, with the base's.
        tied: second names of tensors, with the name that is counted.
        tuned_names: what the tuned checkpoint calls each tensor of the base that it has, those
            counted under another name included.
        problem_kinds: what the tensor of each problem is for, by its name: as `TensorPair.kind`.
        notes: what a reader of a number must know: a cast, rows left out.
        device: where to compare: `"cpu"`, `"cuda"`, `"cuda:1"`; None leaves it to the scan.
        engine: who does the work: `"ray"`, or threads in this process (None, `"threads"`).
        memory: what the floors above have gathered for this pair, by their own keys.
        lock: held while something is gathered.

    >>> pair.tensors[1].name, pair.tensors[1].kind, pair.tensors[1].layer, pair.problems
    ('model.layers.0.mlp.up_proj.weight', 'up_proj', 0, ())
    """

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        *,
        tensors: Sequence[TensorPair],
        problems: Sequence[Problem] = (),
        renamed: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        device: str | None = None,
        engine: str | None = None,
        second_names: Sequence[tuple[Checkpoint, str, str]] = (),
        tuned_names: Mapping[str, str] | None = None,
        problem_kinds: Mapping[str, str] | None = None,
    ) -> None:
        """Take an alignment as it is; `open_pair` makes one.

        `second_names` says where a tied tensor is stored a second time: in which checkpoint, under
        which name, and under which it is counted. That both are equal is looked at before counting.
        """
        self.base = base
        self.tuned = tuned
        self.tensors = tuple(tensors)
        self.problems = tuple(problems)
        self.renamed = dict(renamed or {})
        self.tied = dict(tied or {})
        self.notes = tuple(notes)
        self.device = device
        self.engine = engine
        self.memory: dict[str, object] = {}
        self.lock = threading.RLock()
        self.tuned_names = dict(
            {name: name for name in tuned.names()} | {new: old for old, new in self.renamed.items()}
            if tuned_names is None
            else tuned_names
        )
        self.problem_kinds = {each.name: kind_of(each.name) for each in self.problems}
        self.problem_kinds.update(problem_kinds or {})
        self._second_names = list(second_names)
        # Of files: what they were when their headers were read, not what they may have become.
        self._identities = base.identity_when_opened(), tuned.identity_when_opened()

    @property
    def label(self) -> str:
        """`base -> tuned`, as messages name the pair; safe to print."""
        return f"{safe(self.base.label)} -> {safe(self.tuned.label)}"

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if either side was written to since the pair was opened."""
        for checkpoint, known in zip((self.base, self.tuned), self._identities, strict=True):
            if checkpoint.identity() != known:
                raise CheckpointError(
                    f"{safe(checkpoint.label)} changed after the pair was opened; "
                    "wait until it is written, then open the pair again"
                )

    def check_second_names(self) -> None:
        """Raise unless what is tied, and so counted once, is the same wherever it is stored twice.

        Reads both the first time; `PairMismatchError` when they differ.
        """
        while self._second_names:
            checkpoint, name, counted = self._second_names[-1]
            if checkpoint.fingerprint(name) != checkpoint.fingerprint(counted):
                raise PairMismatchError(
                    f"{safe(checkpoint.label)} stores {safe(name)} with other values than "
                    f"{safe(counted)}, to which it is tied, and which ones the model uses cannot "
                    'be known; state "tie_word_embeddings": false in its config.json if it has a '
                    "head of its own, or save it again without the second name"
                )
            self._second_names.pop()

    def __repr__(self) -> str:
        """One line: which pair, how much of it aligned."""
        problems = f", {plural(len(self.problems), 'problem')}" if self.problems else ""
        return f"<ModelPair {self.label}: {plural(len(self.tensors), 'tensor')}{problems}>"


def check_pair(pair: object) -> None:
    """Raise `TypeError` unless `pair` is a pair; a path or a model in its place is no reason."""
    if isinstance(pair, ModelPair):
        return
    getattr(pair, "tensors", None)  # a recording that was not entered says so itself
    raise TypeError(
        f"a ModelPair is needed, got {safe(type(pair).__name__)}; make one with open_pair(base, "
        "tuned), or take the fixture model_pair"
    )
