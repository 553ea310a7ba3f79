"""Whether the model that trains and the one that generates have the same weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.errors import PairMismatchError, SubnetError
from pytest_subnet.findings.common.bounds import check_message
from pytest_subnet.findings.common.fingerprints import of_sides
from pytest_subnet.findings.common.result import Coverage, Message, cover, measure, reworded
from pytest_subnet.findings.synced.sources import open_copies
from pytest_subnet.findings.synced.texts import not_paired, not_synced, not_two_copies
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.selection import select
from pytest_subnet.recording import record
from pytest_subnet.scan.locating import first_difference
from pytest_subnet.scan.tolerance import Tolerance
from pytest_subnet.tables import table
from pytest_subnet.text import facts, plural, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.pairs import ModelPair, TensorPair
    from pytest_subnet.pairs.opening import Rename
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.locating import Difference


@dataclass(frozen=True, slots=True, repr=False)
class Synced:
    """Which tensors of trainer and rollout are the same to the bit.

    Attributes:
        coverage: which two, dtype, tensors and entries compared; its notes say what was cast.
        per_tensor: the tensors compared, buffers and integer tensors among them, named as in the
            trainer.
    """

    coverage: Coverage
    per_tensor: tuple[Movement, ...]

    @property
    def numel(self) -> int:
        """Entries compared."""
        return self.coverage.numel

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the content of trainer and rollout; each is taken when it is asked for."""
        return self.coverage.fingerprints

    @property
    def differing(self) -> int:
        """Entries with other bits."""
        return sum(each.changed for each in self.per_tensor)

    @property
    def unsynced(self) -> tuple[Movement, ...]:
        """The tensors that have such entries."""
        return tuple(each for each in self.per_tensor if each.changed)

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "dtype": short_dtype(each.dtype),
                "entries": f"{each.numel:,}",
                "differing": f"{each.changed:,}",
                "furthest": f"{each.max_change:.3g}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was compared."""
        rows = table(self.rows(), right=["entries", "differing", "furthest"])
        return f"{facts(repr(self), self.coverage.rows())}\n\n{rows}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "synced",
            "unsynced": len(self.unsynced),
            "differing": self.differing,
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"Synced(unsynced={len(self.unsynced):,} of {plural(len(self.per_tensor), 'tensor')}, "
            f"differing={self.differing:,} of {self.numel:,}, {self.coverage.dtype})"
        )


def assert_synced(
    trainer: Source,
    rollout: Source,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    message: Message | None = None,
) -> Synced:
    """Fail unless the copy that generates has the bits of the one that trains.

    Every tensor is compared in the dtype in which the rollout has it: float32 masters are cast as
    they are on their way there, and the result says so. What wrappers add to names is dropped.

    A test of a sync must begin with copies that differ, or it passes on a sync that does nothing:
    take a step, or write noise into the rollout, before it.

    Valid usages:
        assert_synced(trainer.model, "served")
        assert_synced(trainer.model, engine_state, exclude="*.rotary_emb.*")

    Args:
        trainer: the weights that were sent; anything `open_checkpoint` takes. Of a trainer's object
            its model: `trainer.model`.
        rollout: the weights that are served; likewise.
        include: glob or globs on the trainer's names; None takes all.
        exclude: glob or globs on the trainer's names to leave out.
        rename: from the rollout's names to the trainer's, where they differ by more than wrappers;
            as in `open_pair`.
        message: rewords a failure, which names every tensor that differs.

    Returns:
        What was compared, by tensor.

    Raises:
        AssertionError: a tensor has other bits; says where each begins to differ, and how.
        CheckpointError: one of them cannot be read.
        PairMismatchError: a tensor is on one side only or has another shape, or both are one thing.
        SelectionError: a pattern matches nothing, or nothing is left.
        TypeError: one of them has no weights.

    >>> trainer = {"q_proj.weight": torch.tensor([1.0, 1.0 + 2**-10]), "norm.weight": torch.ones(2)}
    >>> rollout = {name: tensor.bfloat16() for name, tensor in trainer.items()}
    >>> assert_synced(trainer, rollout)
    Synced(unsynced=0 of 2 tensors, differing=0 of 4, bf16)
    """
    __tracebackhide__ = True
    check_message(message)
    pair = _as_served(*open_copies(trainer, rollout), rename)
    try:
        selection = select(pair, include, exclude)
    except PairMismatchError as error:
        if not error.problems:
            raise
        total = len(pair.tensors) + len(pair.problems)
        raise PairMismatchError(not_paired(error, pair.label, total), error.problems) from None
    chosen = sorted((*selection.rows, *selection.apart))
    tensors = measure(pair, chosen, Tolerance())
    coverage = cover(pair, tensors, Tolerance(), total=len(pair.tensors))
    sides = of_sides({"trainer": (pair, pair.base), "rollout": (pair, pair.tuned)})
    result = Synced(replace(coverage, fingerprints=sides), tensors)
    record(result)
    if result.differing:
        rows = zip(chosen, tensors, strict=True)
        found = [(each, _begins(pair, row)) for row, each in rows if each.changed]
        text = not_synced(result, found)
        raise AssertionError(reworded(text, message))
    return result


def _as_served(trainer: Checkpoint, rollout: Checkpoint, rename: Rename | None) -> ModelPair:
    """Both aligned, each tensor to be compared in the dtype in which the rollout has it."""
    try:
        pair = open_pair(trainer, rollout, rename=rename)
    except PairMismatchError:  # nothing else is one before tensors are compared
        raise PairMismatchError(not_two_copies(trainer.label, rollout.label)) from None
    retyped = {each.name for each in pair.problems if each.kind == "retyped"}
    if not retyped:
        return pair
    casts = []
    for dtype in ARITHMETIC:
        cast = open_pair(trainer, rollout, rename=rename, as_dtype=dtype)
        casts += [
            tensor
            for tensor in cast.tensors
            if tensor.name in retyped and tensor.tuned_dtype == dtype
        ]
    settled = {tensor.name for tensor in casts}
    place = {name: number for number, name in enumerate(pair.base.names())}
    pair.tensors = tuple(
        sorted((*pair.tensors, *casts), key=lambda tensor: place[tensor.base_name])
    )
    pair.problems = tuple(each for each in pair.problems if each.name not in settled)
    pair.notes += tuple(_said(casts))
    return pair


def _said(casts: Sequence[TensorPair]) -> Iterator[str]:
    """What was cast, a line for each way from one dtype to another."""
    ways = Counter((each.base_dtype, each.tuned_dtype) for each in casts)
    for (held, served), count in ways.items():
        yield (
            f"{plural(count, 'tensor')} of the trainer cast from {short_dtype(held)} to "
            f"{short_dtype(served)}, as the rollout has them"
        )


def _begins(pair: ModelPair, row: int) -> Difference | None:
    """Where a tensor starts to differ; None where it does not, or has moved on since."""
    try:
        return first_difference(pair, row)
    except SubnetError:
        return None
