"""What a draw costs, against what hypothesis.extra.numpy takes for the same entries.

    python benchmarks/strategies.py

The peer draws one array of float16 in the shape of each tensor that `model_pairs()` drew, for base
and tuned; it aligns nothing, and knows neither names, nor ties, nor what an update is.
"""

from __future__ import annotations

import math
import statistics
from time import perf_counter
from typing import TYPE_CHECKING

import measure
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pytest_subnet.strategies import model_pairs, state_dicts, tensors, update_masks, updates

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = 60


def main() -> None:
    """Measure, print."""
    drawn = draw_often(model_pairs(), shapes_of_pair)
    of_pairs, of_arrays, entries = zip(*drawn, strict=True)
    ratios = [mine / other for mine, other in zip(of_pairs, of_arrays, strict=True)]
    rows = [
        ("a draw of model_pairs(), median ms", milliseconds(of_pairs), "5"),
        ("arrays() of the same entries, median ms", milliseconds(of_arrays), ""),
        ("model_pairs() over these arrays()", f"{statistics.median(ratios):.2f}", "1"),
        ("entries of such a pair, median", f"{statistics.median(entries):,.0f}", ""),
    ]
    others = {
        "tensors()": tensors(),
        "state_dicts()": state_dicts(),
        "updates()": updates(),
        "update_masks()": update_masks(),
    }
    for name, strategy in others.items():
        times, _, _ = zip(*draw_often(strategy, lambda value: []), strict=True)
        rows.append((f"a draw of {name}, median ms", milliseconds(times), ""))
    measure.show(rows)


def draw_often(
    strategy: st.SearchStrategy[object], shapes_of: Callable[..., list[tuple[int, ...]]]
) -> list[tuple[float, float, int]]:
    """Of each draw: its seconds, those of arrays of the same shapes, and their entries."""
    found = []

    @settings(
        max_examples=DRAWS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        start = perf_counter()
        value = data.draw(strategy)
        seconds = perf_counter() - start
        shapes = shapes_of(value)
        same = st.tuples(*[arrays(np.float16, shape) for shape in shapes])
        start = perf_counter()
        data.draw(same)
        found.append((seconds, perf_counter() - start, sum(map(math.prod, shapes))))

    draw()
    return found


def shapes_of_pair(pair: object) -> list[tuple[int, ...]]:
    """The shapes of the tensors of both sides."""
    return 2 * [tensor.shape for tensor in pair.tensors]


def milliseconds(seconds: tuple[float, ...]) -> str:
    """The median, with the least and the most."""
    return measure.spread([each * 1e3 for each in seconds])


if __name__ == "__main__":
    main()
