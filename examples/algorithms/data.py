"""What the algorithms learn from: the release demo's base, its data and its reward.

Code whose functions have bodies is what the base was trained on, so it is near to what the base
writes by itself; prose is far from it.
"""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "release"))

from laboratory import Settings, build_base, build_once
from rollouts import sample
from tune import functions, indented_share, preferences, prose, sha256

__all__ = [
    "Settings",
    "build_base",
    "build_once",
    "indented_share",
    "judged",
    "preferences",
    "prompts",
    "prose",
    "rejection_sampled",
    "sha256",
]


def prompts() -> list[str]:
    """Return the heads of functions, which a policy completes."""
    return [head for head, _ in functions()]


def judged() -> list[dict[str, object]]:
    """Return functions whose body is desirable in its own order and not in reverse."""
    rows: list[dict[str, object]] = []
    for row in preferences():
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return rows


def rejection_sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, seed: int
) -> list[dict[str, str]]:
    """Return completions by `model` itself, those alone that the reward is pleased with."""
    torch.manual_seed(seed)
    kept: list[dict[str, str]] = []
    for start in range(0, len(prompts()), 32):
        batch = sample(model, tokenizer, prompts()[start : start + 32], new_tokens=32)
        rewards = indented_share(batch.completions)
        kept += [
            {"text": prompt + completion}
            for prompt, completion, reward in zip(
                batch.prompts, batch.completions, rewards, strict=True
            )
            if reward == 1
        ]
        if len(kept) >= count:
            break
    return kept[:count]
