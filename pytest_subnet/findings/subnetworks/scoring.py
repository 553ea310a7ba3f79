"""Scores of a model with parts of its weights filled, and of random parts beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pytest_subnet.errors import CheckpointError, PairMismatchError, SelectionError, SubnetError
from pytest_subnet.findings.common.fingerprints import Fingerprints
from pytest_subnet.findings.common.holders import model_inside
from pytest_subnet.findings.subnetworks.controls import drawn
from pytest_subnet.findings.subnetworks.models import filling
from pytest_subnet.findings.subnetworks.result import SubnetworkScores
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.findings.subnetworks.models import Covered, FilledModel
    from pytest_subnet.pairs.causal_lm import CausalLMPair

Models: TypeAlias = "CausalLMPair | Sequence[torch.nn.Module]"
Evaluate: TypeAlias = Callable[[Any], float]
"""Scores the tuned model as it was given; higher is better."""

Scores = TypeVar("Scores", bound=SubnetworkScores)


def scored(
    finding: type[Scores],
    pair: Models,
    mask: UpdateMask,
    evaluate: Evaluate,
    *,
    fill: str,
    controls: int,
    seed: int,
    random_outside: bool,
) -> Scores:
    """Score the model whole, in parts and beside random parts; afterwards it is as it was.

    Args:
        finding: the result to make.
        pair: base and tuned.
        mask: which part.
        evaluate: gives the score.
        fill: with what.
        controls: how many random masks.
        seed: of these.
        random_outside: whether the model is filled outside the random masks, or inside them.
    """
    base, tuned = _two_modules(pair)
    _check_mask(mask, controls)
    if not callable(evaluate):
        raise TypeError(
            f"evaluate={safe(repr(evaluate))} is not a function from a model to its score"
        )
    with filling(base, tuned, mask, fill) as model:
        score = _Scorer(model, tuned, evaluate)
        full = score.twice("the tuned model as it is")
        model.fill(outside=True)
        subnetwork = score("the subnetwork")
        model.fill(outside=False)
        complement = score("the complement of the subnetwork")
        model.fill_all()
        filled = score("the model with all that the mask covers filled")
        random = []
        for number in range(controls):
            model.fill(partial(_random_bits, (seed, number)), outside=random_outside)
            random.append(score(f"random mask {number + 1} of {controls}"))
    sides = {"base": model.base, "tuned": model.tuned}
    return finding(
        pair=" -> ".join(safe(each.label) for each in sides.values()),
        mask=mask.origin.what,
        fill=fill,
        full=full,
        subnetwork=subnetwork,
        complement=complement,
        filled=filled,
        random=tuple(random),
        seed=seed,
        restored=True,  # else leaving the block was an error
        tensors_total=len(model.covered) + len(model.left),
        numel_total=sum(each.numel for each in model.covered) + model.left_numel,
        notes=model.notes
        if random_outside or not random
        else (*model.notes, *_weak(model.covered)),
        per_tensor=tuple(model.covered),
        fingerprints=Fingerprints(
            {role: partial(_fingerprint, each, each.identity()) for role, each in sides.items()}
        ),
    )


def _weak(covered: Sequence[Covered]) -> list[str]:
    """What a reader must know where random masks hardly fill anything, as in a sparse update."""
    count = sum(each.inside for each in covered)
    replaced = sum(each.replaced_inside for each in covered)
    by_random = sum(each.replaced_by_random for each in covered)
    if not (2 * by_random < count and by_random < replaced):
        return []
    return [
        f"weak controls: filled, the mask gives {plural(replaced, 'entry')} other bits, a random "
        f"mask {by_random:,.3g} on average; most of what it draws never moved"
    ]


def _random_bits(seed: tuple[int, int], tensor: Covered) -> NDArray[np.uint64]:
    return drawn(tensor.numel, tensor.inside, seed, tensor.name)


def _fingerprint(model: Checkpoint, identity: Hashable) -> str:
    if model.identity() != identity:
        raise CheckpointError(
            f"{safe(model.label)} was written to after it was scored; take its fingerprint before "
            "training goes on"
        )
    return model.fingerprint()


class _Scorer:
    """Calls `evaluate` and holds it to what it promises."""

    def __init__(self, model: FilledModel, tuned: torch.nn.Module, evaluate: Evaluate) -> None:
        self._model = model
        self._tuned = tuned
        self._evaluate = evaluate

    def __call__(self, what: str) -> float:
        before = self._model.tuned.identity()
        try:
            value = self._evaluate(self._tuned)
        except Exception as error:
            error.add_note(f"in evaluate, which was to score {what}")
            raise
        if self._model.tuned.identity() != before:
            raise SubnetError(
                f"evaluate wrote to the weights of {safe(self._model.tuned.label)} or replaced "
                f"them, when it was to score {what}; only run the model there, in eval mode"
            )
        number = _finite(value)
        if number is None:
            raise SubnetError(
                f"evaluate gave {safe(repr(value))} for {what}, which is no finite number to "
                "compare; give one that any weights can get, as a share or a clipped loss"
            )
        return number

    def twice(self, what: str) -> float:
        """The score, after it was found to be the same again."""
        first, second = self(what), self(what)
        if first == second:
            return first
        mend = "score the same examples each time, and seed inside evaluate what it draws"
        if any(module.training for module in self._tuned.modules()):
            mend = f"the model is in train mode, where dropout draws: call .eval() on it; {mend}"
        raise SubnetError(
            f"evaluate gave {first!r} and then {second!r} for {what}, and so cannot tell one mask "
            f"from another; {mend} (on a GPU, torch.use_deterministic_algorithms(True))"
        )


def _finite(value: object) -> float | None:
    """A score as a number; None where it is no finite one."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return None
    if str(getattr(value, "dtype", "")).endswith("bool"):  # numpy's and torch's
        return None
    if hasattr(value, "detach"):  # of a tensor with a gradient torch warns
        value = value.detach()
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None  # an array of several numbers, among others
    return number if math.isfinite(number) else None


def _two_modules(pair: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    import torch

    if not isinstance(pair, tuple | list) or not 2 <= len(pair) <= 3:
        raise TypeError(
            f"pair is {type(pair).__name__}, not base and tuned as modules; take the fixture "
            "causal_lm_pair, or pass (base, tuned)"
        )
    for role, model in zip(("base", "tuned"), pair, strict=False):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"{role} is {type(model).__name__}, not a module to run; take the fixture "
                f"causal_lm_pair, or pass (base, tuned){model_inside(model, role)}"
            )
    if pair[0] is pair[1]:
        raise PairMismatchError(
            "base and tuned are one model, of which nothing was updated; keep a copy before "
            "training (copy.deepcopy), or load the base again"
        )
    return pair[0], pair[1]


def _check_mask(mask: object, controls: int) -> None:
    if not isinstance(mask, UpdateMask):
        raise TypeError(
            f"mask is {type(mask).__name__}, not an UpdateMask; make one with update_mask(pair), "
            "UpdateMask.of({name: booleans}) or UpdateMask.load(path)"
        )
    if not mask.count:
        raise SelectionError(f"{mask!r} is empty: no subnetwork to score")
    if mask.count == mask.numel:
        raise SelectionError(
            f"{mask!r} is full: the subnetwork is all that it covers; take a mask of a part"
        )
    if controls and all(each.entries in (0, each.numel) for each in mask.tensors):
        raise SelectionError(
            f"{mask!r} takes each of {plural(len(mask.tensors), 'tensor')} whole or not at all, so "
            "that a random mask with as many entries in each is the same mask; controls=0 asserts "
            "the bare number"
        )
