"""Train the run of the table, then measure and print it.

    python examples/forgetting/train.py .demo

writes into `.demo/forgetting/` a small base (`base/`), the model that learnt both rules
(`learnt/`), its supervised tuning on one rule (`sft/`), reinforcement learning on the same rule
from there (`rl/`), and the table (`table.md`). What is up to date is not trained again. With
`--short` the same code runs for two steps a stage: a check that it works, not a measurement. It
wants a folder of its own.
"""

import argparse
import warnings
from pathlib import Path

import datasets
import transformers
from report import report
from stages import build


def main() -> None:
    """Read the command line, train and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives forgetting/")
    parser.add_argument("--short", action="store_true", help="two steps a stage")
    arguments = parser.parse_args()
    # TRL 1.16 still asks for a property that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing`", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = build(arguments.out, short=arguments.short)
    text = report(folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
