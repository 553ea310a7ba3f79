"""Tune the laboratory's base three times with TRL: one SFT, one DPO and one GRPO run.

    python examples/release/tune.py .demo

builds `.demo/base` if it is not there, then `.demo/sft`, `.demo/dpo` and `.demo/grpo`. Every run
loads the base into float32, trains all of it with AdamW, and stores bfloat16. What differs is the
loss, the data, the number of steps and a learning rate that is usual for the method: see `RUNS`.
"""

import argparse
import hashlib
import re
import warnings
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from laboratory import build_base, build_once, read_standard_library
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Args = dict[str, Any]

RUNS: dict[str, Args] = {
    "sft": {
        "learning_rate": 2e-5,
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "max_length": 128,
    },
    "dpo": {
        "learning_rate": 5e-7,
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "max_length": 128,
    },
    "grpo": {
        "learning_rate": 1e-6,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 32,
    },
}

COMMON: Args = {
    "seed": 0,
    "optim": "adamw_torch",
    # One AdamW step moves a weight by about the learning rate at most. Without a decay, a run's
    # reach is therefore steps * learning rate: 1.2e-3 for SFT, 1.5e-5 for DPO, 3e-5 for GRPO.
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    # TRL computes in bfloat16 and recomputes activations unless told otherwise.
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def make_sft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Args) -> Trainer:
    """Supervised fine-tuning on prose, which a base trained on code has not seen."""
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**args),
        train_dataset=Dataset.from_list(prose()),
    )


def make_dpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Args) -> Trainer:
    """Preference tuning: a function's body is preferred to the same lines in reverse."""
    return DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=DPOConfig(**args),
        train_dataset=Dataset.from_list(preferences()),
    )


def make_grpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Args) -> Trainer:
    """Reinforcement learning with a reward that a few lines of code can verify."""
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(**args),
        train_dataset=Dataset.from_list([{"prompt": head} for head, _ in functions()]),
        reward_funcs=indented_share,
    )


TRAINERS = {"sft": make_sft, "dpo": make_dpo, "grpo": make_grpo}


def functions() -> list[tuple[str, list[str]]]:
    """Return the head and the first six body lines of the standard library's functions."""
    source = "\n".join(read_standard_library())
    found = re.findall(r"^(def .*:)\n((?:    .*\S\n){6})", source, re.MULTILINE)
    return [(head, body.splitlines()) for head, body in found]


def preferences() -> list[dict[str, str]]:
    """Return functions as prompts, with their own body chosen and its lines in reverse rejected."""
    return [
        {
            "prompt": head,
            "chosen": "\n" + "\n".join(body),
            "rejected": "\n" + "\n".join(reversed(body)),
        }
        for head, body in functions()
    ]


def prose(*, min_characters: int = 300) -> list[dict[str, str]]:
    """Return the longer paragraphs of the language reference that Python's `help()` shows."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return [{"text": text} for text in paragraphs if len(text) >= min_characters]


def indented_share(completions: list[str], **_: Any) -> list[float | None]:
    """Reward each completion with the share of its lines that stay inside the function body."""
    rewards: list[float | None] = []
    for completion in completions:
        lines = [line for line in completion.splitlines() if line.strip()]
        rewards.append(sum(line.startswith("    ") for line in lines) / max(len(lines), 1))
    return rewards


def tune(out: Path) -> None:
    """Build every checkpoint of the demo that is missing or was built from something else."""
    base = build_base(out)
    for name, run in RUNS.items():
        record = {
            "run": run,
            "common": COMMON,
            "base_sha256": sha256(base / "model.safetensors"),
            # The data and the reward are code in this file, so an edit of it trains again.
            "code_sha256": sha256(Path(__file__)),
            "trl": trl.__version__,
        }
        build_once(out / name, record=record, build=partial(train, name=name, base=base))


def train(folder: Path, *, name: str, base: Path) -> None:
    """Train one run from the base and store the result in bfloat16."""
    # The steps are too small for bfloat16 weights: most of them would be rounded away one by one.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with TemporaryDirectory() as scratch:
        trainer = TRAINERS[name](model, tokenizer, {"output_dir": scratch, **COMMON, **RUNS[name]})
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Read the command line and build the demo's checkpoints."""
    parser = argparse.ArgumentParser(description="Train the checkpoints of the release demo.")
    parser.add_argument("out", type=Path, help="folder that receives base/, sft/, dpo/ and grpo/")
    # TRL 1.16 still asks for a property that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tune(parser.parse_args().out)


if __name__ == "__main__":
    main()
