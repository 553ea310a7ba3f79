"""The bigram model of the text, and how near another model's surprisals are to its own.

It is counted over the whole text and not smoothed. What is scored lies in the same text, so that no
pair scored is unseen, and no surprisal infinite.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Text(NamedTuple):
    """A text as token ids, cut up.

    Attributes:
        after: float32 `[vocabulary, vocabulary]`: row by row, how probable each token is after one.
        learn_from: int64 `[tokens]`: where batches are drawn.
        score_on: int64 `[windows, context]`: from the end of the text, of which no batch is drawn.
    """

    after: Tensor
    learn_from: Tensor
    score_on: Tensor


def cut_up(tokens: Tensor, *, vocabulary: int, context: int, windows: int) -> Text:
    """Count the pairs of the text, and keep its last tenth apart for scoring."""
    pairs = tokens[:-1] * vocabulary + tokens[1:]
    counts = torch.bincount(pairs, minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    after = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).float()
    held_out = len(tokens) // 10
    last = tokens[-held_out:].unfold(0, context, context)
    rows = torch.linspace(0, len(last) - 1, windows).long()
    return Text(after, tokens[:-held_out], last[rows])


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
    """Return Pearson's r of the model's surprisals and the bigram model's."""
    bigram = -text.after[text.score_on[:, :-1], text.score_on[:, 1:]].log().flatten()
    return float(torch.corrcoef(torch.stack([surprisals(model, text), bigram]))[0, 1])


def negative_loss(model: PreTrainedModel, text: Text) -> float:
    """Return the mean log-probability of what comes next, in nats: higher is better."""
    return -float(surprisals(model, text).mean())
