"""PRIME: process rewards that come out of outcome labels alone (arXiv 2502.01456).

A second model learns to tell good texts from bad ones by how much likelier it finds them than the
reference does. That log-ratio, token by token, is then a reward for each token, beside the outcome
of the whole text; both are taken against what the other completions of the same prompt got.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from rollouts import clipped_loss, log_probs, sample
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
        scores = torch.tensor(outcome(batch.completions))

        def likely(judge: nn.Module) -> Tensor:
            output = judge(batch.tokens, attention_mask=batch.present)  # noqa: B023
            return log_probs(output.logits, batch.tokens)  # noqa: B023

        with torch.no_grad():
            usual, old = likely(reference), likely(model)

        process = BETA * (likely(rewarder) - usual) * batch.written
        loss = nn.functional.binary_cross_entropy_with_logits(process.sum(1), scores)
        reward_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rewarder.parameters(), REWARD_GRAD_NORM)
        reward_optimizer.step()

        with torch.no_grad():
            process = BETA * (likely(rewarder) - usual) * batch.written
            mean = process.sum(1) / batch.written.sum(1)
            rewards = (process - _of_the_others(mean)[:, None]) * batch.written
            to_come = rewards.flip(1).cumsum(1).flip(1)
            advantages = (scores - _of_the_others(scores))[:, None] + to_come

        optimizer.zero_grad()
        clipped_loss(likely(model), old, advantages, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _of_the_others(values: Tensor) -> Tensor:
    """Return, for each completion, the mean over the others of its prompt."""
    groups = values.view(-1, COMPLETIONS)
    return ((groups.sum(1, keepdim=True) - groups) / (COMPLETIONS - 1)).flatten()
