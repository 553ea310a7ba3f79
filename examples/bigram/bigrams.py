"""The bigram model of the text, and how near another model's surprisals are to its own.

It is counted over nine tenths of the text and not smoothed; what is scored lies in the last tenth.
Pairs there that were never counted have no surprisal and are left out of the comparison.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Text(NamedTuple):
    """A text as token ids, cut up.

    Attributes:
        after: float32 `[vocabulary, vocabulary]`: row by row, how probable each token is after one.
        learn_from: int64 `[tokens]`: where pairs are counted and batches are drawn.
        score_on: int64 `[windows, context]`: from the end of the text, where neither is.
    """

    after: Tensor
    learn_from: Tensor
    score_on: Tensor


def cut_up(tokens: Tensor, *, vocabulary: int, context: int, windows: int) -> Text:
    """Keep the last tenth of the text apart for scoring, and count the pairs of the rest."""
    held_out = len(tokens) // 10
    learn_from = tokens[:-held_out]
    pairs = learn_from[:-1] * vocabulary + learn_from[1:]
    counts = torch.bincount(pairs, minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    after = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).float()
    last = tokens[-held_out:].unfold(0, context, context)
    rows = torch.linspace(0, len(last) - 1, windows).long()
    return Text(after, learn_from, last[rows])


def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of each next token: float32 `[windows, context - 1, vocabulary]`."""
    return model(tokens).logits[:, :-1].float().log_softmax(-1)


def surprisals(model: PreTrainedModel, text: Text) -> Tensor:
    """In nats, of each token scored but the first of its window: float32 `[tokens]`."""
    with torch.no_grad():
        found = [
            -log_probabilities(model, each).gather(-1, each[:, 1:, None]).flatten()
            for each in text.score_on.split(32)
        ]
    return torch.cat(found)


def correlation(model: PreTrainedModel, text: Text) -> float:
    """Return Pearson's r of the model's surprisals and the bigram model's, where it has one."""
    probable = bigram_probabilities(text)
    seen = probable > 0
    both = torch.stack([surprisals(model, text)[seen], -probable[seen].log()])
    return float(torch.corrcoef(both)[0, 1])


def bigram_probabilities(text: Text) -> Tensor:
    """Of each token scored but the first of its window: float32 `[tokens]`; 0 if never counted."""
    return text.after[text.score_on[:, :-1], text.score_on[:, 1:]].flatten()


def negative_loss(model: PreTrainedModel, text: Text) -> float:
    """Return the mean log-probability of what comes next, in nats: higher is better."""
    return -float(surprisals(model, text).mean())
