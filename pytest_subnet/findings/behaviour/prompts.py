"""Prompts: from texts or token ids to batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedTokenizerBase

    Prompts: TypeAlias = Sequence[str] | Sequence[Sequence[int]] | torch.Tensor

TOKENS = 1024
"""Tokens of a batch, padding among them: what is held at a time, however many prompts there are."""
_TEXT = 40
"""Characters of a prompt that a message shows."""


class Prompt(NamedTuple):
    """One prompt, as the models read it.

    Attributes:
        number: its place among those given, from 0.
        source: its text; empty where token ids were given.
        ids: its tokens, int64 on the CPU.
    """

    number: int
    source: str
    ids: torch.Tensor

    @property
    def text(self) -> str:
        """How its text starts, escaped."""
        return safe(self.source[:_TEXT])


class Batch(NamedTuple):
    """Some prompts as one tensor, the shorter ones padded at their end.

    Attributes:
        prompts: which they are.
        ids: `[prompts, tokens]`, 0 where there is padding.
        attention: 1 for tokens, 0 for padding; of the same shape.
    """

    prompts: tuple[Prompt, ...]
    ids: torch.Tensor
    attention: torch.Tensor

    def predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The places that predict a token there is, in the flattened batch, and these tokens."""
        rows = self.attention[:, 1:].bool()
        places = self.ids.new_tensor(range(self.ids.numel())).view_as(self.ids)
        return places[:, :-1][rows], self.ids[:, 1:][rows]


def read_prompts(
    prompts: object, tokenizer: PreTrainedTokenizerBase | None, noun: str
) -> list[Prompt]:
    """The prompts as token ids.

    Args:
        prompts: texts, lists of token ids, or a tensor of them.
        tokenizer: for texts; what it adds by itself, such as a token at the start, is added.
        noun: what one is called: `"prompt"`, `"sample"`.

    Raises:
        TypeError: they are something else, or texts without a tokenizer.
        ValueError: there are none, or one has fewer than two tokens.
    """
    import torch

    if isinstance(prompts, str | bytes):
        raise TypeError(f"{noun}s is one text; pass a list of them: [{safe(repr(prompts[:20]))}]")
    if isinstance(prompts, torch.Tensor) and prompts.dim() != 2:
        raise ValueError(
            f"{noun}s is a tensor of shape {list(prompts.shape)}; token ids are [{noun}s, tokens]"
        )
    if isinstance(prompts, Mapping):
        raise TypeError(
            f"{noun}s is {safe(type(prompts).__name__)}; pass the texts, or the token ids without "
            'padding: tokenizer(texts)["input_ids"]'
        )
    if not isinstance(prompts, Iterable):
        raise TypeError(
            f"{noun}s is {safe(type(prompts).__name__)}; pass a list of texts, a list of lists of "
            f"token ids, or a tensor of token ids [{noun}s, tokens]"
        )
    given = list(prompts)
    if not given:
        raise ValueError(f"no {noun}s: there is nothing to predict")
    found = [
        Prompt(
            index,
            each if isinstance(each, str) else "",
            _ids(each, tokenizer, f"{noun} {index}"),
        )
        for index, each in enumerate(given)
    ]
    for prompt in found:
        if len(prompt.ids) < 2:
            called = f"{noun} {prompt.number}" + (f' ("{prompt.text}")' if prompt.text else "")
            raise ValueError(
                f"{called} is {plural(len(prompt.ids), 'token')}: the first token is not "
                "predicted, so it takes two"
            )
    return found


def _ids(prompt: object, tokenizer: PreTrainedTokenizerBase | None, called: str) -> torch.Tensor:
    import torch

    source = prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TypeError(
                f"{called} is a text and there is no tokenizer; pass (base, tuned, tokenizer), "
                "save one beside the weights, or pass token ids"
            )
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = torch.as_tensor(prompt, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0, 0, 0, device="cpu")
    if ids.dim() == 1 and len(ids) == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{called} is neither a text nor a row of token ids{_mend(source)}")
    return ids.long()


def _mend(prompt: object) -> str:
    """How what people have instead becomes a prompt: rows of a data set, and turns of a talk."""
    if isinstance(prompt, Mapping):
        return '; of rows of a data set pass one column: [row["prompt"] for row in rows]'
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return "; turns become ids by tokenizer.apply_chat_template(turns, return_dict=False)"
    return ""


def check_ids(prompts: Sequence[Prompt], vocabulary: int | None, noun: str) -> None:
    """Raise `ValueError` if a token id has no row in the embeddings."""
    for prompt in prompts:
        wrong = prompt.ids < 0
        if vocabulary is not None:
            wrong |= prompt.ids >= vocabulary
        if wrong.any():
            place = int(wrong.nonzero()[0, 0])
            allowed = "they start at 0" if vocabulary is None else f"they go to {vocabulary - 1:,}"
            raise ValueError(
                f"{noun} {prompt.number} has token id {int(prompt.ids[place])} at position "
                f"{place}, which is not in the vocabulary: {allowed}"
            )


def check_lengths(prompts: Sequence[Prompt], context: int | None, new: int, noun: str) -> None:
    """Raise `ValueError` if a prompt, with `new` tokens after it, is longer than the context."""
    for prompt in prompts:
        if context is not None and len(prompt.ids) + new > context:
            more = f" and {new:,} to generate" if new else ""
            raise ValueError(
                f"{noun} {prompt.number} has {plural(len(prompt.ids), 'token')}{more}, the context "
                f"of the models is {context:,}; cut it"
            )


def batches(prompts: Sequence[Prompt], *, padded: bool = True, new: int = 0) -> Iterator[Batch]:
    """The prompts in batches of at most `TOKENS` tokens, or of one prompt, the longest first.

    Args:
        prompts: at least one.
        padded: whether a batch may hold prompts of different lengths.
        new: how many tokens will be appended to each.
    """
    waiting = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    while waiting:
        longest = len(waiting[0].ids)
        taken = waiting[: max(1, TOKENS // (longest + new))]
        if not padded:
            taken = [each for each in taken if len(each.ids) == longest]
        waiting = waiting[len(taken) :]
        yield _batch(taken, longest)


def _batch(prompts: Sequence[Prompt], longest: int) -> Batch:
    import torch

    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device="cpu")
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = prompt.ids
        attention[row, : len(prompt.ids)] = 1
    return Batch(tuple(prompts), ids, attention)
