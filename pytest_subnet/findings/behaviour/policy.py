"""Whether training data is what the model before training would itself have written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pytest_subnet import progress
from pytest_subnet.errors import SubnetError
from pytest_subnet.findings.behaviour.counts import log_probabilities
from pytest_subnet.findings.behaviour.models import asked, fingerprints, one_model
from pytest_subnet.findings.behaviour.prompts import (
    batches,
    check_ids,
    check_lengths,
    read_prompts,
)
from pytest_subnet.findings.behaviour.texts import not_a_number, off_policy
from pytest_subnet.findings.common.bounds import check_limit, check_message
from pytest_subnet.findings.common.result import Message, finite_or_none, reworded
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedTokenizerBase

    from pytest_subnet.findings.behaviour.finding import Loaded
    from pytest_subnet.findings.behaviour.models import Model
    from pytest_subnet.findings.behaviour.prompts import Batch, Prompts

    Policy: TypeAlias = torch.nn.Module | tuple[torch.nn.Module, PreTrainedTokenizerBase] | Loaded


class SampleLikelihood(NamedTuple):
    """How likely one sample is under the base.

    Attributes:
        number: its place among the samples, from 0.
        text: how it starts, escaped; empty where token ids were given.
        tokens: predictions counted: its tokens but the first.
        nll: mean negative log-likelihood of them, nats.
    """

    number: int
    text: str
    tokens: int
    nll: float


@dataclass(frozen=True, slots=True, repr=False)
class NearPolicy:
    """How likely some data is under the model before training.

    Attributes:
        model: where it was loaded from, or what class it is.
        device: where it is.
        dtype: of its weights.
        vocabulary: tokens among which it chooses.
        per_sample: the samples, in the order given.
        fingerprints: of the content of the model and of the samples; each is taken when it is
            asked for.
    """

    model: str
    device: str
    dtype: str
    vocabulary: int
    per_sample: tuple[SampleLikelihood, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def samples(self) -> int:
        """How many samples."""
        return len(self.per_sample)

    @property
    def tokens(self) -> int:
        """Predictions counted: the tokens of all samples but the first of each."""
        return sum(each.tokens for each in self.per_sample)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, nats, over all that are predicted."""
        return math.fsum(each.nll * each.tokens for each in self.per_sample) / self.tokens

    @property
    def perplexity(self) -> float:
        """How many tokens alike would be as uncertain: exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def chance_nll(self) -> float:
        """What it would be if every token of the vocabulary were as likely as any other."""
        return math.log(self.vocabulary)

    def rows(self) -> list[dict[str, object]]:
        """One row a sample, for tables and reports."""
        return [
            {
                "sample": f"{each.number}",
                "text": each.text,
                "tokens": f"{each.tokens:,}",
                "NLL": f"{each.nll:.4g}",
            }
            for each in self.per_sample
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        rows = table(self.rows(), right=["sample", "tokens", "NLL"])
        return f"{facts(repr(self), self.measured())}\n\n{rows}"

    def measured(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        counted = f"{plural(self.samples, 'sample')}, {plural(self.tokens, 'token')} predicted"
        under = f"{self.dtype}, {self.device}, {counted} among {self.vocabulary:,}"
        return [("model", f"{self.model}   ({under})")]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "near_policy",
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "vocabulary": self.vocabulary,
            "samples": self.samples,
            "tokens": self.tokens,
            "nll": finite_or_none(self.nll),
            "perplexity": finite_or_none(self.perplexity),
            "chance_nll": self.chance_nll,
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"NearPolicy(nll={self.nll:.6g}, perplexity={self.perplexity:.6g}, "
            f"chance_nll={self.chance_nll:.6g}, {plural(self.samples, 'sample')}, "
            f"{plural(self.tokens, 'token')})"
        )


def near_policy(model: Policy, samples: Prompts) -> NearPolicy:
    """Measure how likely training data is under the model before training.

    Data is in-distribution when that model would write it: it is what the policy samples, or what
    it was tuned on before. Reinforcement learning on such data changes few weights, on other data
    nearly all of them.

    Args:
        model: the base, which takes `input_ids` and `attention_mask` and gives logits; as
            `(model, tokenizer)` where the samples are texts. Of a pair, as `causal_lm_pair` gives
            it, the base is taken.
        samples: texts, with their prompts, as the trainer sees them; or token ids, as a tensor
            `[samples, tokens]` without padding, or as lists. Every token but the first counts.

    Returns:
        The mean negative log-likelihood of a token, in nats, in all and by sample.

    Raises:
        TypeError: no loaded model that predicts the next token, no samples, or texts without a
            tokenizer.
        ValueError: no samples, one of fewer than two tokens, longer than the context, or with an
            id that is not in the vocabulary.
        SubnetError: the model predicts NaN.

    Source: arXiv 2505.11711, section 6: training on in-distribution data as the cause of sparsity.

    >>> class Bigram(torch.nn.Embedding):
    ...     def forward(self, input_ids, attention_mask):
    ...         return super().forward(input_ids)
    >>> near_policy(Bigram(4, 4, _weight=torch.zeros(4, 4)), [[0, 1, 2], [3, 0]])
    NearPolicy(nll=1.38629, perplexity=4, chance_nll=1.38629, 2 samples, 3 tokens)
    """
    result = _measured(model, samples)
    record(result)
    return result


def assert_near_policy(
    model: Policy, samples: Prompts, *, max_nll: float, message: Message | None = None
) -> NearPolicy:
    """Fail if training data is not what the model before training would write.

    Valid usages:
        assert_near_policy(causal_lm_pair, rollouts, max_nll=1.0)
        assert_near_policy((model, tokenizer), texts, max_nll=1.0)

    Args:
        model: as in `near_policy`.
        samples: likewise.
        max_nll: the largest mean negative log-likelihood of a token, nats. Of what a model samples
            by itself it is the entropy of the model; of any text, about the logarithm of the
            vocabulary at worst.
        message: rewords a failure.

    Returns:
        What `near_policy` measured.

    Raises:
        AssertionError: the data is less likely.
        TypeError: as in `near_policy`.
        ValueError: likewise; `max_nll` negative or not finite.
        SubnetError: as in `near_policy`.

    >>> class Bigram(torch.nn.Embedding):
    ...     def forward(self, input_ids, attention_mask):
    ...         return super().forward(input_ids)
    >>> base = Bigram(3, 3, _weight=4 * torch.eye(3))       # it repeats itself
    >>> assert_near_policy(base, [[0, 0, 0], [1, 1]], max_nll=0.5).tokens
    3
    """
    __tracebackhide__ = True
    check_limit("max_nll", max_nll)
    check_message(message)
    result = near_policy(model, samples)
    if not result.nll <= max_nll:
        raise AssertionError(reworded(off_policy(result, max_nll), message))
    return result


def _measured(given: object, samples: Prompts) -> NearPolicy:
    model, tokenizer = _base_of(given)
    read = read_prompts(samples, tokenizer, "sample")
    check_ids(read, model.embeddings, "sample")
    check_lengths(read, model.context, 0, "sample")
    vocabulary = 0
    found: dict[int, float] = {}
    with (
        asked(model),
        progress.bar(sum(len(each.ids) for each in read), "samples", unit=" tokens") as advance,
    ):
        for batch in batches(read):
            logits = model.logits(batch)
            vocabulary = logits.shape[1]
            check_ids(batch.prompts, vocabulary, "sample")
            found |= _nll(model, batch, logits)
            advance(int(batch.attention.sum()))
    return NearPolicy(
        model=model.label,
        device=str(model.device),
        dtype=model.dtype,
        vocabulary=vocabulary,
        per_sample=tuple(
            SampleLikelihood(each.number, each.text, len(each.ids) - 1, found[each.number])
            for each in read
        ),
        fingerprints=fingerprints([model], read),
    )


def _base_of(given: object) -> tuple[Model, PreTrainedTokenizerBase | None]:
    """The model that is meant, and its tokenizer."""
    import torch

    if not isinstance(given, tuple | list):
        return one_model("base", given), None
    if len(given) == 2 and not isinstance(given[1], torch.nn.Module):
        return one_model("base", given[0]), given[1]
    if len(given) in (2, 3):
        return one_model("base", given[0]), given[2] if len(given) == 3 else None
    raise TypeError(
        "a model is needed, (model, tokenizer), or a pair as the fixture causal_lm_pair gives it, "
        f"got {safe(type(given).__name__)} of {len(given)}"
    )


def _nll(model: Model, batch: Batch, logits: torch.Tensor) -> dict[int, float]:
    """The mean of each sample of a batch, by its number."""
    places, targets = (each.to(logits.device) for each in batch.predictions())
    logs = log_probabilities(logits, places, targets)
    ends = np.cumsum([len(sample.ids) - 1 for sample in batch.prompts])
    found = {}
    for sample, part in zip(batch.prompts, np.split(logs, ends[:-1]), strict=True):
        wrong = np.flatnonzero(np.isnan(part))
        if wrong.size:
            text = not_a_number(model.role, model.label, sample, int(wrong[0]), "sample")
            raise SubnetError(text)
        found[sample.number] = -float(part.mean())
    return found
