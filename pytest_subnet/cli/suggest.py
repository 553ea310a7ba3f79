"""`pytest-subnet suggest`: a policy that a pair meets, with the reason for every bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_subnet
from pytest_subnet.checkpoints.remote.urls import is_url, masked
from pytest_subnet.cli.bounds import head_of, tables_of
from pytest_subnet.cli.policies import spelled, written
from pytest_subnet.cli.stream import put
from pytest_subnet.errors import SelectionError, SubnetError
from pytest_subnet.findings.sparsity.finding import update_sparsity
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.text import redacted

if TYPE_CHECKING:
    import argparse

    from pytest_subnet.cli.policies import Table, Value
    from pytest_subnet.pairs import ModelPair

_NOT_IN_ALL = ("assert_tied", "assert_same_interface")
"""Assertions on what many a pair does not have: ties, a config."""


def run(arguments: argparse.Namespace) -> None:
    """Print the policy."""
    pair = open_pair(arguments.base, arguments.tuned)
    put(suggested(pair, arguments.base, arguments.tuned))


def suggested(pair: ModelPair, base: str, tuned: str) -> str:
    """The text of a policy that `pair` meets; every table was tried on it.

    Args:
        pair: what is measured.
        base: where it was found, as the policy is to name it.
        tuned: likewise.

    Raises:
        SubnetError: nothing moved, or the pair cannot be measured.

    >>> import tomllib
    >>> policy = tomllib.loads(suggested(pair, "base", "tuned"))
    >>> [table["at_least"] for table in policy["assert_update_sparsity"]]
    [0.921, 0.921]
    """
    if update_sparsity(pair).nothing_moved:
        raise SubnetError(
            f"{pair.label}: nothing moved, so there is nothing to bound; check which checkpoints "
            "are compared"
        )
    held, left_out = [], []
    for table in tables_of(pair):
        refusal = _refusal(pair, table)
        if refusal is None:
            held.append(table)
        elif refusal:
            left_out.append(f"{table.assertion} is left out: {refusal}")
    names, unnamed = _named(base, tuned)
    return written([*head_of(pair), *left_out, *unnamed], names, held)


def _refusal(pair: ModelPair, table: Table) -> str | None:
    """Why a table cannot be in the policy; None where it can, empty where nobody needs to know."""
    try:
        for value in table.keywords.values():
            spelled(value)
        getattr(pytest_subnet, table.assertion)(pair, **table.keywords)
    except SelectionError as error:  # there is nothing that it could be about
        return "" if table.assertion in _NOT_IN_ALL else _first_line(error)
    except (AssertionError, SubnetError) as error:
        return _first_line(error)
    except UnicodeEncodeError:
        return "it would name tensors that are not valid Unicode"
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _named(base: str, tuned: str) -> tuple[dict[str, Value], list[str]]:
    """`base` and `tuned` for the policy, and what to say of those that it must not hold."""
    names: dict[str, Value] = {}
    unnamed = []
    for side, source in (("base", base), ("tuned", tuned)):
        try:
            spelled(source)
        except UnicodeEncodeError:
            unnamed.append(f"{side} is not named: its path is not valid Unicode.")
            continue
        if redacted(source) != source or (is_url(source) and masked(source) != source):
            unnamed.append(f"{side} is not named: its address may hold a secret.")
            continue
        names[side] = source
    if unnamed:
        unnamed.append("Say it with --subnet-base and --subnet-tuned.")
    return names, unnamed
