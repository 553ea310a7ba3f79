"""What two models write after a prompt when each takes its first choice every time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.findings.behaviour.prompts import batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_subnet.findings.behaviour.models import Model
    from pytest_subnet.findings.behaviour.prompts import Batch, Prompt


class Continuations(NamedTuple):
    """What both models write after one prompt.

    Attributes:
        base: the new tokens of the base, its end-of-text token among them.
        tuned: of the tuned model.
    """

    base: tuple[int, ...]
    tuned: tuple[int, ...]

    @property
    def first_difference(self) -> int | None:
        """The first new token that is another one, from 0; None where all are the same."""
        if self.base == self.tuned:
            return None
        pairs = zip(self.base, self.tuned, strict=False)
        same_so_far = min(len(self.base), len(self.tuned))
        return next((at for at, (one, other) in enumerate(pairs) if one != other), same_so_far)


def continuations(
    base: Model, tuned: Model, prompts: Sequence[Prompt], new: int, advance: Callable[[int], None]
) -> dict[int, Continuations]:
    """Up to `new` tokens after each prompt, by its number.

    Prompts of one length go together: none is padded.
    """
    found = {}
    for batch in batches(prompts, padded=False, new=new):
        written = zip(*(_written(model, batch, new) for model in (base, tuned)), strict=True)
        for prompt, both in zip(batch.prompts, written, strict=True):
            found[prompt.number] = Continuations(*both)
            advance(new)
    return found


def check_generates(*models: Model) -> None:
    """Raise `TypeError` unless each model can write, as those of transformers can."""
    for model in models:
        if not callable(getattr(model.module, "generate", None)):
            raise TypeError(
                f"generate: {model.role} ({model.label}) has no generate(), as models of "
                "transformers have it; leave generate= out"
            )


def _written(model: Model, batch: Batch, new: int) -> list[tuple[int, ...]]:
    """The new tokens of each prompt, up to the first that ends a text for this model."""
    module: Any = model.module
    ends = _ends(module)
    with _nothing_asked(module):
        written = module.generate(
            batch.ids.to(model.device),
            attention_mask=batch.attention.to(model.device),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),  # behind the end, where nobody looks
        )
    found = []
    for row in written[:, batch.ids.shape[1] :].tolist():
        end = next((at for at, token in enumerate(row) if token in ends), len(row))
        found.append(tuple(row[: end + 1]))
    return found


@contextmanager
def _nothing_asked(module: torch.nn.Module) -> Iterator[None]:
    """Without the model's own generation config, which may forbid or enforce tokens, and samples.

    What is not passed to `generate` is taken from it, so that no argument can replace it.
    """
    held = [
        (part, vars(part)["generation_config"])
        for part in module.modules()
        if vars(part).get("generation_config") is not None
    ]
    try:
        for part, config in held:
            part.generation_config = type(config)()
        yield
    finally:
        for part, config in held:
            part.generation_config = config


def _ends(module: Any) -> set[int]:
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
