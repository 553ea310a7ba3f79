"""Tied embeddings: whether the head of a model is its input embedding under a second name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.pairs.kinds import VOCABULARY, kind_of, layer_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.checkpoints import Checkpoint

Verdict: TypeAlias = Literal["tied", "separate", "untied", "missing", "unclear"]


class Head(NamedTuple):
    """The output head and the input embedding of one checkpoint, by its own names.

    Attributes:
        checkpoint: whose.
        head: the name of the head; None when it is not stored.
        embedding: the name of the embedding; None when there is not exactly one.
    """

    checkpoint: Checkpoint
    head: str | None
    embedding: str | None

    @property
    def head_name(self) -> str:
        """What the head is called, or would be if it were stored."""
        return self.head or "lm_head.weight"

    def is_tied(self, *, ask_transformers: bool = False) -> bool | None:
        """Whether the model uses its embedding as its head; None when that is unclear.

        A module shows it by sharing the storage or not. A file's config says it by a flag. A config
        without the flag means the default of the model's class, which only transformers knows.
        """
        ties = self.checkpoint.ties
        if self.head is not None and self.embedding is not None:
            if ties.get(self.head) == self.embedding or ties.get(self.embedding) == self.head:
                return True
            if self.checkpoint.shows_ties or not self._alike(self.head, self.embedding):
                return False
        config = self.checkpoint.config
        return tied_by_config(config) if ask_transformers else config_flag(config)

    def second_names(self) -> list[tuple[Checkpoint, str, str]]:
        """Where the head is stored beside the embedding with bytes of its own: as `ModelPair`."""
        ties = self.checkpoint.ties
        if self.head is None or self.embedding is None:
            return []
        if ties.get(self.head, self.head) == ties.get(self.embedding, self.embedding):
            return []
        return [(self.checkpoint, self.head, self.embedding)]

    def _alike(self, head: str, embedding: str) -> bool:
        return self.checkpoint.info(head)[1:] == self.checkpoint.info(embedding)[1:]


def find_head(checkpoint: Checkpoint, names: Mapping[str, str] | None = None) -> Head:
    """Head and embedding of `checkpoint`, where there is one of each.

    Args:
        checkpoint: where to look.
        names: its own names by what the user calls them; None where they are called the same.
    """
    names = names or {name: name for name in checkpoint.names()}
    # A block that predicts further tokens ahead may store an embedding and a head of its own.
    weights = [name for name in names if name.endswith(VOCABULARY) and layer_of(name) is None]
    heads = [names[name] for name in weights if kind_of(name) == "head"]
    embeddings = [names[name] for name in weights if kind_of(name) == "embed"]
    return Head(
        checkpoint,
        heads[0] if len(heads) == 1 else None,
        embeddings[0] if len(embeddings) == 1 else None,
    )


def compare_heads(base: Head, tuned: Head) -> Verdict:
    """How the heads of two checkpoints are to be compared.

    Returns:
        `"tied"`: both models tie it; it is counted with the embedding, however often it is stored.
        `"separate"`: both store a head of their own, or neither has one. `"untied"`: one side ties
        it, the other has one of its own. `"missing"`: a side lacks a head that it should have.
        `"unclear"`: one side lacks it, and no config says whether that is a tie.
    """
    if base.head is not None and tuned.head is not None:
        if base.embedding is None or tuned.embedding is None:
            return "separate"
        known = {base.is_tied(), tuned.is_tied()}
        return "tied" if True in known and False not in known else "separate"
    if base.head is None and tuned.head is None:
        return "separate"
    here, there = (base, tuned) if base.head is not None else (tuned, base)
    if here.embedding is None or there.embedding is None:
        return "missing"
    tied_there = there.is_tied(ask_transformers=True)
    if tied_there is False:
        return "missing"
    tied_here = here.is_tied(ask_transformers=True)
    if tied_there is None or tied_here is None:
        return "unclear"
    return "tied" if tied_here else "untied"


def config_flag(config: Mapping[str, object]) -> bool | None:
    """`tie_word_embeddings` as the config states it; None when it does not."""
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        flag = part.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag
    return None


def tied_by_config(config: Mapping[str, object]) -> bool | None:
    """What the config states, or else what the model's class does; None when neither is known."""
    flag = config_flag(config)
    return class_default(config) if flag is None else flag


def class_default(config: Mapping[str, object]) -> bool | None:
    """What the model's class does when the config does not say; transformers is imported for it.

    None where transformers cannot be imported or does not know the class.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    try:
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            return None
        default = getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", None)
    except ImportError:
        return None
    return default if isinstance(default, bool) else None
