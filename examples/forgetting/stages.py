"""What is trained, one stage from the end of the other, and how.

A model learns both rules, is tuned on one with answers to copy, then on the same one with a reward.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from cards import questions
from datasets import Dataset
from laboratory_base import Settings, build_base, build_once, sha256
from learn import learn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Make = Callable[[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]], Trainer]

BASE = Settings(vocab_size=320, hidden_size=128, intermediate_size=344, layers=2, steps=20)
LEARNING_STEPS = 450


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of a trainer on the rule in distribution, from where the stage before ended."""

    learning_rate: float
    steps: int
    save_every: int


STAGES = {
    "sft": Stage(learning_rate=5e-5, steps=200, save_every=50),
    "rl": Stage(learning_rate=2e-5, steps=100, save_every=50),
}

COMMON: dict[str, Any] = {
    "seed": 0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "steps",
    "save_only_model": True,
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def build(out: Path, *, short: bool) -> Path:
    """Train what is missing and return the folder of the stages."""
    folder = out / "forgetting"
    base = build_base(folder, settings=replace(BASE, steps=1) if short else BASE)
    steps = 2 if short else LEARNING_STEPS
    before = build_once(
        folder / "learnt",
        record=_record(base, {"steps": steps}),
        build=partial(_learn, base=base, steps=steps),
    )
    for name, stage in STAGES.items():
        if short:
            stage = replace(stage, steps=2, save_every=1)
        build_once(
            folder / name,
            record=_record(before, asdict(stage)),
            build=partial(_train, make=TRAINERS[name], before=before, stage=stage),
        )
        before = folder / name / f"checkpoint-{stage.steps}"
    return folder


def _record(before: Path, settings: dict[str, Any]) -> dict[str, Any]:
    here = Path(__file__).parent
    return {
        "settings": settings,
        "before_sha256": sha256(before / "model.safetensors"),
        "code_sha256": {
            name: sha256(here / name) for name in ("cards.py", "learn.py", "stages.py")
        },
        "trl": trl.__version__,
    }


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Steps this small would be rounded away one by one in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _learn(folder: Path, *, base: Path, steps: int) -> None:
    model, tokenizer = _load(base)
    learn(model, tokenizer, steps=steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(folder: Path, *, make: Make, before: Path, stage: Stage) -> None:
    args = {
        "output_dir": str(folder),
        "learning_rate": stage.learning_rate,
        "max_steps": stage.steps,
        "save_steps": stage.save_every,
        **COMMON,
    }
    trainer = make(*_load(before), args)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def make_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: dict[str, Any]
) -> Trainer:
    """Supervised fine-tuning on questions with their answers."""
    rows = [
        {"prompt": each.prompt, "completion": each.answer}
        for each in questions("in", held_out=False)
    ]
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(max_length=32, **args),
        train_dataset=Dataset.from_list(rows),
    )


def make_grpo(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: dict[str, Any]
) -> Trainer:
    """Reinforcement learning on the same questions, with the right answer for a reward."""
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(num_generations=8, max_completion_length=3, beta=0.0, **args),
        train_dataset=Dataset.from_list(
            [each._asdict() for each in questions("in", held_out=False)]
        ),
        reward_funcs=is_right,
    )


def is_right(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """Reward a completion that is the answer and nothing else."""
    return [float(one == other) for one, other in zip(completions, answer, strict=True)]


TRAINERS: dict[str, Make] = {"sft": make_sft, "rl": make_grpo}
