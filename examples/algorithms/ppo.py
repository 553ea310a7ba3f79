"""Proximal policy optimisation of a language model, as short as it can be read.

Each step the policy completes some prompts; a reward for the text comes with the last token, and a
price for leaving the reference with every token. A value head learns to foresee them; what turned
out better than foreseen is made likelier, within the clip. TRL has no trainer for it any more.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from rollouts import Rollouts, clipped_loss, log_probs, mean_written, sample
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[[list[str]], Sequence[float]]

KL_PRICE = 0.05
DISCOUNT_OF_ERRORS = 0.95  # the lambda of generalised advantage estimation
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
    """Train `model` in place; `optimizer` owns its parameters."""
    reference = deepcopy(model).requires_grad_(False)
    value_head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(value_head.weight)
    value_optimizer = torch.optim.AdamW(value_head.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (batch_size,)).tolist()
        batch = sample(model, tokenizer, [prompts[i] for i in chosen], new_tokens=NEW_TOKENS)
        old, values = _forward(model, value_head, batch)
        old, values = old.detach(), values.detach()
        with torch.no_grad():
            output = reference(batch.tokens, attention_mask=batch.present)
            likely = log_probs(output.logits, batch.tokens)
        rewards = _rewards(torch.tensor(reward(batch.completions)), old - likely, batch)
        advantages = _advantages(rewards, values, batch)
        returns = advantages + values
        centred = advantages - mean_written(advantages, batch)
        scaled = centred / (mean_written(centred.square(), batch).sqrt() + 1e-8)
        for _ in range(EPOCHS):
            new, foreseen = _forward(model, value_head, batch)
            loss = clipped_loss(new, old, scaled, batch)
            loss = loss + 0.5 * mean_written((foreseen - returns).square(), batch)
            optimizer.zero_grad()
            value_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value_optimizer.step()


def _forward(
    model: PreTrainedModel, value_head: nn.Module, batch: Rollouts
) -> tuple[Tensor, Tensor]:
    output = model(batch.tokens, attention_mask=batch.present, output_hidden_states=True)
    # The head looks on: it learns from the policy's states and does not shape them.
    values = value_head(output.hidden_states[-1][:, :-1].detach()).squeeze(-1)
    return log_probs(output.logits, batch.tokens), values * batch.written


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
        following = (error + DISCOUNT_OF_ERRORS * following) * batch.written[:, position]
        next_value = values[:, position]
        advantages.append(following)
    return torch.stack(advantages[::-1], dim=1)
