"""Whether a part of a model's weights is enough for what it does, and needed for it."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_message
from pytest_subnet.findings.common.result import reworded
from pytest_subnet.findings.subnetworks.result import (
    FILLS,
    SubnetworkNecessity,
    SubnetworkSufficiency,
)
from pytest_subnet.findings.subnetworks.scoring import scored
from pytest_subnet.findings.subnetworks.texts import (
    as_good_by_chance,
    by_construction,
    insufficient,
    unnecessary,
)
from pytest_subnet.recording import record
from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    from pytest_subnet.findings.common.result import Message
    from pytest_subnet.findings.subnetworks.scoring import Evaluate, Models
    from pytest_subnet.masks.update_mask import UpdateMask

Fill: TypeAlias = Literal["base", "zero", "mean"]


def subnetwork_sufficiency(
    pair: Models,
    mask: UpdateMask,
    evaluate: Evaluate,
    *,
    fill: Fill = "base",
    controls: int = 19,
    seed: int = 0,
) -> SubnetworkSufficiency:
    """Measure what the tuned model scores when all that the mask covers is filled outside it.

    Three claims, by `fill`. `"base"`: the update at the mask's entries is enough, the rest of it
    undone. `"zero"`: the entries themselves are enough, as a circuit, all others zero. `"mean"`:
    likewise with the others at the mean of their tensor, which keeps its scale. None implies
    another.

    What the mask does not cover at all (often embeddings and norms) stays as tuned; the notes of
    the result say what that is. A score that random subnetworks reach too is no evidence, so it
    comes with those of `controls` random masks with as many entries in each tensor.

    Args:
        pair: `causal_lm_pair`, or base and tuned as two modules. The tuned one is written to in
            place where it is, and put back to the bit before this returns, also when `evaluate`
            raises or is interrupted.
        mask: over tensors of the model; a live model's fused experts may be a matrix an expert in
            it.
        evaluate: called with the tuned module; gives a finite number, higher is better, and the
            same one for the same weights: that is tried once. The random state of torch, numpy and
            Python is left to it: nothing here sets it or draws from it.
        fill: `"base"`, `"zero"` or `"mean"`.
        controls: how many random masks are scored; 0 for none. `evaluate` is called 5 times more.
        seed: of the random masks, at least 0.

    Returns:
        The scores, and the exact p-value of the subnetwork's rank among random ones.

    Raises:
        SelectionError: the mask is empty or full, leaves chance no choice, or a tensor cannot be
            filled so.
        PairMismatchError: the mask is of another model or base, or base and tuned are one model or
            share memory that would be written to.
        SubnetError: `evaluate` gave no finite number, another one for the same weights, or wrote to
            the weights.
        TypeError: an argument is something else.
        ValueError: an unknown `fill`, or negative `controls` or `seed`.

    Source: arXiv 2504.15471, section 4 (`"zero"`); arXiv 2505.11711, section 4 (`"base"`).

    >>> base, tuned = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    >>> base.load_state_dict({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> tuned.load_state_dict({"weight": torch.tensor([[9.0, 1, 1, 1]]), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> mask = UpdateMask.of({"weight": [[True, False, False, False]]})
    >>> subnetwork_sufficiency((base, tuned), mask, lambda model: model.weight.sum(), controls=3)
    SubnetworkSufficiency(subnetwork=9, full=12, p_value=..., fill='base', 1 of 4 in the mask)
    """
    result = _sufficiency(pair, mask, evaluate, fill, controls, seed)
    record(result)
    return result


def subnetwork_necessity(
    pair: Models,
    mask: UpdateMask,
    evaluate: Evaluate,
    *,
    fill: Fill = "base",
    controls: int = 19,
    seed: int = 0,
) -> SubnetworkNecessity:
    """Measure how far the tuned model's score drops when the mask's entries are filled.

    Three claims, by `fill`. `"base"`: the model needs the update at the mask's entries. `"zero"`:
    it needs the entries themselves. `"mean"`: it needs how they differ from the mean of their
    tensor. The drop comes with those of random masks with as many entries in each tensor. Where
    most of what these draw holds the filling already, as with `"base"` and a sparse update, they
    are a weak control: a note of the result says so, with both numbers.

    Args:
        pair: as in `subnetwork_sufficiency`.
        mask: likewise.
        evaluate: likewise.
        fill: likewise.
        controls: likewise.
        seed: likewise.

    Returns:
        The scores, `.drop`, and the exact p-value of its rank among the drops of random ones.

    Raises:
        SelectionError: as in `subnetwork_sufficiency`.
        PairMismatchError: likewise.
        SubnetError: likewise.
        TypeError: likewise.
        ValueError: likewise.

    Source: arXiv 2504.15471, section 4 (there zeros, and the rise of the loss).

    >>> base, tuned = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    >>> base.load_state_dict({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> tuned.load_state_dict({"weight": torch.tensor([[9.0, 1, 1, 1]]), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> mask = UpdateMask.of({"weight": [[True, False, False, False]]})
    >>> subnetwork_necessity((base, tuned), mask, lambda model: model.weight.sum(), controls=0)
    SubnetworkNecessity(drop=9, complement=3, full=12, p_value=None, fill='base', 1 of 4 in ...)
    """
    result = _necessity(pair, mask, evaluate, fill, controls, seed)
    record(result)
    return result


def assert_subnetwork_sufficient(
    pair: Models,
    mask: UpdateMask,
    evaluate: Evaluate,
    *,
    min_score: float,
    fill: Fill = "base",
    controls: int = 19,
    seed: int = 0,
    alpha: float = 0.05,
    message: Message | None = None,
) -> SubnetworkSufficiency:
    """Fail unless a subnetwork scores enough without the rest, and more than random ones do.

    Valid usages:
        assert_subnetwork_sufficient(pair, mask, accuracy, min_score=0.9)  # of the update
        assert_subnetwork_sufficient(pair, mask, accuracy, min_score=0.9, fill="zero")  # a circuit
        assert_subnetwork_sufficient(pair, mask, accuracy, min_score=0.9, controls=0)  # bare number

    Args:
        pair: as in `subnetwork_sufficiency`.
        mask: likewise.
        evaluate: likewise.
        min_score: any finite number, in the units of `evaluate`.
        fill: as in `subnetwork_sufficiency`, which says what each claims.
        controls: random masks that the score is held against; 0 asserts the bare score.
        seed: of the random masks.
        alpha: the largest p-value of the subnetwork's rank among them that passes.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        What `subnetwork_sufficiency` measured.

    Raises:
        AssertionError: the score is below `min_score`, or random subnetworks do as well.
        SelectionError: as in `subnetwork_sufficiency`; or filling outside the mask changes nothing,
            so that the score is that of the tuned model, unless `controls=0`.
        PairMismatchError: as in `subnetwork_sufficiency`.
        SubnetError: likewise.
        TypeError: likewise.
        ValueError: likewise; or a bound outside its range, or too few `controls` for `alpha`.

    Source: arXiv 2504.15471, section 4 (r > .95), whose controls show that a score alone is weak
    evidence.

    >>> base, tuned = torch.nn.Linear(400, 1), torch.nn.Linear(400, 1)
    >>> _ = base.load_state_dict({"weight": torch.zeros(1, 400), "bias": torch.zeros(1)})
    >>> _ = tuned.load_state_dict({"weight": torch.eye(400)[:1] + 0.1, "bias": torch.zeros(1)})
    >>> mask = UpdateMask.of({"weight": torch.eye(400)[:1]})
    >>> assert_subnetwork_sufficient(
    ...     (base, tuned), mask, lambda model: model.weight.sum(), min_score=1
    ... ).p_value
    0.05
    """
    __tracebackhide__ = True
    _check_finite("min_score", min_score)
    _check_test(fill, controls, seed, alpha, message)
    result = _sufficiency(pair, mask, evaluate, fill, controls, seed)
    if controls and not result.replaced_outside:
        raise SelectionError(by_construction(result))
    record(result)
    text = None
    if result.subnetwork < min_score:
        text = insufficient(result, min_score)
    elif result.p_value is not None and result.p_value > alpha:
        text = as_good_by_chance(result, alpha)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def assert_subnetwork_necessary(
    pair: Models,
    mask: UpdateMask,
    evaluate: Evaluate,
    *,
    min_drop: float,
    fill: Fill = "base",
    controls: int = 19,
    seed: int = 0,
    alpha: float = 0.05,
    message: Message | None = None,
) -> SubnetworkNecessity:
    """Fail unless the score drops without a subnetwork, by more than without random ones.

    Valid usages:
        assert_subnetwork_necessary(pair, mask, accuracy, min_drop=0.1)               # the update
        assert_subnetwork_necessary(pair, mask, accuracy, min_drop=0.1, fill="zero")  # the entries
        assert_subnetwork_necessary(pair, mask, accuracy, min_drop=0.1, controls=0)   # bare number

    Args:
        pair: as in `subnetwork_sufficiency`.
        mask: likewise.
        evaluate: likewise.
        min_drop: finite number above 0, in the units of `evaluate`.
        fill: as in `subnetwork_necessity`, which says what each claims.
        controls: random masks that the drop is held against; 0 asserts the bare drop.
        seed: of the random masks.
        alpha: the largest p-value of the drop's rank among theirs that passes.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        What `subnetwork_necessity` measured.

    Raises:
        AssertionError: the drop is below `min_drop`, or random subnetworks cost as much.
        SelectionError: as in `subnetwork_sufficiency`.
        PairMismatchError: likewise.
        SubnetError: likewise.
        TypeError: likewise.
        ValueError: likewise; or a bound outside its range, or too few `controls` for `alpha`.

    Source: arXiv 2504.15471, section 4 (there without a threshold).

    >>> base, tuned = torch.nn.Linear(400, 1), torch.nn.Linear(400, 1)
    >>> _ = base.load_state_dict({"weight": torch.zeros(1, 400), "bias": torch.zeros(1)})
    >>> _ = tuned.load_state_dict({"weight": torch.eye(400)[:1] + 0.1, "bias": torch.zeros(1)})
    >>> mask = UpdateMask.of({"weight": torch.eye(400)[:1]})
    >>> assert_subnetwork_necessary(
    ...     (base, tuned), mask, lambda model: model.weight.sum(), min_drop=1
    ... ).p_value
    0.05
    """
    __tracebackhide__ = True
    _check_finite("min_drop", min_drop)
    if min_drop <= 0:
        raise ValueError(
            f"min_drop={min_drop!r} is not above 0: a subnetwork that nothing depends on would pass"
        )
    _check_test(fill, controls, seed, alpha, message)
    result = _necessity(pair, mask, evaluate, fill, controls, seed)
    record(result)
    text = None
    if result.drop < min_drop:
        text = unnecessary(result, min_drop)
    elif result.p_value is not None and result.p_value > alpha:
        text = as_good_by_chance(result, alpha)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def _sufficiency(
    pair: Models, mask: UpdateMask, evaluate: Evaluate, fill: Fill, controls: int, seed: int
) -> SubnetworkSufficiency:
    _check(fill, controls, seed)
    return scored(
        SubnetworkSufficiency,
        pair,
        mask,
        evaluate,
        fill=fill,
        controls=controls,
        seed=seed,
        random_outside=True,
    )


def _necessity(
    pair: Models, mask: UpdateMask, evaluate: Evaluate, fill: Fill, controls: int, seed: int
) -> SubnetworkNecessity:
    _check(fill, controls, seed)
    return scored(
        SubnetworkNecessity,
        pair,
        mask,
        evaluate,
        fill=fill,
        controls=controls,
        seed=seed,
        random_outside=False,
    )


def _check(fill: object, controls: object, seed: object) -> None:
    if not isinstance(fill, str) or fill not in FILLS:
        hint = nearest(fill, FILLS) if isinstance(fill, str) else ""
        raise ValueError(f"fill={safe(repr(fill))} is none of {', '.join(FILLS)}{hint}")
    for name, value in (("controls", controls), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={safe(repr(value))} is not a whole number")
        if value < 0:
            raise ValueError(f"{name}={value!r} is not a whole number of at least 0")


def _check_test(fill: object, controls: int, seed: int, alpha: float, message: object) -> None:
    """Raise unless the test can be passed at all."""
    check_message(message)
    _check(fill, controls, seed)
    _check_finite("alpha", alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} is not between 0 and 1, both excluded")
    if controls and 1 / (1 + controls) > alpha:
        raise ValueError(
            f"controls={controls} reaches p = {1 / (1 + controls):.3g} at best, above "
            f"alpha={alpha!r}; draw {math.ceil(1 / alpha - 1)} or more, or 0 for the bare number"
        )


def _check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={safe(repr(value))} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number")
