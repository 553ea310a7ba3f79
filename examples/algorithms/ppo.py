"""Proximal policy optimisation of a language model, as short as it can be read.

The policy completes some prompts; a reward for the text comes with the last token, and a price for
leaving the reference with every token. A value head learns to foresee them. What turned out better
than foreseen is made likelier, within the clip, in two optimiser steps on the same rollouts.
Nothing is discounted. TRL has no trainer for it any more.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from rollouts import Rollouts, log_probs, mean_written, read, sample
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[[list[str]], Sequence[float]]

KL_PRICE = 0.05
CLIP = 0.2
GAE_LAMBDA = 0.95
EPOCHS = 2
NEW_TOKENS = 32


def train_ppo(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: Reward,
    *,
    steps: int,
    batch_size: int,
) -> None:
    """Train `model` in place for so many steps of `optimizer`, which owns its parameters."""
    reference = deepcopy(model).requires_grad_(False)
    value_head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(value_head.weight)
    value_optimizer = torch.optim.AdamW(value_head.parameters(), lr=1e-3)
    for _ in range(steps // EPOCHS):
        chosen = torch.randint(len(prompts), (batch_size,)).tolist()
        batch = sample(model, tokenizer, [prompts[i] for i in chosen], new_tokens=NEW_TOKENS)
        scores = torch.tensor(reward(batch.completions), dtype=torch.float32)
        with torch.no_grad():
            old, values = _read(model, value_head, batch)
            usual = log_probs(read(reference, batch), batch)
            advantages = _advantages(_rewards(scores, old - usual, batch), values, batch)
            returns = advantages + values
            centred = advantages - mean_written(advantages, batch)
            scaled = centred / (mean_written(centred.square(), batch).sqrt() + 1e-8)
        for _ in range(EPOCHS):
            new, foreseen = _read(model, value_head, batch)
            loss = _clipped_loss(new, old, scaled, batch)
            loss = loss + 0.5 * mean_written((foreseen - returns).square(), batch)
            optimizer.zero_grad()
            value_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value_optimizer.step()


def _read(model: PreTrainedModel, value_head: nn.Module, batch: Rollouts) -> tuple[Tensor, Tensor]:
    output = read(model, batch, output_hidden_states=True)
    # The head looks on: it learns from the policy's states and does not shape them.
    values = value_head(output.hidden_states[-1][:, :-1].detach()).squeeze(-1)
    return log_probs(output, batch), values * batch.written


def _rewards(scores: Tensor, log_ratio: Tensor, batch: Rollouts) -> Tensor:
    """Return the price of each token, and the score of the text on the last that was written."""
    rewards = -KL_PRICE * log_ratio * batch.written
    positions = torch.arange(batch.written.shape[1])
    last = (batch.written * positions).argmax(1)
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def _advantages(rewards: Tensor, values: Tensor, batch: Rollouts) -> Tensor:
    """Return how much better it went from each token on than the value head foresaw."""
    advantages, following, next_value = [], torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for position in reversed(range(rewards.shape[1])):
        error = rewards[:, position] + next_value - values[:, position]
        following = (error + GAE_LAMBDA * following) * batch.written[:, position]
        next_value = values[:, position]
        advantages.append(following)
    return torch.stack(advantages[::-1], dim=1)


def _clipped_loss(new: Tensor, old: Tensor, advantages: Tensor, batch: Rollouts) -> Tensor:
    """Nothing is gained by moving a token's probability further than the clip."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -mean_written(gain, batch)
