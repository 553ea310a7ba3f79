"""Fine-tunings of a tiny decoder, really run."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies.arguments import drawn_dtype, drawn_name, sampled
from pytest_subnet.strategies.training_runs import DTYPES, OPTIMIZERS, Finetune
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_subnet.strategies.training_runs import OptimizerOf

    _Optimizers: TypeAlias = st.SearchStrategy[str | OptimizerOf] | Sequence[str | OptimizerOf]

_SEEDS = st.integers(0, 2**16 - 1)


def finetunes(
    *,
    optimizers: _Optimizers = tuple(OPTIMIZERS),
    min_learning_rate: float = 1e-7,
    max_learning_rate: float = 1e-2,
    min_weight_decay: float = 0.0,
    max_weight_decay: float = 0.1,
    min_steps: int = 1,
    max_steps: int = 3,
    dtypes: st.SearchStrategy[torch.dtype | str] | Sequence[str] = DTYPES,
    master_weights: bool | None = None,
    min_frozen: int = 0,
    max_frozen: int | None = None,
) -> st.SearchStrategy[Finetune]:
    """A strategy for `Finetune`: a tiny decoder, really trained, in some ten milliseconds a draw.

    Learning rates and decays are the bounds and round numbers between them, 1, 2 or 5 times a power
    of ten, decays from 0.001 on. Runs shrink towards one step at the smallest rate, no decay,
    nothing frozen, and as `optimizers` and `dtypes` do, of a list towards its first.

    Args:
        optimizers: names, or what makes an optimiser out of parameters, `lr=` and `weight_decay=`;
            as a strategy or a list.
        min_learning_rate: above 0.
        max_learning_rate: where the run may still end in finite numbers, up to about 0.01.
        min_weight_decay: 0 or more.
        max_weight_decay: likewise.
        min_steps: 1 or more.
        max_steps: the time of a draw grows with it.
        dtypes: of the weights: `"bfloat16"`, `"float16"`, `"float32"`; as a strategy or a list.
        master_weights: with or without, for 16-bit weights; None draws it.
        min_frozen: how many of the 21 parameters at least do not require a gradient.
        max_frozen: how many at most; None leaves one to train.

    Returns:
        A strategy. What torch does once, and takes seconds for, is done when it is made.

    Raises:
        InvalidArgument: a bound is out of range or below its other, a choice is empty or unknown.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5, deadline=None)
    ... @given(finetunes(optimizers=["AdamW"], max_learning_rate=1e-5, min_frozen=1))
    ... def test_frozen(run):
    ...     assert_frozen(run.pair, run.frozen)
    >>> test_frozen()
    """
    from pytest_subnet.strategies.tiny_models import PARAMETERS

    if not isinstance(optimizers, st.SearchStrategy):
        _check_choices("optimizers", optimizers, OPTIMIZERS)
        for optimizer in optimizers:
            if not (isinstance(optimizer, str) or callable(optimizer)):
                raise InvalidArgument(f"optimizers: {optimizer!r} is neither a name nor a class")
    if not isinstance(dtypes, st.SearchStrategy):
        _check_choices("dtypes", dtypes, DTYPES)
    rates = _round_numbers("learning_rate", min_learning_rate, max_learning_rate, least=-12)
    if not rates[0]:
        raise InvalidArgument("min_learning_rate=0 is no rate: give one above 0")
    decays = _round_numbers("weight_decay", min_weight_decay, max_weight_decay, least=-3)
    _check_counts("steps", min_steps, max_steps, 1, None)
    trained = len(PARAMETERS) - 1
    max_frozen = trained if max_frozen is None else max_frozen
    _check_counts("frozen", min_frozen, max_frozen, 0, trained)
    if master_weights not in (None, False, True):
        raise InvalidArgument(f"master_weights={master_weights!r} is not True, False or None")
    _train_once()
    return _trained(
        optimizer=sampled(optimizers).map(_drawn_optimizer),
        learning_rate=st.sampled_from(rates),
        weight_decay=st.sampled_from(decays),
        steps=st.integers(min_steps, max_steps),
        dtype=sampled(dtypes).map(partial(drawn_dtype, known=DTYPES)),
        master_weights=st.booleans() if master_weights is None else st.just(master_weights),
        frozen=st.lists(
            st.sampled_from(PARAMETERS), unique=True, min_size=min_frozen, max_size=max_frozen
        ),
        seed=_SEEDS,
        data_seed=_SEEDS,
    )


@functools.cache
def _train_once() -> None:
    """What takes seconds the first time, which Hypothesis would call a draw that is too slow."""
    assert Finetune().tuned


# Not st.builds, as Hypothesis would then vary each of the arguments a hundred times to explain a
# failure, and every time train.
@st.composite
def _trained(draw: st.DrawFn, /, **settings: st.SearchStrategy[Any]) -> Finetune:
    """Draw and run: the time it takes is that of the draw, not of the test."""
    run = Finetune(**{name: draw(strategy) for name, strategy in settings.items()})
    assert run.tuned
    return run


def _drawn_optimizer(optimizer: str | OptimizerOf) -> str | OptimizerOf:
    return optimizer if callable(optimizer) else drawn_name("optimizers", optimizer, OPTIMIZERS)


def _round_numbers(what: str, low: float, high: float, least: int) -> list[float]:
    """`low`, `high`, and between them 1, 2 and 5 times powers of ten, from the power `least` on."""
    for name, bound in ((f"min_{what}", low), (f"max_{what}", high)):
        if not (isinstance(bound, int | float) and math.isfinite(bound) and bound >= 0):
            raise InvalidArgument(f"{name}={bound!r} is not 0 or a positive number")
    if high < low:
        raise InvalidArgument(f"Cannot have max_{what}={high!r} < min_{what}={low!r}")
    powers = [float(f"{digit}e{power}") for power in range(least, 3) for digit in (1, 2, 5)]
    return sorted({float(low), float(high), *(each for each in powers if low < each < high)})


def _check_counts(what: str, low: object, high: object, least: int, most: int | None) -> None:
    for name, bound in ((f"min_{what}", low), (f"max_{what}", high)):
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise InvalidArgument(
                f"Expected int but got {name}={bound!r} (type={type(bound).__name__})"
            )
        if bound < least:
            raise InvalidArgument(f"{name}={bound!r} is below {least}")
        if most is not None and bound > most:
            raise InvalidArgument(f"{name}={bound!r} is above {most}")
    assert isinstance(low, int)
    assert isinstance(high, int)
    if high < low:
        raise InvalidArgument(f"Cannot have max_{what}={high!r} < min_{what}={low!r}")


def _check_choices(what: str, chosen: object, known: Sequence[str] | dict[str, Any]) -> None:
    if isinstance(chosen, str) or not hasattr(chosen, "__len__"):
        raise InvalidArgument(f"{what}={safe(repr(chosen))} is neither a strategy nor a list")
    choices: list[object] = list(chosen)  # type: ignore[call-overload]  # of a Sequence
    if not choices:
        raise InvalidArgument(f"{what} is empty: there is nothing to draw from")
    for each in choices:
        if isinstance(each, str) and each not in known:
            raise InvalidArgument(f"{what}: {safe(repr(each))} is not one of {', '.join(known)}")
