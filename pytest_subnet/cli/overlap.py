"""`pytest-subnet overlap`: whether two updates touched the same entries."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_subnet.cli.output import columns, show
from pytest_subnet.cli.sources import open_named, wanted
from pytest_subnet.cli.tables import fitted
from pytest_subnet.errors import SubnetError
from pytest_subnet.findings.overlap.finding import mask_overlap
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    import argparse

    from pytest_subnet.findings.overlap.result import MaskOverlap, TensorOverlap

_SHOWN = 10


def run(arguments: argparse.Namespace) -> None:
    """Print how they overlap."""
    a, b = arguments.a, arguments.b
    if arguments.base is None:
        for name in (a, b):
            _check_is_file(name)
        result = mask_overlap(a, b, null=arguments.null, **wanted(arguments))
    else:
        pairs = [open_named(arguments, arguments.base, tuned) for tuned in (a, b)]
        result = mask_overlap(
            *pairs,
            null=arguments.null,
            atol=arguments.atol,
            rtol=arguments.rtol,
            **wanted(arguments),
        )
    show(described(result, columns()))


def _check_is_file(name: str) -> None:
    if os.path.isdir(name):  # noqa: PTH112 - pathlib's raises for a name that is too long
        raise SubnetError(
            f"{safe(name)} is a directory, not a mask; to compare what two runs did to one model, "
            f"name it with --base, or save masks with pytest-subnet mask"
        )


def described(result: MaskOverlap, width: int) -> str:
    """The overlap in all, and the tensors that overlap most."""
    lifts = ", ".join(f"{lift:.4g} {name}" for name, lift in result.lifts.items())
    rows = [
        ("a", f"{result.a}: {_share(result.count_a, result.numel)}"),
        ("b", f"{result.b}: {_share(result.count_b, result.numel)}"),
        (
            "covers",
            f"{len(result.per_tensor):,}/{plural(result.tensors_total, 'tensor')}, "
            f"{plural(result.numel, 'entry')}, {result.dtype}",
        ),
        ("in both", f"{result.intersection:,}; by chance {_number(result.expected)}"),
        (
            "one-sided",
            f"{percent(result.one_sided_a)} of a, {percent(result.one_sided_b)} of b; "
            f"by chance {percent(result.one_sided_by_chance or 0)} of the larger",
        ),
        (
            "Jaccard",
            f"{percent(result.jaccard)}; by chance {percent(result.jaccard_by_chance or 0)}",
        ),
        ("lift", lifts),
        *_interval(result),
        ("kappa", f"{_number(result.kappa)} (0 is chance, 1 is nested masks)"),
    ]
    verdict = f"lift {_number(result.lift)} over chance by {result.null}"
    if result.saturated:
        verdict += ": a mask is empty or full everywhere, so chance alone fixes it"
    return f"{facts(verdict, rows)}\n\n{fitted(_most(result), numbers=_NUMBERS, width=width)}"


_NUMBERS = ("a", "b", "both", "expected", "lift")


def _most(result: MaskOverlap) -> list[dict[str, str]]:
    def least_last(tensor: TensorOverlap) -> float:
        return -(tensor.lift or 0.0)

    return [
        {
            "tensor": safe(each.name),
            "a": f"{each.count_a:,}",
            "b": f"{each.count_b:,}",
            "both": f"{each.intersection:,}",
            "expected": _number(each.expected),
            "lift": _number(each.lift),
        }
        for each in sorted(result.per_tensor, key=least_last)[:_SHOWN]
    ]


def _interval(result: MaskOverlap) -> list[tuple[str, str]]:
    interval = result.interval
    if interval is None:
        return []
    return [("", f"95% interval {interval.low:.4g} to {interval.high:.4g} over matrices")]


def _share(count: int, numel: int) -> str:
    return f"{plural(count, 'entry')} ({percent(count / numel)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
