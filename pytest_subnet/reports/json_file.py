"""A run as JSON, which `schema.json` beside this file describes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_subnet.reports.run import Run


def page(run: Run) -> str:
    """The run as JSON on one line; numbers are finite, or null.

    Raises:
        ValueError: the run holds a NaN or Inf.

    >>> run = {"version": 1, "passed": True, "counts": {}, "tests": [], "pairs": []}
    >>> print(page({**run, "environment": {"engine": "threads"}}), end="")
    {"version":1,"passed":true,"counts":{},"tests":[],"pairs":[],"environment":{"engine":"threads"}}
    """
    return json.dumps(run, allow_nan=False, separators=(",", ":")) + "\n"
