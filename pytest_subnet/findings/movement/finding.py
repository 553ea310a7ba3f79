"""What moved and what did not: frozen parts, trained parts, structure, ties, size of the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.errors import SelectionError, SubnetError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    check_tolerance,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.result import (
    Coverage,
    Message,
    Movement,
    cover,
    finite_or_none,
    measure,
    reworded,
)
from pytest_subnet.findings.movement.texts import not_finite, not_frozen, not_updated, too_far
from pytest_subnet.findings.precision import movable_shares
from pytest_subnet.pairs.selection import select
from pytest_subnet.recording import record
from pytest_subnet.scan.locating import first_difference
from pytest_subnet.tables import table
from pytest_subnet.text import facts, first_few, percent, plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.locating import Difference
    from pytest_subnet.scan.tolerance import Tolerance


_STEP_SIZES = (1e-6, 1e-5, 1e-4)
"""Learning rates of RL, SFT and adapters: an Adam step is about as long as the learning rate."""


@dataclass(frozen=True, slots=True, repr=False)
class UpdateMovement:
    """How far each tensor moved.

    Attributes:
        coverage: pair, tolerance, dtype, tensors and entries measured.
        per_tensor: the tensors measured, buffers and integer tensors among them.
    """

    coverage: Coverage
    per_tensor: tuple[Movement, ...]

    @property
    def numel(self) -> int:
        """Entries measured."""
        return self.coverage.numel

    @property
    def dtype(self) -> str:
        """The dtype compared; several are joined by `+`."""
        return self.coverage.dtype

    @property
    def tolerance(self) -> Tolerance:
        """Under which an entry counts as updated."""
        return self.coverage.tolerance

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the content of base and tuned; each is taken when it is asked for."""
        return self.coverage.fingerprints

    @property
    def updated(self) -> int:
        """Entries updated under the tolerance."""
        return sum(each.updated for each in self.per_tensor)

    @property
    def sparsity(self) -> float:
        """Share of entries not updated."""
        return (self.numel - self.updated) / self.numel

    @property
    def density(self) -> float:
        """Share of entries updated: 1 - sparsity."""
        return self.updated / self.numel

    @property
    def zero_sign_flips(self) -> int:
        """Zeros that only changed their sign; with same bits they are among the updated."""
        return sum(each.zero_sign_flips for each in self.per_tensor)

    @property
    def moved(self) -> int:
        """Tensors with an updated entry."""
        return sum(each.updated > 0 for each in self.per_tensor)

    @property
    def nonfinite_base(self) -> int:
        """NaN and Inf in the base."""
        return sum(each.nonfinite_base for each in self.per_tensor)

    @property
    def nonfinite_tuned(self) -> int:
        """NaN and Inf in the tuned checkpoint."""
        return sum(each.nonfinite_tuned for each in self.per_tensor)

    @property
    def max_change(self) -> float:
        """The largest |tuned - base| between finite entries."""
        return max(each.max_change for each in self.per_tensor)

    @property
    def max_relative_change(self) -> float:
        """The largest norm of a tensor's change over the norm of its base."""
        return max(each.relative_change for each in self.per_tensor)

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "entries": f"{each.numel:,}",
                "updated": f"{each.updated:,}",
                "density": percent(each.density),
                "max change": f"{each.max_change:.3g}",
                "relative": f"{each.relative_change:.3g}",
                "not finite": f"{each.nonfinite:,}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["entries", "updated", "density", "max change", "relative", "not finite"]
        return f"{facts(repr(self), self.coverage.rows())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "update_movement",
            "moved": self.moved,
            "updated": self.updated,
            "sparsity": self.sparsity,
            "density": self.density,
            "zero_sign_flips": self.zero_sign_flips,
            "nonfinite_base": self.nonfinite_base,
            "nonfinite_tuned": self.nonfinite_tuned,
            "max_change": finite_or_none(self.max_change),
            "max_relative_change": finite_or_none(self.max_relative_change),
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"UpdateMovement(moved={self.moved:,} of {plural(len(self.per_tensor), 'tensor')}, "
            f"updated={self.updated:,} of {self.numel:,}, max_change={self.max_change:.3g}, "
            f"{self.tolerance}, {self.dtype})"
        )


def update_movement(
    pair: ModelPair,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> UpdateMovement:
    """Measure how far each selected tensor moved; buffers and integer tensors are included.

    Args:
        pair: base and tuned, read in pieces; what was read before is not read again.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).
        atol: |tuned - base| <= atol does not count as updated, in weight units.
        rtol: |tuned - base| <= rtol * max(|base|, |tuned|) does not count as updated.

    Returns:
        Counts, largest change and norms, in all and per tensor.

    Raises:
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.
        ValueError: both tolerances, or a negative one.

    >>> update_movement(pair, include="*up_proj*").moved
    1
    """
    tolerance = check_tolerance(atol, rtol)
    selection = select(pair, include, exclude, kinds)
    tensors = measure(pair, sorted((*selection.rows, *selection.apart)), tolerance)
    result = UpdateMovement(cover(pair, tensors, tolerance, total=len(pair.tensors)), tensors)
    record(result)
    return result


def assert_frozen(
    pair: ModelPair,
    include: Patterns,
    *,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateMovement:
    """Fail if any entry of the selected tensors changed, by default by a single bit.

    Valid usages:
        assert_frozen(pair, "*.embed_tokens.weight")
        assert_frozen(pair, ["*.base_layer.*", "lm_head.*"])
        assert_frozen(pair, "*", exclude="*lora_*")                 # all but the adapters

    Args:
        pair: base and tuned.
        include: glob or globs on base names.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        atol: |tuned - base| <= atol counts as frozen.
        rtol: |tuned - base| <= rtol * max(|base|, |tuned|) counts as frozen.
        message: rewords a failure.

    Returns:
        What `update_movement` measured.

    Raises:
        AssertionError: a selected tensor moved; names the first entry with other bits.
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.
        ValueError: both tolerances, or a negative one.

    >>> assert_frozen(pair, "*norm*").updated
    0
    """
    __tracebackhide__ = True
    check_message(message)
    result = update_movement(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    if result.moved:
        moved = sorted(
            (each for each in result.per_tensor if each.updated), key=lambda each: -each.density
        )
        text = not_frozen(result, moved, _first_difference(pair, result.tolerance, moved[0]))
        raise AssertionError(reworded(text, message))
    return result


def _first_difference(pair: ModelPair, tolerance: Tolerance, tensor: Movement) -> Difference | None:
    """Where `tensor` starts to differ; None where that is not what `tolerance` asks, or is gone."""
    if not tolerance.same_bits:
        return None
    row = next(row for row, each in enumerate(pair.tensors) if each.name == tensor.name)
    try:
        return first_difference(pair, row)
    except SubnetError:  # the weights have moved on since they were counted; the verdict stands
        return None


def assert_updated(
    pair: ModelPair,
    include: Patterns,
    *,
    at_least: float | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateMovement:
    """Fail unless every selected tensor moved.

    A zero that only changed its sign did not move, and neither did a tensor in which only NaN or
    Inf appeared.

    Valid usages:
        assert_updated(pair, "*lora_B*")
        assert_updated(pair, "*_proj.weight", at_least=0.01)    # at least 1 % of each matrix

    Args:
        pair: base and tuned.
        include: glob or globs on base names.
        at_least: fraction in [0, 1]: the smallest density allowed for a tensor; None asks for one
            updated entry.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        atol: |tuned - base| <= atol does not count as updated.
        rtol: |tuned - base| <= rtol * max(|base|, |tuned|) does not count as updated.
        message: rewords a failure.

    Returns:
        What `update_movement` measured.

    Raises:
        AssertionError: a selected tensor did not move, or not enough of it.
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.
        ValueError: `at_least` outside [0, 1], both tolerances, or a negative one.

    >>> assert_updated(pair, "*up_proj*", at_least=0.05).moved
    1
    """
    __tracebackhide__ = True
    if at_least is not None:
        check_fraction("at_least", at_least)
    check_message(message)
    result = update_movement(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    still = [each for each in result.per_tensor if not each.moved]
    sparse = [
        each for each in result.per_tensor if each.moved and each.value_density < (at_least or 0)
    ]
    if still or sparse:
        movable = _movable(pair, still or sparse)
        text = not_updated(result, still, sparse, at_least, movable)
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_updated", at_least=at_least)
    return result


def _movable(pair: ModelPair, tensors: Sequence[Movement]) -> dict[float, float]:
    """Which share of the weights of `tensors` a step of a usual size can move, by its size."""
    try:
        shares = movable_shares(pair, [each.name for each in tensors], _STEP_SIZES)
    except SubnetError:  # the base has moved on since it was counted; the verdict stands
        return {}
    return dict(zip(_STEP_SIZES, shares, strict=False))


def assert_finite(
    pair: ModelPair,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> UpdateMovement:
    """Fail if either checkpoint holds NaN or Inf.

    Valid usages:
        assert_finite(pair)
        assert_finite(pair, exclude="*.masked_bias")            # a buffer that is -inf by design

    Args:
        pair: base and tuned.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        message: rewords a failure.

    Returns:
        What `update_movement` measured.

    Raises:
        AssertionError: an entry is not finite.
        SelectionError: a pattern matches nothing, nothing is left, or a selected tensor is of a
            dtype in which NaN and Inf are not counted (float8, complex).
        PairMismatchError: a selected tensor does not align.

    >>> assert_finite(pair).nonfinite_tuned
    0
    """
    __tracebackhide__ = True
    check_message(message)
    result = update_movement(pair, include=include, exclude=exclude, kinds=kinds)
    if result.nonfinite_base or result.nonfinite_tuned:
        raise AssertionError(reworded(not_finite(result), message))
    _refuse(
        [each for each in result.per_tensor if each.dtype.startswith(("float8", "complex"))],
        "NaN and Inf are not counted in",
    )
    return result


def _refuse(tensors: Sequence[Movement], why: str) -> None:
    """Raise if there are tensors of a dtype for which the question has no answer here."""
    if tensors:
        names = first_few([f"{each.name} ({each.dtype})" for each in tensors])
        raise SelectionError(
            f"{why} {plural(len(tensors), 'selected tensor')}: {names}; leave them out with "
            "exclude=, assert_frozen and assert_updated compare them by bits"
        )


def assert_max_change(
    pair: ModelPair,
    *,
    at_most: float,
    relative: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> UpdateMovement:
    """Fail if a tensor moved further than a cap.

    Valid usages:
        assert_max_change(pair, at_most=0.01)                     # no entry by more than 0.01
        assert_max_change(pair, at_most=0.05, relative=True)      # no tensor by more than 5 %

    Args:
        pair: base and tuned.
        at_most: the cap: on |tuned - base| of every entry, in weight units; with `relative` on the
            Frobenius norm of each tensor's change over that of its base.
        relative: which of the two.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        message: rewords a failure.

    Returns:
        What `update_movement` measured.

    Raises:
        AssertionError: a tensor moved further, or an entry is not finite and has no distance.
        SelectionError: a pattern matches nothing, nothing is left, or a selected tensor moved that
            is of a dtype without distances (integers, float8).
        PairMismatchError: a selected tensor does not align.
        ValueError: `at_most` negative or not finite.

    >>> assert_max_change(pair, at_most=0.5).max_change
    0.25
    """
    __tracebackhide__ = True
    check_limit("at_most", at_most)
    check_message(message)
    result = update_movement(pair, include=include, exclude=exclude, kinds=kinds)
    if result.nonfinite_base or result.nonfinite_tuned:
        raise AssertionError(reworded(not_finite(result), message))
    if (result.max_relative_change if relative else result.max_change) > at_most:
        raise AssertionError(reworded(too_far(result, at_most, relative=relative), message))
    _refuse(
        [each for each in result.per_tensor if each.updated and not each.has_distance],
        "no distance is known for the change of",
    )
    return result
