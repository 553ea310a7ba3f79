"""How each algorithm trains a model: by TRL where TRL has it, else by a loop of our own."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from data import indented_share, judged, preferences, prompts, prose, rejection_sampled
from datasets import Dataset
from ppo import train_ppo
from prime import train_prime
from runs import Run
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from pytest_subnet import SubnetworkCallback, UpdateMask, train_inside

CONTEXT = 128
NEW_TOKENS = 32

COMMON: dict[str, Any] = {
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    *,
    seed: int,
    mask: UpdateMask | None = None,
) -> None:
    """Train `model` as `run` says; of the entries outside `mask`, if there is one, none moves."""
    torch.manual_seed(seed)
    loop = LOOPS.get(run.algorithm)
    if loop is not None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0)
        with nullcontext() if mask is None else train_inside(model, optimizer, mask):
            loop(
                model,
                optimizer,
                tokenizer,
                prompts(),
                indented_share,
                steps=run.steps,
                batch_size=run.batch_size,
            )
        return
    with TemporaryDirectory() as scratch:
        args = {
            "output_dir": scratch,
            "seed": seed,
            "learning_rate": run.learning_rate,
            "max_steps": run.steps,
            "per_device_train_batch_size": run.batch_size,
            **COMMON,
            **run.options,
        }
        trainer = TRAINERS[run.algorithm](model, tokenizer, args)
        trainer.remove_callback(PrinterCallback)
        if mask is not None:
            trainer.add_callback(SubnetworkCallback(mask))
        trainer.train()


def make_grpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> Trainer:
    """Group-relative policy optimisation; `beta` is the price of leaving the reference."""
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(
            num_generations=8,
            max_completion_length=NEW_TOKENS,
            activation_checkpointing=False,
            **args,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts()]),
        reward_funcs=indented_share,
    )


def make_dpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> Trainer:
    """Direct preference optimisation."""
    return DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=DPOConfig(max_length=CONTEXT, activation_checkpointing=False, **args),
        train_dataset=Dataset.from_list(preferences()),
    )


def make_orpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> Trainer:
    """Odds-ratio preference optimisation: supervised and preferential at once."""
    return ORPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=ORPOConfig(max_length=CONTEXT, remove_unused_columns=False, **args),
        train_dataset=Dataset.from_list(preferences()),
    )


def make_simpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> Trainer:
    """Simple preference optimisation: no reference, likelihoods by length, a margin."""
    return CPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=CPOConfig(
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.0,
            simpo_gamma=1.0,
            max_length=CONTEXT,
            remove_unused_columns=False,
            **args,
        ),
        train_dataset=Dataset.from_list(preferences()),
    )


def make_kto(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> Trainer:
    """Kahneman-Tversky optimisation: each text is judged by itself."""
    return KTOTrainer(
        model=model,
        processing_class=tokenizer,
        args=KTOConfig(max_length=CONTEXT, activation_checkpointing=False, **args),
        # KTO takes its rows in their own order, whatever the seed.
        train_dataset=Dataset.from_list(judged()).shuffle(seed=args["seed"]),
    )


def make_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any, *, near: bool
) -> Trainer:
    """Supervised tuning on prose, or on what the base wrote itself and the reward likes."""
    rows = (
        rejection_sampled(model, tokenizer, count=4 * args["max_steps"], seed=args["seed"])
        if near
        else prose()
    )
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(max_length=CONTEXT, activation_checkpointing=False, **args),
        train_dataset=Dataset.from_list(rows),
    )


LOOPS: dict[str, Callable[..., None]] = {"ppo": train_ppo, "prime": train_prime}

TRAINERS: dict[str, Callable[..., Trainer]] = {
    "grpo": make_grpo,
    "dpo": make_dpo,
    "orpo": make_orpo,
    "kto": make_kto,
    "simpo": make_simpo,
    "sft-far": partial(make_sft, near=False),
    "sft-near": partial(make_sft, near=True),
}
