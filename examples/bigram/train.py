"""Train the base, find its subnetworks, measure them, and print the tables in Markdown.

    python examples/bigram/train.py .demo

writes into `.demo/bigram/` a small base (`base/`), the masks and how each was found (`found/`), and
the tables (`table.md`). What is up to date is not made again. With `--short` the same code runs for
two steps each and scores four windows: a check that it works, not a measurement. It wants a folder
of its own.
"""

import argparse
from pathlib import Path

import transformers
from report import report
from search import build


def main() -> None:
    """Read the command line, search and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives bigram/")
    parser.add_argument("--short", action="store_true", help="two steps each")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = build(arguments.out, short=arguments.short)
    text = report(folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
