"""How differently two models predict the next token, whatever became of their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from pytest_subnet import progress
from pytest_subnet.errors import PairMismatchError, SubnetError
from pytest_subnet.findings.behaviour.counts import compared
from pytest_subnet.findings.behaviour.generation import check_generates, continuations
from pytest_subnet.findings.behaviour.models import (
    asked,
    check_tokenizers,
    fingerprints,
    smallest,
    two_models,
)
from pytest_subnet.findings.behaviour.prompts import (
    batches,
    check_ids,
    check_lengths,
    read_prompts,
)
from pytest_subnet.findings.behaviour.texts import behaves_the_same, not_a_number, too_different
from pytest_subnet.findings.common.bounds import check_limit, check_message
from pytest_subnet.findings.common.result import Message, finite_or_none, reworded
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from pytest_subnet.findings.behaviour.generation import Continuations
    from pytest_subnet.findings.behaviour.models import Model
    from pytest_subnet.findings.behaviour.prompts import Batch, Prompt, Prompts

    Loaded: TypeAlias = (
        tuple[torch.nn.Module, torch.nn.Module]
        | tuple[torch.nn.Module, torch.nn.Module, PreTrainedTokenizerBase | None]
    )

Vocab: TypeAlias = Literal["strict", "common"]


class PromptShift(NamedTuple):
    """How differently two models go on at each token of one prompt.

    Attributes:
        number: its place among the prompts, from 0.
        text: how it starts, escaped; empty where token ids were given.
        tokens: predictions compared: its tokens but the first.
        kl: mean over them of KL(base || tuned), nats.
        reverse_kl: mean over them of KL(tuned || base), nats.
        max_kl: the largest KL(base || tuned) of a prediction.
        agreed: predictions in which both have the same first choice.
        base_logprob: mean log-probability of the token that follows, under the base.
        tuned_logprob: likewise under the tuned model.
        first_difference: the first token that both write differently, from 0; None where they
            write the same, or nothing was asked for.
    """

    number: int
    text: str
    tokens: int
    kl: float
    reverse_kl: float
    max_kl: float
    agreed: int
    base_logprob: float
    tuned_logprob: float
    first_difference: int | None = None

    @property
    def top1_agreement(self) -> float:
        """Share of predictions in which both have the same first choice."""
        return self.agreed / self.tokens

    @property
    def logprob_shift(self) -> float:
        """Mean log-probability of the token that follows, tuned minus base, nats."""
        return self.tuned_logprob - self.base_logprob


@dataclass(frozen=True, slots=True, repr=False)
class BehaviourShift:
    """How differently two models predict the next token on some prompts.

    All means are over predictions: a long prompt counts for more than a short one.

    Attributes:
        pair: `base -> tuned`: where they were loaded from, or what class they are.
        device: where they are.
        dtype: of their weights; `base -> tuned` where they differ.
        vocabulary: tokens among which was chosen.
        per_prompt: the prompts, in the order given.
        generated: tokens that each model could write after a prompt; 0 where none were asked for.
        notes: what was left out.
        fingerprints: of the content of base and tuned, and of the prompts; each is taken when it
            is asked for.
    """

    pair: str
    device: str
    dtype: str
    vocabulary: int
    per_prompt: tuple[PromptShift, ...]
    generated: int = 0
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def prompts(self) -> int:
        """How many prompts."""
        return len(self.per_prompt)

    @property
    def tokens(self) -> int:
        """Predictions compared: the tokens of all prompts but the first of each."""
        return sum(each.tokens for each in self.per_prompt)

    @property
    def kl(self) -> float:
        """Mean of KL(base || tuned), nats: what the base would miss of itself."""
        return self._mean([each.kl for each in self.per_prompt])

    @property
    def reverse_kl(self) -> float:
        """Mean of KL(tuned || base), nats."""
        return self._mean([each.reverse_kl for each in self.per_prompt])

    @property
    def max_kl(self) -> float:
        """The largest KL(base || tuned) of a single prediction."""
        return max(each.max_kl for each in self.per_prompt)

    @property
    def top1_agreement(self) -> float:
        """Share of predictions in which both have the same first choice."""
        return sum(each.agreed for each in self.per_prompt) / self.tokens

    @property
    def base_logprob(self) -> float:
        """Mean log-probability of the token that follows, under the base."""
        return self._mean([each.base_logprob for each in self.per_prompt])

    @property
    def tuned_logprob(self) -> float:
        """Likewise under the tuned model."""
        return self._mean([each.tuned_logprob for each in self.per_prompt])

    @property
    def logprob_shift(self) -> float:
        """Mean log-probability of the token that follows, tuned minus base, nats."""
        return self.tuned_logprob - self.base_logprob

    @property
    def identical(self) -> bool:
        """Whether no prediction differs at all."""
        return all(
            each.kl == each.reverse_kl == 0 and each.base_logprob == each.tuned_logprob
            for each in self.per_prompt
        )

    @property
    def generations_equal(self) -> float | None:
        """Share of prompts after which both write the same; None where nothing was asked for."""
        if not self.generated:
            return None
        return sum(each.first_difference is None for each in self.per_prompt) / self.prompts

    def rows(self) -> list[dict[str, object]]:
        """One row a prompt, for tables and reports."""
        return [
            {
                "prompt": f"{each.number}",
                "text": each.text,
                "tokens": f"{each.tokens:,}",
                "KL": f"{each.kl:.3g}",
                "reverse KL": f"{each.reverse_kl:.3g}",
                "max KL": f"{each.max_kl:.3g}",
                "same first choice": percent(each.top1_agreement),
                "log-prob shift": f"{each.logprob_shift:+.3g}",
                **({"writes": _writes(each)} if self.generated else {}),
            }
            for each in self.per_prompt
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["prompt", "tokens", "KL", "reverse KL", "max KL", "same first choice"]
        rows = table(self.rows(), right=[*numbers, "log-prob shift"])
        return f"{facts(repr(self), self.measured())}\n\n{rows}"

    def measured(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        counted = f"{plural(self.prompts, 'prompt')}, {plural(self.tokens, 'token')} predicted"
        under = f"{self.dtype}, {self.device}, {counted} among {self.vocabulary:,}"
        lines = [("pair", f"{self.pair}   ({under})")]
        return lines + column("note", self.notes)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "behaviour_shift",
            "pair": self.pair,
            "device": self.device,
            "dtype": self.dtype,
            "vocabulary": self.vocabulary,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "kl": finite_or_none(self.kl),
            "reverse_kl": finite_or_none(self.reverse_kl),
            "max_kl": finite_or_none(self.max_kl),
            "top1_agreement": self.top1_agreement,
            "base_logprob": finite_or_none(self.base_logprob),
            "tuned_logprob": finite_or_none(self.tuned_logprob),
            "logprob_shift": finite_or_none(self.logprob_shift),
            "identical": self.identical,
            "generated": self.generated,
            "generations_equal": self.generations_equal,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        written = (
            f", generations_equal={self.generations_equal:.6g}"
            if self.generations_equal is not None
            else ""
        )
        return (
            f"BehaviourShift(kl={self.kl:.6g}, reverse_kl={self.reverse_kl:.6g}, "
            f"top1_agreement={self.top1_agreement:.6g}, logprob_shift={self.logprob_shift:+.6g}"
            f"{written}, {plural(self.prompts, 'prompt')}, {plural(self.tokens, 'token')})"
        )

    def _mean(self, values: Sequence[float]) -> float:
        weighted = (
            value * each.tokens for value, each in zip(values, self.per_prompt, strict=True)
        )
        return math.fsum(weighted) / self.tokens


def _writes(prompt: PromptShift) -> str:
    if prompt.first_difference is None:
        return "the same"
    return f"another token {prompt.first_difference}"


def behaviour_shift(
    pair: Loaded, prompts: Prompts, *, vocab: Vocab = "strict", generate: int = 0
) -> BehaviourShift:
    """Measure how differently two models predict each next token of some prompts.

    Both see the same batches, of prompts of about one length, on the devices they are on and in
    the mode for inference; afterwards they are in the mode in which they were. Divergences are
    formed in float32 from the logits that the models give. The first token of a prompt is not
    predicted, padding is not counted.

    Args:
        pair: what the fixture `causal_lm_pair` gives, or any two modules `(base, tuned)` that take
            `input_ids` and `attention_mask` and give logits `[prompts, tokens, vocabulary]`.
        prompts: texts, which the tokenizer of the pair reads as it is set up to; or token ids, as
            a tensor `[prompts, tokens]` without padding, or as lists.
        vocab: `"common"` chooses among the tokens that both models have, where one has more, and
            says so; `"strict"` refuses such a pair.
        generate: how many tokens each model writes after each prompt, its first choice every time;
            0 leaves that out.

    Returns:
        Divergence, agreement and log-probabilities, over all predictions and by prompt.

    Raises:
        TypeError: no pair of loaded models that predict the next token, no prompts, or texts
            without a tokenizer.
        ValueError: no prompts, one of fewer than two tokens, longer than the context, or with an
            id that is not in the vocabulary; an unknown `vocab`, or `generate` below 0.
        PairMismatchError: both are one module, have vocabularies of different size, or tokenizers
            under which ids mean different texts.
        SubnetError: a model predicts NaN.

    Source: forward KL as the predictor of forgetting, arXiv 2509.04259.

    >>> class Bigram(torch.nn.Embedding):
    ...     def forward(self, input_ids, attention_mask):
    ...         return super().forward(input_ids)
    >>> base, tuned = (Bigram(3, 3, _weight=torch.eye(3) * size) for size in (1.0, 2.0))
    >>> result = behaviour_shift((base, tuned), torch.tensor([[0, 1, 1], [2, 1, 0]]))
    >>> result
    BehaviourShift(kl=0.111983, reverse_kl=0.098886, ... 2 prompts, 4 tokens)
    """
    result = _measured(pair, prompts, vocab, generate)
    record(result)
    return result


def assert_behaviour_close(
    pair: Loaded,
    prompts: Prompts,
    *,
    max_kl: float,
    vocab: Vocab = "strict",
    allow_identical: bool = False,
    message: Message | None = None,
) -> BehaviourShift:
    """Fail if the tuned model predicts too differently from the base.

    Fails too where nothing differs at all: a run that saved its base again stays close to it.

    Valid usages:
        assert_behaviour_close(causal_lm_pair, ["The capital of France is Paris."], max_kl=0.05)
        assert_behaviour_close((base, tuned), token_ids, max_kl=0.05)

    Args:
        pair: as in `behaviour_shift`.
        prompts: likewise.
        max_kl: the largest mean of KL(base || tuned) over all predictions, nats.
        vocab: as in `behaviour_shift`.
        allow_identical: accept models that predict the same to the last bit.
        message: rewords a failure.

    Returns:
        What `behaviour_shift` measured.

    Raises:
        AssertionError: the divergence is larger, or nothing differs.
        TypeError: as in `behaviour_shift`.
        ValueError: likewise; `max_kl` negative or not finite.
        PairMismatchError: as in `behaviour_shift`.
        SubnetError: likewise.

    >>> class Bigram(torch.nn.Embedding):
    ...     def forward(self, input_ids, attention_mask):
    ...         return super().forward(input_ids)
    >>> base, tuned = (Bigram(3, 3, _weight=torch.eye(3) * size) for size in (1.0, 1.1))
    >>> assert_behaviour_close((base, tuned), torch.tensor([[0, 1, 2]]), max_kl=0.01).identical
    False
    """
    __tracebackhide__ = True
    check_limit("max_kl", max_kl)
    check_message(message)
    result = behaviour_shift(pair, prompts, vocab=vocab)
    if result.identical and not allow_identical:
        raise AssertionError(reworded(behaves_the_same(result), message))
    if not result.kl <= max_kl:
        raise AssertionError(reworded(too_different(result, max_kl), message))
    return result


def _measured(pair: object, given: Prompts, vocab: str, generate: int) -> BehaviourShift:
    if vocab not in get_args(Vocab):
        raise ValueError(f"vocab={safe(repr(vocab))} is not one of 'strict', 'common'")
    if isinstance(generate, bool) or not isinstance(generate, int) or generate < 0:
        raise ValueError(f"generate={safe(repr(generate))} is not a number of tokens, 0 or more")
    base, tuned, tokenizer = two_models(pair)
    prompts = read_prompts(given, tokenizer, "prompt")
    check_ids(prompts, smallest(base.embeddings, tuned.embeddings), "prompt")
    check_lengths(prompts, smallest(base.context, tuned.context), generate, "prompt")
    check_tokenizers(base, tuned, prompts)
    if generate:
        check_generates(base, tuned)
    together = _Together(base, tuned, vocab)
    total = sum(len(each.ids) + generate for each in prompts)
    written: dict[int, Continuations] = {}
    with asked(base, tuned), progress.bar(total, "behaviour", unit=" tokens") as advance:
        for batch in batches(prompts):
            together.compare(batch)
            advance(int(batch.attention.sum()))
        if generate:
            written = continuations(base, tuned, prompts, generate, advance)
    return BehaviourShift(
        pair=f"{base.label} -> {tuned.label}",
        device=" -> ".join(dict.fromkeys((str(base.device), str(tuned.device)))),
        dtype=" -> ".join(dict.fromkeys((base.dtype, tuned.dtype))),
        vocabulary=together.vocabulary,
        per_prompt=tuple(
            _shift_of(prompt, together.found[prompt.number], written.get(prompt.number))
            for prompt in prompts
        ),
        generated=generate,
        notes=tuple(together.notes),
        fingerprints=fingerprints((base, tuned), prompts),
    )


class _Together:
    """Asks both models about one batch after the other; holds the logits of none but the last.

    Attributes:
        found: what was compared, by the number of the prompt.
        vocabulary: tokens among which both choose; 0 before the first batch.
        notes: what was left out.
    """

    def __init__(self, base: Model, tuned: Model, vocab: str) -> None:
        self.base, self.tuned, self.vocab = base, tuned, vocab
        self.found: dict[int, NDArray[np.float64]] = {}
        self.vocabulary = 0
        self.notes: list[str] = []

    def compare(self, batch: Batch) -> None:
        base, tuned = self.base.logits(batch), self.tuned.logits(batch)
        if not self.vocabulary:
            self._settle_vocabulary(base.shape[1], tuned.shape[1])
        size = self.vocabulary
        if any(int(prompt.ids.max()) >= size for prompt in batch.prompts):
            check_ids(batch.prompts, size, "prompt")
        places, targets = (each.to(base.device) for each in batch.predictions())
        counted = compared(base[:, :size], tuned[:, :size], places, targets)
        ends = np.cumsum([len(prompt.ids) - 1 for prompt in batch.prompts])
        parts = np.split(counted, ends[:-1])
        for row, (prompt, part) in enumerate(zip(batch.prompts, parts, strict=True)):
            wrong = np.flatnonzero(np.isnan(part).any(axis=1))
            if wrong.size:
                place = row * batch.ids.shape[1] + int(wrong[0])
                of_base = base[place, :size].double().log_softmax(-1).isnan().any()
                side = self.base if of_base else self.tuned
                raise SubnetError(not_a_number(side.role, side.label, prompt, int(wrong[0])))
            self.found[prompt.number] = part

    def _settle_vocabulary(self, base: int, tuned: int) -> None:
        self.vocabulary = min(base, tuned)
        if base == tuned:
            return
        if self.vocab == "strict":
            raise PairMismatchError(
                f"vocabularies of different size: {self.base.label} predicts {base:,} tokens, "
                f'{self.tuned.label} {tuned:,}; vocab="common" compares the first '
                f"{self.vocabulary:,} of both, as if there were no others"
            )
        more = f"{abs(base - tuned):,} {'more' if tuned > base else 'fewer'}"
        self.notes.append(f"{base:,} -> {tuned:,} tokens: {more}, of which none can be chosen here")


def _shift_of(
    prompt: Prompt, counted: NDArray[np.float64], written: Continuations | None
) -> PromptShift:
    kl, reverse_kl, agree, base, tuned = counted.T
    return PromptShift(
        number=prompt.number,
        text=prompt.text,
        tokens=len(counted),
        kl=float(kl.mean()),
        reverse_kl=float(reverse_kl.mean()),
        max_kl=float(kl.max()),
        agreed=int(agree.sum()),
        base_logprob=float(base.mean()),
        tuned_logprob=float(tuned.mean()),
        first_difference=None if written is None else written.first_difference,
    )
