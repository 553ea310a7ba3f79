"""What the first measure of a process takes, done while a pair is drawn."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pytest_subnet.findings.common.result import measure
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.scan.tolerance import Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable


def ready_kernels(dtypes: Iterable[str]) -> None:
    """Load what measures pairs of these dtypes, or compile it, once a process.

    Hypothesis counts the time of a test without that of its draws, and the first draw of a test may
    take as long as it does. A measure that compiles in the test is over the deadline, and is not
    when it is run again, which Hypothesis calls unreliable.
    """
    for dtype in dtypes:
        _ready(dtype)


@functools.cache
def _ready(dtype: str) -> None:
    import torch

    weight = torch.zeros(1, dtype=getattr(torch, dtype))
    # Not a finding: it would be in the report.
    measure(open_pair({"weight": weight}, {"weight": weight + 1}), [0], Tolerance())
