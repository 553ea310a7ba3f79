"""What moved and what did not: frozen parts, trained parts, structure, ties, size of the change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.findings.bounds import check_fraction, check_limit
from pytest_subnet.findings.result import (
    WORST,
    Coverage,
    Message,
    Movement,
    cover,
    measure,
    reworded,
)
from pytest_subnet.pairs.selection import Selection, select
from pytest_subnet.recording import record
from pytest_subnet.scan.locating import first_difference
from pytest_subnet.scan.tolerance import Tolerance
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, percent_against, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

_MANTISSA_BITS = {"bfloat16": 8, "float16": 11}


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
        return sum(each.numel for each in self.per_tensor)

    @property
    def updated(self) -> int:
        """Entries updated under the tolerance."""
        return sum(each.updated for each in self.per_tensor)

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
                "max change": f"{each.max_change:.3g}",
                "relative": f"{each.relative_change:.3g}",
                "not finite": f"{each.nonfinite_base + each.nonfinite_tuned:,}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["entries", "updated", "max change", "relative", "not finite"]
        return f"{facts(repr(self), self.coverage.rows())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "update_movement",
            "moved": self.moved,
            "updated": self.updated,
            "nonfinite_base": self.nonfinite_base,
            "nonfinite_tuned": self.nonfinite_tuned,
            "max_change": self.max_change,
            "max_relative_change": _finite_or_none(self.max_relative_change),
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"UpdateMovement(moved={self.moved:,} of {plural(len(self.per_tensor), 'tensor')}, "
            f"updated={self.updated:,} of {self.numel:,}, max_change={self.max_change:.3g}, "
            f"{self.coverage.tolerance}, {self.coverage.dtype})"
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


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

    >>> update_movement(pair, include="*up_proj*").moved
    1
    """
    tolerance = Tolerance(atol, rtol)
    selection = select(pair, include, exclude, kinds)
    rows = tuple(sorted((*selection.rows, *selection.apart)))
    result = UpdateMovement(
        cover(pair, Selection(rows, ()), tolerance), measure(pair, rows, tolerance)
    )
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
        AssertionError: a selected tensor moved; names the first entry that did.
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.

    >>> assert_frozen(pair, "*norm*").updated
    0
    """
    __tracebackhide__ = True
    result = update_movement(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    if result.moved:
        raise AssertionError(reworded(_not_frozen(pair, result), message))
    return result


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

    A zero that only changed its sign did not move.

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
        ValueError: `at_least` outside [0, 1].

    >>> assert_updated(pair, "*up_proj*", at_least=0.05).moved
    1
    """
    __tracebackhide__ = True
    check_fraction("at_least", at_least)
    result = update_movement(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    still = [each for each in result.per_tensor if _value_changes(each) <= 0]
    sparse = [each for each in result.per_tensor if each.density < (at_least or 0)]
    if still or sparse:
        raise AssertionError(reworded(_not_updated(result, still, sparse, at_least), message))
    return result


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
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.

    >>> assert_finite(pair).nonfinite_tuned
    0
    """
    __tracebackhide__ = True
    result = update_movement(pair, include=include, exclude=exclude, kinds=kinds)
    if result.nonfinite_base or result.nonfinite_tuned:
        raise AssertionError(reworded(_not_finite(result), message))
    return result


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
        SelectionError: a pattern matches nothing, or nothing is left.
        PairMismatchError: a selected tensor does not align.
        ValueError: `at_most` negative or not finite.

    >>> assert_max_change(pair, at_most=0.5).max_change
    0.25
    """
    __tracebackhide__ = True
    check_limit("at_most", at_most)
    result = update_movement(pair, include=include, exclude=exclude, kinds=kinds)
    if result.nonfinite_base or result.nonfinite_tuned:
        raise AssertionError(reworded(_not_finite(result), message))
    if (result.max_relative_change if relative else result.max_change) > at_most:
        raise AssertionError(reworded(_too_far(result, at_most, relative), message))
    return result


def _value_changes(tensor: Movement) -> int:
    return tensor.updated - tensor.zero_sign_flips if tensor.max_change == 0 else tensor.updated


def _not_frozen(pair: ModelPair, result: UpdateMovement) -> str:
    moved = sorted(
        (each for each in result.per_tensor if each.updated), key=lambda each: -each.density
    )
    rows = {tensor.name: row for row, tensor in enumerate(pair.tensors)}
    where = first_difference(pair, rows[moved[0].name])
    first = f"{safe(moved[0].name)}{where}" if where else safe(moved[0].name)
    return facts(
        f"{len(moved):,} of {plural(len(result.per_tensor), 'frozen tensor')} moved",
        [
            *result.coverage.rows(),
            ("updated", f"{result.updated:,} / {result.numel:,}"),
            *_worst(
                moved,
                lambda each: f"{each.updated:,} / {each.numel:,}, by up to {each.max_change:.3g}",
            ),
            ("first", first),
            ("usually", "weight decay on zero gradients, optimiser state from before freezing, or a"),
            ("", "tie to a tensor that is trained"),
            ("to accept", "leave the tensors out with exclude=, or allow a drift with atol="),
        ],
    )


def _not_updated(
    result: UpdateMovement, still: list[Movement], sparse: list[Movement], bound: float | None
) -> str:
    total = plural(len(result.per_tensor), "tensor")
    lines = [
        *result.coverage.rows(),
        ("updated", f"{result.updated:,} / {result.numel:,}   in {result.moved:,} of {total}"),
    ]
    if still:
        verdict = f"{len(still):,} of {total} did not move"
        lines += _worst(still, lambda each: f"0 / {each.numel:,}")
    else:
        sparse = sorted(sparse, key=lambda each: each.density)
        value, required = percent_against(sparse[0].density, bound or 0)
        verdict = f"{len(sparse):,} of {total} moved too little: {value}, required {required}"
        lines += _worst(sparse, lambda each: f"{percent(each.density)} updated")
    hint = _resolution((still or sparse)[0])
    return facts(
        verdict,
        [
            *lines,
            *([("resolution", hint)] if hint else []),
            ("usually", "no gradient reaches them, the optimiser does not own them, or each step is"),
            ("", "smaller than the storage dtype resolves"),
            ("to accept", "leave the tensors out with exclude="),
        ],
    )


def _resolution(tensor: Movement) -> str | None:
    """What a step must exceed to be stored at the size these weights have."""
    bits = _MANTISSA_BITS.get(tensor.dtype)
    size = tensor.base_norm / math.sqrt(tensor.numel)
    if bits is None or size == 0:
        return None
    half_step = 2.0 ** (math.floor(math.log2(size)) - bits)
    return (
        f"at |w| = {size:.2g} a step below {half_step:.1g} is rounded away in "
        f"{short_dtype(tensor.dtype)} unless float32 masters add steps up"
    )


def _not_finite(result: UpdateMovement) -> str:
    bad = sorted(
        (each for each in result.per_tensor if each.nonfinite_base + each.nonfinite_tuned),
        key=lambda each: (-each.nonfinite_tuned, -each.nonfinite_base),
    )
    count = plural(result.nonfinite_tuned, "entry")
    return facts(
        f"{count} NaN or Inf in tuned, {result.nonfinite_base:,} in base",
        [
            *result.coverage.rows(),
            *_worst(
                bad, lambda each: f"{each.nonfinite_tuned:,} tuned, {each.nonfinite_base:,} base"
            ),
            ("usually", "a diverged run, or a cast to a dtype with a smaller range (bf16 to f16)"),
            ("to accept", "leave the tensors out with exclude="),
        ],
    )


def _too_far(result: UpdateMovement, bound: float, relative: bool) -> str:
    def change(each: Movement) -> float:
        return each.relative_change if relative else each.max_change

    worst = sorted(result.per_tensor, key=lambda each: -change(each))
    what = "relative change" if relative else "largest change"
    beyond = sum(change(each) > bound for each in worst)
    return facts(
        f"{what} {change(worst[0]):.6g} is above the allowed {bound:.6g}",
        [
            *result.coverage.rows(),
            ("beyond", f"{beyond:,} of {plural(len(worst), 'tensor')}"),
            *_worst(worst, lambda each: f"{change(each):.3g}"),
            ("usually", "a learning rate too high, or a tensor that was initialised again"),
            ("to accept", f"at_most={change(worst[0]):.2g} or leave the tensor out with exclude="),
        ],
    )


def _worst(tensors: Sequence[Movement], number: Callable[[Movement], str]) -> list[tuple[str, str]]:
    lines = [
        ("" if i else "worst", f"{number(each)}  {each.spell()}")
        for i, each in enumerate(tensors[:WORST])
    ]
    hidden = len(tensors) - WORST
    return [*lines, ("", f"… {hidden:,} more")] if hidden > 0 else lines
