"""Where in its matrices an update lies: off the principal entries, on the small ones?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    check_tolerance,
)
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.geometry.counts import (
    MASKS,
    CountUpdate,
    chance_of,
    part_name,
    parts_in,
)
from pytest_subnet.findings.geometry.masks import entries_chosen
from pytest_subnet.findings.geometry.result import (
    ROUNDING,
    MaskShare,
    TensorGeometry,
    UpdateGeometry,
)
from pytest_subnet.findings.geometry.texts import (
    low_by_luck,
    not_judged,
    nothing_updated,
    principal_by_luck,
    too_little_low,
    too_principal,
)
from pytest_subnet.findings.matrices.fused import WHOLE
from pytest_subnet.findings.matrices.work import choose_matrices, measure_matrices
from pytest_subnet.findings.overlap.texts import exponents_missing
from pytest_subnet.recording import record
from pytest_subnet.text import first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.geometry.counts import MatrixCounts
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

GeometryNull: TypeAlias = Literal["exponent", "matrix", "rowcol", "pooled"]

_NULLS = ("exponent", "matrix", "rowcol", "pooled")


def update_geometry(
    pair: ModelPair,
    *,
    fraction: float = 0.3,
    rank: int = 64,
    null: GeometryNull | None = "exponent",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> UpdateGeometry:
    """Measure which share of an update lies in principal entries, and which in small ones.

    Of each matrix of the base, *principal* are the `fraction` of its entries that are largest in
    its best approximation of rank `rank`; *low-magnitude* the `fraction` that are smallest. Both
    shares are given beside what chance expects, as in `mask_overlap`, and what rounding does: an
    update without structure, N(0, s²) in every entry, of the energy that was observed, stored in 16
    bits, changes a weight with a probability that only its gap to its neighbours and s decide
    (`erfc(gap / (2 √2 s))`). In bfloat16 that alone puts 55 to 76 % of a sparse update into the
    smallest 30 % of the weights, and less than 30 % into the principal ones. Fused matrices are
    taken apart by the model's config first.

    Args:
        pair: base and tuned; matrices are read one at a time and worked on where the pair's device
            is. What is principal is kept by the content of the base.
        fraction: of each matrix's entries, in (0, 1); 0.3 is that of arXiv 2606.07082.
        rank: from 1 to min(m, n) of every matrix, or part of a fused one; the papers' is not known.
        null: what chance keeps fixed, as in `mask_overlap`: `"exponent"` (16-bit storage only),
            `"matrix"`, `"rowcol"` or `"pooled"`. None: no chance, the bare shares.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).
        atol: |tuned - base| <= atol counts as unchanged, in weight units.
        rtol: likewise relative to the larger of |base| and |tuned|.

    Returns:
        Both shares, in all and for each matrix, and the lift under every null that can be had.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, one has fewer rows or
            columns than `rank` or no entry in its masks, holds NaN or Inf or, in the base, zeros
            alone, or is of a dtype without arithmetic; or nothing is updated.
        PairMismatchError: a selected tensor does not align, or `"exponent"` cannot be had.
        TypeError: `fraction` is no number, or `rank` no integer.
        ValueError: `fraction` outside (0, 1), `rank` below 1, an unknown null, or two tolerances.

    Source: arXiv 2511.08567, section 4 (principal weights and low-magnitude weights); what rounding
    does is ours.

    >>> update_geometry(pair, fraction=0.25, rank=2, include="*up_proj*", null=None)
    UpdateGeometry(principal=100.00%, low_magnitude=100.00%, 1 matrix, null=None)
    """
    tolerance = check_tolerance(atol, rtol)
    _check_masks(fraction, rank)
    _check_null(null)
    chosen = choose_matrices(pair, include, exclude, kinds, what="principal entries")
    _check_sizes(pair, chosen.matrices, fraction, rank)
    rows = measure_matrices(pair, chosen.matrices, CountUpdate(float(fraction), rank, tolerance))
    counted = [part for parts in rows for part in parts]
    if not any(each.updated.any() for each in counted):
        raise SelectionError(nothing_updated(pair.label))
    obstacle = _no_exponents(counted)
    if null == "exponent" and obstacle is not None:
        raise PairMismatchError(exponents_missing(pair.label, obstacle))
    nulls = [each for each in _NULLS if each != "exponent" or obstacle is None]
    shares = [_shares(counted, mask, null, nulls) for mask in range(len(MASKS))]
    (principal, *principals), (low, *lows) = shares
    result = UpdateGeometry(
        null=null,
        fraction=float(fraction),
        rank=rank,
        pair=pair.label,
        tolerance=str(tolerance),
        matrices_total=chosen.total,
        notes=(*chosen.notes, *_taken_whole(pair, chosen.matrices)),
        principal=principal,
        low_magnitude=low,
        per_tensor=tuple(
            TensorGeometry(*each[:5], principal=of_principal, low_magnitude=of_low)
            for each, of_principal, of_low in zip(counted, principals, lows, strict=True)
        ),
        fingerprints=of_pair(pair),
    )
    record(result)
    return result


def _shares(
    counted: Sequence[MatrixCounts], mask: int, null: str | None, nulls: Sequence[str]
) -> list[MaskShare]:
    """The update against one of `MASKS`: in all, then for each matrix."""
    chances = {name: chance_of(name, counted, mask) for name in nulls}
    chance = chances.get(null or "")
    rounding = [each.by_rounding(mask) for each in counted]
    matrices = []
    for row, (each, by_rounding) in enumerate(zip(counted, rounding, strict=True)):
        both = int(each.both[mask])
        expected = {name: float(found.by_tensor[row]) for name, found in chances.items()}
        variances = None if chance is None else chance.variance_by_tensor
        matrices.append(
            MaskShare(
                numel=each.numel,
                updated=int(each.updated.sum()),
                members=int(each.members[mask].sum()),
                both=both,
                expected=None if null is None else expected[null],
                variance=None if variances is None else float(variances[row]),
                expected_by_rounding=by_rounding,
                lifts=_lifts(both, expected, by_rounding),
            )
        )
    both = sum(each.both for each in matrices)
    of_rounding = _in_all(matrices)
    in_all = MaskShare(
        numel=sum(each.numel for each in matrices),
        updated=sum(each.updated for each in matrices),
        members=sum(each.members for each in matrices),
        both=both,
        expected=None if chance is None else chance.expected,
        variance=None if chance is None else chance.variance,
        expected_by_rounding=of_rounding,
        lifts=_lifts(both, {name: each.expected for name, each in chances.items()}, of_rounding),
    )
    return [in_all, *matrices]


def _lifts(both: int, expected: dict[str, float], by_rounding: float | None) -> dict[str, float]:
    everything = {**expected, ROUNDING: by_rounding or 0.0}
    return {name: both / each for name, each in everything.items() if each}


def _in_all(matrices: Sequence[MaskShare]) -> float | None:
    """What rounding puts into a mask of all matrices; what is not rounded is spread evenly."""
    moved = [each for each in matrices if each.updated]
    if all(each.expected_by_rounding is None for each in moved):
        return None
    return sum(
        each.updated * each.of_entries
        if each.expected_by_rounding is None
        else each.expected_by_rounding
        for each in moved
    )


def _check_masks(fraction: float, rank: int) -> None:
    check_fraction("fraction", fraction)
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction={fraction!r} is not between 0 and 1, both excluded: a mask of nothing or of "
            "everything says nothing"
        )
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank={safe(repr(rank))} is not an integer")
    if rank < 1:
        raise ValueError(f"rank={rank} is below 1: the part of a matrix of rank 0 is nothing")


def _check_null(null: object) -> None:
    if null is not None and null not in _NULLS:
        hint = nearest(null, _NULLS) if isinstance(null, str) else ""
        raise ValueError(
            f"null={safe(repr(null))} is none of {', '.join(_NULLS)} and None (the bare number)"
            f"{hint}"
        )


def _check_sizes(pair: ModelPair, matrices: Sequence[Matrix], fraction: float, rank: int) -> None:
    """Raise where a mask of a matrix would not be what it says, or have no entry."""
    parts = [
        (part_name(pair.tensors[each.row], each, part), part.shape(each.shape))
        for each in matrices
        for part in parts_in(pair, each) or (WHOLE,)
    ]
    small = {name: shape for name, shape in parts if min(shape) < rank}
    if small:
        raise SelectionError(
            f"rank={rank} is above the rows or columns of {plural(len(small), 'selected matrix')} "
            f"({first_few(list(small))}); pass one of at most {min(map(min, small.values()))}, or "
            "leave them out with exclude="
        )
    empty = [name for name, shape in parts if not entries_chosen(math.prod(shape), fraction)]
    if empty:
        raise SelectionError(
            f"fraction={fraction!r} chooses no entry of {plural(len(empty), 'selected matrix')} "
            f"({first_few(empty)}); pass a larger one, or leave them out with exclude="
        )


def _taken_whole(pair: ModelPair, matrices: Sequence[Matrix]) -> list[str]:
    """What is said of fused matrices that cannot be taken apart."""
    whole = [pair.tensors[each.row].name for each in matrices if parts_in(pair, each) is None]
    if not whole:
        return []
    return [
        f"{plural(len(whole), 'fused matrix')} measured as a whole, such as {safe(whole[0])}: the "
        "config does not say how it is made up"
    ]


def _no_exponents(counted: Sequence[MatrixCounts]) -> str | None:
    """Why the exponent null cannot be had; None if it can."""
    if any(each.by_exponent for each in counted):
        return None
    dtypes = ", ".join(dict.fromkeys(each.dtype for each in counted))
    return f"it is for weights in 16-bit storage, and these are {dtypes}"


def assert_off_principal(
    pair: ModelPair,
    *,
    max_principal_lift: float | None = None,
    min_low_magnitude_lift: float | None = None,
    fraction: float = 0.3,
    rank: int = 64,
    null: GeometryNull | None = "exponent",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateGeometry:
    """Fail unless an update avoids principal entries, or prefers small ones, beyond rounding.

    A lift is the share of the update in a mask over the share that would be there otherwise: by
    chance under `null`, and by rounding alone; both have to meet the bound. (Of small entries
    `"exponent"` leaves next to nothing to chance, and the bound is held against rounding there.) An
    update without structure has 1 for each, so that `max_principal_lift` is below 1 and
    `min_low_magnitude_lift` above. A share that is not two standard deviations beyond chance fails
    too: one of luck, or of an update of uneven size, which the estimate of rounding does not know.

    That is a stricter claim than the papers make. They hold the shares against `fraction`, which
    updates without any structure meet as well once they are rounded to bfloat16: of normal noise,
    at the densities published for SFT, distillation and RL, 32, 54 and 76 % lie in the smallest
    30 % of the weights, where 31.88, 53.59 and 73.48 % were published. `null=None` asserts that
    bare lift.

    Valid usages:
        assert_off_principal(pair, max_principal_lift=0.9)                  # beyond rounding
        assert_off_principal(pair, max_principal_lift=0.9, min_low_magnitude_lift=1.1)
        assert_off_principal(pair, min_low_magnitude_lift=1.5, null=None)   # the papers' number

    Args:
        pair: base and tuned.
        max_principal_lift: at least 0 and, with a null, below 1.
        min_low_magnitude_lift: finite and, with a null, above 1.
        fraction: as in `update_geometry`.
        rank: as in `update_geometry`.
        null: as in `update_geometry`; None holds the shares against those of all entries.
        include: as in `update_geometry`.
        exclude: as in `update_geometry`.
        kinds: as in `update_geometry`.
        atol: as in `update_geometry`.
        rtol: as in `update_geometry`.
        message: rewords a failure.

    Returns:
        What `update_geometry` measured.

    Raises:
        AssertionError: a lift does not meet its bound, or chance explains the share (|z| < 2).
        SelectionError: the null leaves nothing to chance in a mask that is bounded; or as in
            `update_geometry`.
        PairMismatchError: as in `update_geometry`.
        ValueError: no bound, or one that an update without structure meets; or as in
            `update_geometry`.
        TypeError: as in `update_geometry`.

    Source: arXiv 2511.08567, section 4; the published shares: arXiv 2606.07082 (31.88, 53.59 and
    73.48 % at update densities of 92.73, 46.28 and 27.76 %, with 30 % of the weights). Nulls and
    the precision gate are ours.

    >>> assert_off_principal(
    ...     pair, max_principal_lift=4.0, fraction=0.25, rank=2, include="*up_proj*", null=None
    ... ).principal.share
    1.0
    """
    __tracebackhide__ = True
    _check_null(null)
    _check_bounds(max_principal_lift, min_low_magnitude_lift, null)
    check_message(message)
    result = update_geometry(
        pair,
        fraction=fraction,
        rank=rank,
        null=null,
        include=include,
        exclude=exclude,
        kinds=kinds,
        atol=atol,
        rtol=rtol,
    )
    text = None
    if max_principal_lift is not None:
        lift = _judged(result, "max_principal_lift", result.principal_lift)
        too_high = lift > max_principal_lift
        text = too_principal(result, max_principal_lift) if too_high else principal_by_luck(result)
    if min_low_magnitude_lift is not None and text is None:
        is_open = null != "exponent" or result.low_magnitude.z is not None
        found = result.low_magnitude_lift if is_open else None
        lift = _judged(result, "min_low_magnitude_lift", found)
        too_low = lift < min_low_magnitude_lift
        text = too_little_low(result, min_low_magnitude_lift) if too_low else low_by_luck(result)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def _judged(result: UpdateGeometry, bound: str, lift: float | None) -> float:
    if lift is None:
        raise SelectionError(not_judged(result, bound))
    return lift


def _check_bounds(highest: float | None, lowest: float | None, null: str | None) -> None:
    if highest is None and lowest is None:
        raise ValueError(
            "no bound: give one of max_principal_lift, min_low_magnitude_lift, or the assertion "
            "says nothing"
        )
    for name, value in (("max_principal_lift", highest), ("min_low_magnitude_lift", lowest)):
        if value is not None:
            check_limit(name, value)
    if null is None:
        return
    for name, value, empty, side in (
        ("max_principal_lift", highest, highest is not None and highest >= 1, "below"),
        ("min_low_magnitude_lift", lowest, lowest is not None and lowest <= 1, "above"),
    ):
        if empty:
            raise ValueError(
                f"{name}={value!r} is no claim beyond the null, under which an update without "
                f"structure has a lift of 1; give one {side} 1, or null=None for the bare number"
            )
