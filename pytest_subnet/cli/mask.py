"""`pytest-subnet mask`: which entries an update touched, as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.cli.output import check_target, show
from pytest_subnet.cli.sources import open_named, wanted
from pytest_subnet.masks.building import update_mask
from pytest_subnet.text import percent, plural, safe

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> None:
    """Save the mask, and say what is in it."""
    path = check_target(arguments.output, (arguments.base, arguments.tuned))
    pair = open_named(arguments, arguments.base, arguments.tuned)
    mask = update_mask(pair, atol=arguments.atol, rtol=arguments.rtol, **wanted(arguments))
    mask.save(path)
    show(
        f"{safe(path)}: {mask.count:,} of {plural(mask.numel, 'entry')} of "
        f"{plural(len(mask), 'tensor')} ({percent(mask.density)}, {mask.origin.tolerance})"
    )
