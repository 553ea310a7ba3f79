"""The scan: one pass over a pair, in work units, with one fused kernel and exact counters."""

from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES, PAPER, SAME_BITS, Tolerance

__all__ = ["DEFAULT_TOLERANCES", "PAPER", "SAME_BITS", "Tolerance"]
