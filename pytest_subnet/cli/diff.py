"""`pytest-subnet diff`: what moved between two checkpoints."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING

from pytest_subnet.cli.arguments import PRINT
from pytest_subnet.cli.output import check_page, check_target, columns, show, write
from pytest_subnet.cli.sources import open_named, wanted
from pytest_subnet.cli.stream import put
from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.selection import select
from pytest_subnet.reports import html, json_file
from pytest_subnet.reports.building import run_of
from pytest_subnet.reports.scanned import left_out, table_of
from pytest_subnet.reports.terminal import draws_blocks, summary
from pytest_subnet.scan.gathering import gather, ledger
from pytest_subnet.scan.tolerance import PAPER, SAME_BITS
from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pytest_subnet.cli.sources import Wanted
    from pytest_subnet.errors import Problem
    from pytest_subnet.pairs import ModelPair, Selection

_SHOWN = 10


def run(arguments: argparse.Namespace) -> None:
    """Show what moved, and write what was asked for."""
    sources = arguments.base, arguments.tuned
    targets = {
        page: check_target(name, sources)
        for page, name in ((json_file.page, arguments.json), (html.page, arguments.html))
        if name not in (None, PRINT)
    }
    if html.page in targets:
        check_page()
    pair = open_named(arguments, *sources)
    chosen, problems = selected(pair, wanted(arguments))
    gather(pair, (*chosen.rows, *chosen.apart), PAPER)
    table = table_of(pair, [*_apart(pair, chosen), *left_out(problems)])
    found = run_of([table]) if targets or arguments.json == PRINT else None
    if found is not None:
        for page, path in targets.items():
            write(path, page(found))
    if found is not None and arguments.json == PRINT:
        put(json_file.page(found))
        return
    ascii_only = not draws_blocks(sys.stdout)
    text = summary(table, ascii_only=ascii_only, width=columns(), verbose=arguments.verbose)
    show("\n\n".join([text, *_unpaired(problems)]))


def selected(pair: ModelPair, tensors: Wanted) -> tuple[Selection, Sequence[Problem]]:
    """What can be compared of the tensors asked for, and what cannot.

    Raises:
        PairMismatchError: nothing of them can.
        SelectionError: a pattern matches nothing, or only what has no sparsity.
    """
    problems: Sequence[Problem] = ()
    try:
        chosen = select(pair, **tensors)
    except PairMismatchError as error:
        problems = error.problems
        aligned = copy.copy(pair)
        aligned.problems = ()
        try:
            chosen = select(aligned, **tensors)
        except SelectionError:
            raise error from None
    if not chosen.rows:
        raise SelectionError(
            f"only buffers and integer tensors are selected ({len(chosen.apart):,}), which have no "
            "sparsity; compare them with assert_frozen or assert_updated"
        )
    return chosen, problems


def _apart(pair: ModelPair, chosen: Selection) -> list[str]:
    """What is said of buffers and integer tensors, which no number covers."""
    if not chosen.apart:
        return []
    moved = int((ledger(pair).updated(SAME_BITS)[list(chosen.apart)] > 0).sum())
    return [f"{plural(len(chosen.apart), 'tensor')} apart (buffers, integers), {moved:,} moved"]


def _unpaired(problems: Sequence[Problem]) -> list[str]:
    """What could not be compared, and what would allow it."""
    if not problems:
        return []
    rows = [
        (each.kind, "  ".join(filter(None, [safe(each.name), safe(each.text)])))
        for each in problems[:_SHOWN]
    ]
    if len(problems) > _SHOWN:
        rows.append(("", f"… {len(problems) - _SHOWN:,} more"))
    return [facts(f"{plural(len(problems), 'tensor')} not compared", rows)]
