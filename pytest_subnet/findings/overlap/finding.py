"""Whether two updates moved the same entries (arXiv 2505.11711, Table 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    check_tolerance,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.chance import odds_ratio
from pytest_subnet.findings.common.fingerprints import of_masks
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.overlap.counts import (
    chance_of,
    columns,
    count_rows,
    no_exponents,
)
from pytest_subnet.findings.overlap.masks import two_masks
from pytest_subnet.findings.overlap.result import MaskOverlap, TensorOverlap
from pytest_subnet.findings.overlap.texts import (
    exponents_missing,
    identical,
    jaccard_above,
    jaccard_below,
    kappa_below,
    lift_below,
    near_chance,
    one_sided_below,
    saturated,
)
from pytest_subnet.recording import record
from pytest_subnet.text import nearest, safe, short_dtype

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_subnet.findings.overlap.masks import Masks, Source
    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.pairs.selection import Patterns

Null: TypeAlias = Literal["auto", "exponent", "matrix", "rowcol", "pooled"]

_NULLS = ("exponent", "matrix", "rowcol", "pooled")


def mask_overlap(
    a: Source,
    b: Source,
    *,
    null: Null | None = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> MaskOverlap:
    """Measure how far two masks cover the same entries, beside what chance alone gives.

    Chance keeps the number of entries of both masks in each stratum and draws which they are. In
    16-bit storage small weights flip in every run, so that two unrelated updates overlap far more
    than random sets of a matrix: strata by the exponent of the base weight take that out.

    Args:
        a: a mask, a mask file, or a pair, whose updated entries are meant.
        b: likewise, over tensors of the same names and shapes.
        null: what a stratum is. `"exponent"`: matrix, exponent of the base weight and whether its
            mantissa is zero. `"matrix"`: matrix. `"rowcol"`: matrix, keeping about how full rows
            and columns are. `"pooled"`: the whole model, as in the paper. `"auto"`: `"exponent"`
            where weights are in 16-bit storage, `"matrix"` otherwise. None: no chance at all.
        include: glob or globs on names; None takes all.
        exclude: glob or globs on names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).
        atol: for pairs: |tuned - base| <= atol counts as unchanged, in weight units.
        rtol: for pairs: likewise relative to the larger of |base| and |tuned|.

    Returns:
        The counts, in all and per tensor, and the lift under every null that can be had.

    Raises:
        PairMismatchError: the masks are one and the same, or cover other names or shapes; or
            `"exponent"` cannot be had: a mask carries no counts by exponent, or bases differ.
        SelectionError: a mask is empty, or nothing is selected.
        CheckpointError: a mask file cannot be read, or contradicts itself.
        ValueError: an unknown null, two tolerances, or one where neither is a pair.

    Source: arXiv 2505.11711, Table 4 and appendix E (there `"pooled"`).

    >>> from pytest_subnet import UpdateMask
    >>> a = UpdateMask.of({"weight": [[True, True, False], [False, False, False]]})
    >>> b = UpdateMask.of({"weight": [[False, True, True], [False, False, False]]})
    >>> mask_overlap(a, b)
    MaskOverlap(lift=1.5, kappa=0.25, jaccard=0.3333, one_sided=0.5/0.5, 1 in both, null='matrix')
    """
    tolerance = check_tolerance(atol, rtol)
    _check_null(null)
    masks = two_masks(a, b, tolerance, include=include, exclude=exclude, kinds=kinds)
    if null == "auto":
        null = "exponent" if masks.sixteen_bits() else "matrix"
    obstacle = no_exponents(masks)
    if null == "exponent" and obstacle is not None:
        raise PairMismatchError(exponents_missing(masks.label, obstacle))
    result = _measured(masks, null, exponents=obstacle is None)
    record(result)
    return result


def _measured(masks: Masks, null: str | None, *, exponents: bool) -> MaskOverlap:
    rows = count_rows(masks)
    numel, a, b, both = columns(rows)
    chances = {
        name: chance_of(name, masks, rows) for name in _NULLS if name != "exponent" or exponents
    }
    chance = chances[null or "matrix"]  # without a null, for its count of degenerate strata only
    by_tensor = chance.by_tensor.tolist()
    variances = chance.variance_by_tensor
    intersection = int(both.sum())
    apart = (numel, a, b, both)
    return MaskOverlap(
        null=null,
        a=_described(masks.a),
        b=_described(masks.b),
        dtype="+".join(sorted({short_dtype(row.dtype) for row in rows})),
        tensors_total=masks.total,
        numel=int(numel.sum()),
        count_a=int(a.sum()),
        count_b=int(b.sum()),
        intersection=intersection,
        expected=chance.expected if null else None,
        variance=chance.variance if null else None,
        ceiling=chance.ceiling if null else None,
        odds_ratio=_odds_ratio(null, *apart),
        lifts={
            name: intersection / each.expected for name, each in chances.items() if each.expected
        },
        pooled_expected=chances["pooled"].expected,
        strata=chance.strata,
        degenerate=chance.degenerate,
        nonfinite_a=masks.nonfinite_a,
        nonfinite_b=masks.nonfinite_b,
        per_tensor=tuple(
            TensorOverlap(
                *row,
                expected=by_tensor[index] if null else None,
                variance=float(variances[index]) if null and variances is not None else None,
            )
            for index, row in enumerate(rows)
        ),
        fingerprints=of_masks(masks.a.origin, masks.b.origin),
    )


def _described(mask: UpdateMask) -> str:
    origin = mask.origin
    what = safe(origin.what)
    return f"{what} ({safe(origin.tolerance)})" if origin.tolerance else what


def _odds_ratio(null: str | None, *counts: NDArray[np.int64]) -> float | None:
    """Over matrices: what lies in both masks at an exponent is not among a mask's counts."""
    if null == "pooled":
        counts = tuple(each.sum(keepdims=True) for each in counts)
    return odds_ratio(*counts) if null else None


def _check_null(null: object) -> None:
    if null is not None and null not in ("auto", *_NULLS):
        known = ", ".join(_NULLS)
        hint = nearest(null, _NULLS) if isinstance(null, str) else ""
        raise ValueError(
            f"null={safe(repr(null))} is none of {known}, auto and None (the bare number){hint}"
        )


def assert_mask_overlap(
    a: Source,
    b: Source,
    *,
    min_lift: float | None = None,
    min_kappa: float | None = None,
    min_jaccard: float | None = None,
    min_one_sided: float | None = None,
    max_jaccard: float | None = None,
    null: Null | None = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> MaskOverlap:
    """Fail unless two masks overlap as the bounds say, and by more than chance.

    `min_lift` and `min_kappa` are held against the null. `min_jaccard` and `min_one_sided` are
    shares that chance produces too: they fail as well where the null alone reaches the bound, or
    where the overlap is less than two standard deviations above what the null expects (z < 2; the
    null `"rowcol"` has no z). `max_jaccard` bounds the share as it is.

    Two unrelated runs have a lift of about 1 and a kappa of about 0, above as often as below: half
    of them pass `min_lift=1` and `min_kappa=0`, by luck. Bounds of use stand clear of that, beyond
    the interval that the message shows: `min_lift=1.2` or `min_kappa=0.1`, or more.

    Valid usages:
        assert_mask_overlap(run1, run2, min_lift=1.2)                   # beyond chance and rounding
        assert_mask_overlap(run1, run2, min_kappa=0.2)                  # comparable over densities
        assert_mask_overlap("a.safetensors", "b.safetensors", min_lift=1.5, null="matrix")
        assert_mask_overlap(run1, run2, min_one_sided=0.6, null=None)   # the paper's bare number
        assert_mask_overlap(maths, code, max_jaccard=0.1)               # two tasks stay apart

    Args:
        a: a mask, a mask file or a pair.
        b: likewise.
        min_lift: finite number of at least 0: intersection over what the null expects.
        min_kappa: fraction in [0, 1]: share of the way from chance to the most that is possible.
        min_jaccard: fraction in [0, 1]: entries in both over entries in either.
        min_one_sided: fraction in [0, 1], for both: entries in both over entries of a, and of b.
        max_jaccard: fraction in [0, 1].
        null: as in `mask_overlap`; None asserts the bare shares and knows no lift and no kappa.
        include: as in `mask_overlap`.
        exclude: as in `mask_overlap`.
        kinds: as in `mask_overlap`.
        atol: as in `mask_overlap`.
        rtol: as in `mask_overlap`.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        What `mask_overlap` measured.

    Raises:
        AssertionError: a bound does not hold, or chance alone would meet it.
        PairMismatchError: a lower bound where the masks are bit for bit the same, a run held
            against itself or a copy, unless `null=None`; or as in `mask_overlap`.
        SelectionError: a lower bound where the masks are saturated, full or empty in every
            stratum, so that nothing is left to chance; or as in `mask_overlap`.
        ValueError: no bound, one outside its range, `min_jaccard` above `max_jaccard`, or
            `min_lift` or `min_kappa` with `null=None`.

    Source: arXiv 2505.11711, Table 4; kappa and strata are not the paper's.

    >>> from pytest_subnet import UpdateMask
    >>> a = UpdateMask.of({"weight": [[True, True, False], [False, False, False]]})
    >>> b = UpdateMask.of({"weight": [[False, True, True], [False, False, False]]})
    >>> assert_mask_overlap(a, b, min_lift=1.2).intersection
    1
    """
    __tracebackhide__ = True
    _check_null(null)
    _check_bounds(min_lift, min_kappa, min_jaccard, min_one_sided, max_jaccard, null)
    check_message(message)
    result = mask_overlap(
        a, b, null=null, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    lower = (min_lift, min_kappa, min_jaccard, min_one_sided)
    if null and result.identical and not result.saturated and lower != (None,) * 4:
        raise PairMismatchError(identical(result))
    text = None
    if min_lift is not None and _beyond_chance(result, "min_lift", result.lift) < min_lift:
        text = lift_below(result, min_lift)
    elif min_kappa is not None and _beyond_chance(result, "min_kappa", result.kappa) < min_kappa:
        text = kappa_below(result, min_kappa)
    elif min_jaccard is not None and not _reaches(
        result, "min_jaccard", result.jaccard, result.jaccard_by_chance, min_jaccard
    ):
        text = jaccard_below(result, min_jaccard)
    elif min_one_sided is not None and not _reaches(
        result, "min_one_sided", result.one_sided, result.one_sided_by_chance, min_one_sided
    ):
        text = one_sided_below(result, min_one_sided)
    elif max_jaccard is not None and result.jaccard > max_jaccard:
        text = jaccard_above(result, max_jaccard)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous(
        "assert_mask_overlap",  # kappa can be below 0
        min_lift=min_lift,
        min_jaccard=min_jaccard,
        min_one_sided=min_one_sided,
        max_jaccard=max_jaccard,
    )
    return result


def _beyond_chance(result: MaskOverlap, bound: str, value: float | None) -> float:
    if result.saturated or value is None:
        raise SelectionError(saturated(result, bound))
    return value


def _reaches(
    result: MaskOverlap, name: str, share: float, by_chance: float | None, bound: float
) -> bool:
    """Whether the share reaches the bound, chance alone would not, and it is clear of chance."""
    if share < bound:
        return False
    if by_chance is None:
        return True
    return _beyond_chance(result, name, by_chance) < bound and not near_chance(result)


def _check_bounds(
    min_lift: float | None,
    min_kappa: float | None,
    min_jaccard: float | None,
    min_one_sided: float | None,
    max_jaccard: float | None,
    null: Null | None,
) -> None:
    beyond = {"min_lift": min_lift, "min_kappa": min_kappa}
    shares = {
        "min_kappa": min_kappa,
        "min_jaccard": min_jaccard,
        "min_one_sided": min_one_sided,
        "max_jaccard": max_jaccard,
    }
    if all(value is None for value in (min_lift, *shares.values())):
        names = ", ".join(["min_lift", *shares])
        raise ValueError(f"no bound: give one of {names}, or the assertion says nothing")
    if min_lift is not None:
        check_limit("min_lift", min_lift)
    for name, value in shares.items():
        if value is not None:
            check_fraction(name, value)
    if min_jaccard is not None and max_jaccard is not None and min_jaccard > max_jaccard:
        raise ValueError(
            f"min_jaccard={min_jaccard!r} is above max_jaccard={max_jaccard!r}: nothing can hold"
        )
    for name, value in beyond.items():
        if value is not None and null is None:
            raise ValueError(
                f"{name}={value!r} is held against chance, and null=None names none; name one, or "
                "bound min_jaccard or min_one_sided"
            )
