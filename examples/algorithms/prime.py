"""PRIME: process rewards that come out of outcome labels alone (arXiv 2502.01456).

A second model learns to tell good texts from bad ones by how much likelier it finds them than the
reference does. That log-ratio, token by token, is then a reward for each token, beside the outcome
of the whole text; both are taken against what the other completions of the same prompt got.

Shorter than the paper's: one optimiser step on each batch of rollouts, so that a clip of the ratio
would never bind and there is none; process rewards from the reward model as it was before it learnt
from the batch. Prompts whose completions all fared alike teach the policy nothing, as there.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from rollouts import log_probs, mean_written, read, sample
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Outcome = Callable[[list[str]], Sequence[float]]

BETA = 0.05
NEW_TOKENS = 32
COMPLETIONS = 4  # of each prompt
REWARD_LEARNING_RATE = 1e-6
REWARD_GRAD_NORM = 10.0


def train_prime(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    outcome: Outcome,
    *,
    steps: int,
    batch_size: int,
) -> None:
    """Train `model` in place; `optimizer` owns its parameters; outcomes lie in [0, 1]."""
    reference = deepcopy(model).requires_grad_(False)
    rewarder = deepcopy(model)
    reward_optimizer = torch.optim.AdamW(
        rewarder.parameters(), lr=REWARD_LEARNING_RATE, weight_decay=0
    )
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (batch_size // COMPLETIONS,)).tolist()
        asked = [prompts[i] for i in chosen for _ in range(COMPLETIONS)]
        batch = sample(model, tokenizer, asked, new_tokens=NEW_TOKENS)
        scores = torch.tensor(outcome(batch.completions), dtype=torch.float32)

        usual = log_probs(read(reference, batch), batch)
        process = BETA * (log_probs(read(rewarder, batch), batch) - usual) * batch.written
        loss = nn.functional.binary_cross_entropy_with_logits(process.sum(1), scores)
        reward_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rewarder.parameters(), REWARD_GRAD_NORM)
        reward_optimizer.step()

        process = process.detach()
        baseline = _of_the_others(process.sum(1) / batch.written.sum(1))
        to_come = ((process - baseline[:, None]) * batch.written).flip(1).cumsum(1).flip(1)
        advantages = (scores - _of_the_others(scores))[:, None] + to_come
        advantages = advantages * _fared_differently(scores)[:, None]

        optimizer.zero_grad()
        (-mean_written(advantages * log_probs(read(model, batch), batch), batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _of_the_others(values: Tensor) -> Tensor:
    """Return, for each completion, the mean over the others of its prompt."""
    groups = values.view(-1, COMPLETIONS)
    return ((groups.sum(1, keepdim=True) - groups) / (COMPLETIONS - 1)).flatten()


def _fared_differently(scores: Tensor) -> Tensor:
    """Return whether the completions of its prompt differ in outcome, for each completion."""
    groups = scores.view(-1, COMPLETIONS)
    return (groups.amax(1) > groups.amin(1)).repeat_interleave(COMPLETIONS)
