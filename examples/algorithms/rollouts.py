"""What a policy writes, and how likely a model finds each token of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass(frozen=True)
class Rollouts:
    """Prompts and their completions, as text and as rows of token ids.

    `tokens` and `present` are `[rows, tokens]`; `written`, `[rows, tokens - 1]`, marks the tokens
    after the first that the policy wrote, up to and with the end of the text.
    """

    prompts: Sequence[str]
    completions: list[str]
    tokens: Tensor
    present: Tensor
    written: Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int,
) -> Rollouts:
    """Complete each prompt once, each token drawn as the model finds it likely."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    length = batch["input_ids"].shape[1]
    new = tokens[:, length:]
    ended = (new == tokenizer.eos_token_id).long()
    is_written = ended.cumsum(1) - ended == 0
    written = torch.zeros_like(tokens[:, 1:])
    written[:, length - 1 :] = is_written
    return Rollouts(
        prompts=prompts,
        completions=tokenizer.batch_decode(new, skip_special_tokens=True),
        tokens=tokens,
        present=torch.cat([batch["attention_mask"], is_written.long()], dim=1),
        written=written.float(),
    )


def read(model: PreTrainedModel, rollouts: Rollouts, **options: Any) -> CausalLMOutputWithPast:
    """Let `model` read the rollouts, as it would have written them."""
    return model(
        rollouts.tokens,
        attention_mask=rollouts.present,
        position_ids=(rollouts.present.cumsum(1) - 1).clamp(min=0),  # prompts are padded in front
        **options,
    )


def log_probs(output: CausalLMOutputWithPast, rollouts: Rollouts) -> Tensor:
    """Return the log-probability of each token after the first, `[rows, tokens - 1]`."""
    nearest = output.logits[:, :-1].log_softmax(-1)
    return nearest.gather(-1, rollouts.tokens[:, 1:, None]).squeeze(-1)


def mean_written(values: Tensor, rollouts: Rollouts) -> Tensor:
    """Return the mean over the tokens that the policy wrote."""
    return (values * rollouts.written).sum() / rollouts.written.sum()
