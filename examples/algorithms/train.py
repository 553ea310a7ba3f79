"""Train every run of the table, then measure and print it.

    python examples/algorithms/train.py .demo

builds `.demo/base` if it is not there, a folder a run under `.demo/algorithms/`, and the table
`.demo/algorithms/table.md`. What is up to date is not trained again. With `--short` the same code
runs on a smaller base for two steps a run: a check that it works, not a measurement. It wants a
folder of its own, as its base is another one.
"""

import argparse
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
import trl
from data import Settings, build_base, build_once, sha256
from report import report
from runs import INSIDE, RUNS, TWICE, Run
from trainers import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_subnet import open_pair, update_mask

CODE = ("data.py", "ppo.py", "prime.py", "rollouts.py", "trainers.py")
"""What a run depends on, besides its line in `runs.py`: an edit of it trains again."""

SHORT_BASE = Settings(hidden_size=64, intermediate_size=128, layers=2, heads=2, steps=20)


def build(out: Path, *, short: bool) -> Path:
    """Train what is missing and return the folder of the runs."""
    base = build_base(out, settings=SHORT_BASE if short else None)
    folder = out / "algorithms"
    runs = {name: replace(run, steps=2) if short else run for name, run in RUNS.items()}
    for name, run in runs.items():
        _build_run(folder / name, base, run, seed=0)
    for name in TWICE:
        _build_run(folder / f"{name}-second-seed", base, runs[name], seed=1)
    for name in INSIDE:
        _build_run(folder / f"{name}-inside", base, runs[name], seed=0, inside=folder / name)
    return folder


def _build_run(
    folder: Path, base: Path, run: Run, *, seed: int, inside: Path | None = None
) -> None:
    here = Path(__file__).parent
    record = {
        "run": asdict(run),
        "seed": seed,
        "inside": sha256(inside / "model.safetensors") if inside else None,
        "base_sha256": sha256(base / "model.safetensors"),
        "code_sha256": {name: sha256(here / name) for name in CODE},
        "trl": trl.__version__,
    }
    build_once(
        folder, record=record, build=partial(_train, base=base, run=run, seed=seed, inside=inside)
    )


def _train(folder: Path, *, base: Path, run: Run, seed: int, inside: Path | None) -> None:
    # Steps this small would be rounded away one by one in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    mask = None if inside is None else update_mask(open_pair(base, inside))
    train(model, tokenizer, run, seed=seed, mask=mask)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line, train and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives base/ and algorithms/")
    parser.add_argument("--short", action="store_true", help="a smaller base, two steps a run")
    arguments = parser.parse_args()
    # TRL 1.16 still asks for a property that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing`", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = build(arguments.out, short=arguments.short)
    text = report(arguments.out / "base", folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
