"""The pair that a command line names, and the tensors of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from pytest_subnet.pairs.opening import open_pair

if TYPE_CHECKING:
    import argparse

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns


class Wanted(TypedDict):
    """Which tensors are asked for, as keywords of every measure."""

    include: Patterns | None
    exclude: Patterns | None
    kinds: Patterns | None


def open_named(arguments: argparse.Namespace, base: str, tuned: str) -> ModelPair:
    """Open a pair as the options say."""
    return open_pair(
        base,
        tuned,
        vocab=arguments.vocab or "strict",
        as_dtype=arguments.as_dtype,
        device=arguments.device,
    )


def wanted(arguments: argparse.Namespace) -> Wanted:
    """Which tensors were asked for."""
    return {
        "include": arguments.include,
        "exclude": arguments.exclude,
        "kinds": arguments.kinds,
    }
