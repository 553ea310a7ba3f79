"""Models that can be asked what comes next: which they are, and what they answer."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.checkpoints.memory import unwrapped
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import CheckpointError, PairMismatchError
from pytest_subnet.findings.common.fingerprints import Fingerprints
from pytest_subnet.findings.common.holders import model_inside
from pytest_subnet.pairs.causal_lm import load_tokenizer, tokenizer_files
from pytest_subnet.text import safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from pytest_subnet.findings.behaviour.prompts import Batch, Prompt


class Model(NamedTuple):
    """One model that is asked.

    Attributes:
        role: `"base"` or `"tuned"`.
        module: the model; left as it is found.
        label: where it was loaded from, or what class it is; escaped.
    """

    role: str
    module: torch.nn.Module
    label: str

    @property
    def device(self) -> torch.device:
        """Where it takes token ids."""
        import torch

        for tensors in (self.module.parameters(), self.module.buffers()):
            for each in tensors:
                if each.device.type != "meta":  # offloaded: it comes when it is needed
                    return each.device
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        """Of its weights; several are joined by `+`."""
        names = {
            short_dtype(str(each.dtype).removeprefix("torch."))
            for each in self.module.parameters()
            if each.is_floating_point()
        }
        return "+".join(sorted(names))

    @property
    def embeddings(self) -> int | None:
        """How many token ids it takes; None where it does not say."""
        rows = getattr(_embeddings(self.module), "weight", None)
        return None if rows is None else int(rows.shape[0])

    @property
    def context(self) -> int | None:
        """How many tokens it takes at a time; None where there is no limit that it states."""
        limit = getattr(_config(self.module), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def logits(self, batch: Batch) -> torch.Tensor:
        """What it predicts, `[prompts * tokens, vocabulary]`, in its own dtype."""
        import torch

        asked: dict[str, Any] = {
            "input_ids": batch.ids.to(self.device),
            "attention_mask": batch.attention.to(self.device),
        }
        if hasattr(_config(self.module), "use_cache"):  # nothing comes after: keep nothing for it
            asked["use_cache"] = False
        given = self.module(**asked)
        logits = given if isinstance(given, torch.Tensor) else getattr(given, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != batch.ids.shape:
            raise TypeError(
                f"{self.role} ({self.label}) is called with input_ids and attention_mask and must "
                "give logits [prompts, tokens, vocabulary], itself or as .logits; "
                f"it gave {_spelt(logits if logits is not None else given)}"
            )
        return logits.flatten(0, 1)


def _spelt(given: object) -> str:
    shape = getattr(given, "shape", None)
    return safe(type(given).__name__) + ("" if shape is None else f" {list(shape)}")


def _config(module: torch.nn.Module) -> object:
    """The part of its configuration that is about text; None where it has none."""
    config = getattr(unwrapped(module), "config", None)
    of_text = getattr(config, "get_text_config", None)
    return of_text() if callable(of_text) else config


def _embeddings(module: torch.nn.Module) -> object:
    get = getattr(unwrapped(module), "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that does not say which they are
        return None


def one_model(role: str, module: object) -> Model:
    """A model that can be asked what comes next.

    Raises:
        TypeError: it is no module, one without values, or one that needs more than the tokens
            before.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"{role} is {safe(type(module).__name__)}, not a module; behaviour is measured on "
            "loaded models, as the fixture causal_lm_pair gives them"
            f"{model_inside(module, role)}"
        )
    bare = unwrapped(module)
    name = safe(type(bare).__name__)
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False) is True:
        raise TypeError(
            f"{role} ({name}) is an encoder-decoder model; behaviour is measured on models that "
            "predict the next token from those before it"
        )
    weights = list(bare.parameters())
    is_offloaded = any(hasattr(part, "_hf_hook") for part in bare.modules())  # accelerate's
    if weights and all(each.is_meta for each in weights) and not is_offloaded:
        raise TypeError(
            f"{role} ({name}) is on the meta device, where it predicts nothing; load its weights"
        )
    path = getattr(bare, "name_or_path", "")
    return Model(role, module, safe(path) if path and isinstance(path, str) else name)


def two_models(pair: object) -> tuple[Model, Model, PreTrainedTokenizerBase | None]:
    """Base, tuned and tokenizer of what was passed as a pair.

    Args:
        pair: `(base, tuned, tokenizer)` or `(base, tuned)`.

    Raises:
        TypeError: it is neither, or not of models that predict the next token.
        PairMismatchError: both are one module.
    """
    if not isinstance(pair, tuple | list) or len(pair) not in (2, 3):
        raise TypeError(
            "a pair of loaded models is needed, (base, tuned) or (base, tuned, tokenizer), got "
            f"{safe(type(pair).__name__)}; take the fixture causal_lm_pair"
        )
    base, tuned = one_model("base", pair[0]), one_model("tuned", pair[1])
    if unwrapped(base.module) is unwrapped(tuned.module):
        raise PairMismatchError(
            f"base and tuned are one module ({base.label}), which behaves as itself; keep a copy "
            "before training (copy.deepcopy), or load the base again"
        )
    return base, tuned, pair[2] if len(pair) == 3 else None


def smallest(*numbers: int | None) -> int | None:
    """The smallest of the numbers that are known."""
    return min((each for each in numbers if each is not None), default=None)


def check_tokenizers(base: Model, tuned: Model, prompts: Sequence[Prompt]) -> None:
    """Raise if the two models were saved with tokenizers under which the same ids mean other texts.

    Looks beside the weights that transformers loaded; where one side has no tokenizer there, there
    is nothing to compare.

    Args:
        base: one model.
        tuned: the other.
        prompts: what they will be asked.

    Raises:
        PairMismatchError: an id is another token to each, or a prompt is other ids.
        CheckpointError: a tokenizer cannot be loaded.
    """
    places = [_directory(each.module) for each in (base, tuned)]
    if None in places or _same_files(*places):
        return
    one, other = (
        load_tokenizer(place, label=each.label)
        for place, each in zip(places, (base, tuned), strict=True)
        if place is not None
    )
    words = {number: word for word, number in one.get_vocab().items()}
    differing = sorted(
        (number, words[number], word)
        for word, number in other.get_vocab().items()
        if words.get(number, word) != word
    )
    if differing:
        number, before, after = differing[0]
        more = f" ({len(differing) - 1:,} more)" if len(differing) > 1 else ""
        raise PairMismatchError(
            f"the tokenizers of base and tuned differ: token {number} is {safe(repr(before))} in "
            f"{base.label} and {safe(repr(after))} in {tuned.label}{more}; what they predict "
            "cannot be compared token by token"
        )
    for prompt in prompts:
        ids = [each(prompt.source)["input_ids"] for each in (one, other) if prompt.source]
        if ids[:1] != ids[1:]:
            raise PairMismatchError(
                f"the tokenizers of base and tuned differ: prompt {prompt.number} is "
                f"{_numbers(ids[0])} to {base.label} and {_numbers(ids[1])} to {tuned.label}; pass "
                "token ids to compare both on the same ones"
            )


def _numbers(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''}]"


def _directory(module: torch.nn.Module) -> Path | None:
    """Where the tokenizer that was saved with a model lies; None where there is none."""
    path = getattr(unwrapped(module), "name_or_path", "")
    if not isinstance(path, str) or not path or "\0" in path:
        return None
    return Path(path) if Path(path).is_dir() and tokenizer_files(Path(path)) else None


def _same_files(*directories: Path | None) -> bool:
    found = [
        {file.name: file.read_bytes() for file in tokenizer_files(each)}
        for each in directories
        if each is not None
    ]
    return found[0] == found[1]


@contextmanager
def asked(*models: Model) -> Iterator[None]:
    """Put models in eval mode, without gradients; every part is left in the mode it was in."""
    import torch

    modes = [(part, part.training) for model in models for part in model.module.modules()]
    try:
        for model in models:
            model.module.eval()
        # In a caller's autocast: casts of what the weights were the last time.
        torch.clear_autocast_cache()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def fingerprints(models: Sequence[Model], prompts: Sequence[Prompt]) -> Fingerprints:
    """Of the content of models, and of the prompts; holds on to neither.

    A number on other prompts is another number, as of another base: so they are called.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(len(prompt.ids).to_bytes(8, "little"))
        digest.update(prompt.ids.numpy().tobytes())
    taken = digest.hexdigest()
    return Fingerprints({each.role: _of(each) for each in models} | {"base_prompts": lambda: taken})


def _of(model: Model) -> Callable[[], str]:
    """Takes the fingerprint of a model when it is asked for: empty once the model is gone."""
    known, label = weakref.ref(model.module), model.label
    try:
        identity = open_checkpoint(model.module).identity()
    except CheckpointError:  # weights of a kind that cannot be read: they have no fingerprint
        return str

    def take() -> str:
        module = known()
        if module is None:
            return ""
        checkpoint = open_checkpoint(module)
        if checkpoint.identity() != identity:
            raise CheckpointError(f"{label} changed after it was measured; measure it again")
        return checkpoint.fingerprint()

    return take
