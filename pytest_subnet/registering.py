"""Makes `st.from_type` know the package's types, for nothing until one of them is used.

Hypothesis calls `register` when it is imported, in every test suite that has this package
installed, whether it uses it or not. It can only be told of a type that exists, and to make these
would import numpy: so it is told of each as soon as that is first taken from `pytest_subnet`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest_subnet

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_STRATEGIES = {
    "ModelPair": "model_pairs",
    "Trajectory": "trajectories",
    "UpdateMask": "update_masks",
}


def register() -> None:
    """Have Hypothesis told of each type when it is first used; the entry point."""
    for name in _STRATEGIES:
        pytest_subnet.when_used(name, _tell_hypothesis)


def _tell_hypothesis(known: type[Any]) -> None:
    from hypothesis.strategies import register_type_strategy

    def drawn(wanted: type[Any]) -> SearchStrategy[Any]:
        # Hypothesis also asks when something is wanted that the type could stand for.
        if wanted is not known:
            return NotImplemented  # type: ignore[no-any-return]
        from pytest_subnet import strategies

        strategy: SearchStrategy[Any] = getattr(strategies, _STRATEGIES[known.__name__])()
        return strategy

    register_type_strategy(known, drawn)
