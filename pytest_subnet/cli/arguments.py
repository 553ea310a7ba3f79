"""What the command line takes; declared without anything that a command needs to do its work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pytest_subnet import __version__
from pytest_subnet.devices import is_device

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""As `checkpoints.dtypes.ARITHMETIC`, which imports more than `--help` waits for."""

PRINT = "-"
"""In place of a file: on standard output."""

NULLS = ("auto", "exponent", "matrix", "rowcol", "pooled")

_SOURCES = (
    "BASE and TUNED are a file, a directory, a hub id (org/name[@revision]) or an address (hf://, "
    "https://, s3://, gs://)."
)
_CODES = "Exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted."
_OF_PAIRS = ("atol", "rtol", "as_dtype", "vocab", "device")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, as `command` and what that takes; ends the process where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="pytest-subnet",
        description="What fine-tuning did to a model's weights.",
        epilog=f"{_SOURCES} {_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for declare, summary, description in (
        (_diff, "show what moved between two checkpoints", _DIFF),
        (_mask, "save which entries an update touched", _MASK),
        (_overlap, "compare two masks, or the updates of two runs", _OVERLAP),
        (_suggest, "print a policy with bounds around what a pair shows", _SUGGEST),
    ):
        name = declare.__name__.removeprefix("_")
        declare(commands.add_parser(name, help=summary, description=description, epilog=_SOURCES))
    arguments = parser.parse_args(argv)
    if arguments.command == "overlap" and arguments.base is None:
        given = [name for name in _OF_PAIRS if getattr(arguments, name) is not None]
        if given:
            option = given[0].replace("_", "-")
            commands.choices["overlap"].error(
                f"--{option} says how checkpoints are compared, and masks have their entries "
                "already; give --base and two tuned models"
            )
    return arguments


_DIFF = (
    "Compare BASE and TUNED entry by entry, and show what moved: by layer, by kind, and the "
    "tensors that moved most. Tensors without a partner are listed; they are no failure here. To "
    "judge a pair, run pytest on a policy (see suggest)."
)


def _diff(parser: argparse.ArgumentParser) -> None:
    _add_pair(parser)
    parser.add_argument(
        *("-v", "--verbose"), action="store_true", help="show every layer and every tensor"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=PRINT,
        metavar="FILE",
        help="write all of it to FILE as JSON; without FILE print that instead of tables",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page that shows all of it")
    _add_selection(parser)
    _add_opening(parser)


_MASK = (
    "Find which entries of BASE are others in TUNED, and save them as a mask, which overlap, "
    "UpdateMask.load and train_inside read."
)


def _mask(parser: argparse.ArgumentParser) -> None:
    _add_pair(parser)
    parser.add_argument(
        *("-o", "--output"), required=True, metavar="FILE", help="the mask, a safetensors file"
    )
    _add_selection(parser)
    _add_tolerance(parser)
    _add_opening(parser)


_OVERLAP = "Show how far two masks cover the same entries, beside what chance alone gives."


def _overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a mask file; with --base a tuned model")
    parser.add_argument("b", metavar="B", help="likewise")
    parser.add_argument("--base", metavar="BASE", help="the model from which A and B were tuned")
    parser.add_argument(
        "--null",
        choices=NULLS,
        default="auto",
        help="what chance keeps: how many entries each matrix has at each exponent of the base "
        "weight (auto, for 16-bit storage), how many each matrix has (auto, for wider storage), "
        "how full its rows and columns are (rowcol), or how many the model has (pooled)",
    )
    _add_selection(parser)
    _add_tolerance(parser)
    _add_opening(parser)


_SUGGEST = (
    "Measure BASE and TUNED, and print a policy with bounds around what was found: redirect it to "
    "release.subnet.toml, read it, and run pytest on it. Its bounds say what this one run did, not "
    "what the next one should do."
)


def _suggest(parser: argparse.ArgumentParser) -> None:
    _add_pair(parser)


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning")
    parser.add_argument("tuned", metavar="TUNED", help="the model after, or a PEFT adapter on BASE")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """As the keywords of every measure."""
    for name, metavar, what in (
        ("include", "GLOB", "only tensors whose names match; may be given several times"),
        ("exclude", "GLOB", "leave out tensors whose names match; likewise"),
        ("kinds", "KIND", "only tensors of this kind (q_proj, down_proj, norm, …); likewise"),
    ):
        parser.add_argument(f"--{name}", action="append", metavar=metavar, help=what)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    for name, what in (
        ("atol", "|tuned - base| up to this counts as unchanged (the paper's is 1e-5); by default "
         "the same bits do"),
        ("rtol", "likewise, relative to the larger of |base| and |tuned|"),
    ):  # fmt: skip
        either.add_argument(f"--{name}", type=_tolerance, metavar="NUMBER", help=what)


def _add_opening(parser: argparse.ArgumentParser) -> None:
    """As the keywords of `open_pair`."""
    parser.add_argument(
        "--vocab",
        choices=("strict", "common"),
        help="common compares the common rows of embeddings whose vocabulary was resized",
    )
    parser.add_argument("--as-dtype", choices=DTYPES, help="cast both sides before comparing them")
    parser.add_argument(
        "--device", type=_device, metavar="DEVICE", help="where to compare: cpu, cuda or cuda:N"
    )


def _device(text: str) -> str:
    if not is_device(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N")
    return text


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value
