"""Which tensors of the base an adapter changes: its names, read and held to the base's shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.checkpoints.adapters.config import is_targeted, rank_and_alpha
from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, nearest, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft import LoraConfig

    from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo

Form: TypeAlias = Literal["linear", "conv1d", "embedding"]

HEAD = "lm_head.weight"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
_BACKBONES = ("model.", "transformer.", "gpt_neox.", "language_model.")


class LowRank(NamedTuple):
    """An update of one matrix: scale * B @ A, and with a magnitude the rows or columns rescaled.

    Attributes:
        target: the matrix, as the base calls it.
        form: how it is laid out: `"linear"` has its outputs in rows, `"conv1d"` in columns, an
            `"embedding"` its vocabulary in rows.
        a: the adapter's name for A.
        b: its name for B.
        magnitude: its name for DoRA's magnitudes; None without DoRA.
        rank: the rank of the update.
        alpha: what its scale is made of.
    """

    target: str
    form: Form
    a: str
    b: str
    magnitude: str | None
    rank: int
    alpha: float


class Whole(NamedTuple):
    """A tensor that the adapter holds whole, in place of the base's."""

    target: str
    key: str


class Plan(NamedTuple):
    """What an adapter does to its base.

    Attributes:
        low_rank: the matrices that it adds to, by their names in the base.
        whole: the tensors that it replaces, by their names in the base.
        copies: its copies of tensors of the base, with their names there.
        second_names: names of the base that are another's storage, with that other.
        renaming: what was taken off its names, and what was put before them, to find the base's.
    """

    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, Whole]
    copies: Mapping[str, str]
    second_names: Mapping[str, str]
    renaming: tuple[str, str]


def make_plan(adapter: Checkpoint, base: Checkpoint, lora: LoraConfig) -> Plan:
    """Assign every tensor of `adapter` to one of `base`.

    Raises:
        CheckpointError: one has no place there, does not fit, or lacks its counterpart.
    """
    return _Planner(adapter, base, lora).plan()


class _Planner:
    def __init__(self, adapter: Checkpoint, base: Checkpoint, lora: LoraConfig) -> None:
        self.adapter, self.base, self.lora = adapter, base, lora
        self.known = set(base.names())
        self.second_names = _second_names(base)
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        self.others: dict[str, str] = {}
        for key in adapter.names():
            self._sort(key)
        names = [*(f"{module}.weight" for module in self.modules), *self.others.values()]
        self.renaming = _renaming(names, self.known)

    def plan(self) -> Plan:
        whole: dict[str, Whole] = {}
        copies: dict[str, str] = {}
        for key, name in self.others.items():
            if self._trains_whole(key, name):
                target = self._named(name)
                self._check_whole(key, name, target)
                whole[target] = Whole(target, key)
            elif key.endswith(".base_layer.weight") or _is_vocabulary(name):
                target = self._storage(name)
                self._check_whole(key, name, target)
                copies[key] = target
            else:
                raise self._unknown(key)
        low_rank: dict[str, LowRank] = {}
        for module, parts in self.modules.items():
            update = self._low_rank(module, parts)
            if update.target in low_rank:
                raise CheckpointError(
                    f"{safe(self.adapter.label)} adapts {safe(update.target)} of "
                    f"{safe(self.base.label)} twice, under both names of a tied matrix; merge it "
                    "with peft and pass the merged model"
                )
            low_rank[update.target] = update
        self._refuse_both(low_rank, whole)
        return Plan(low_rank, whole, copies, self.second_names, self.renaming)

    def _refuse_both(self, low_rank: Mapping[str, LowRank], whole: Mapping[str, Whole]) -> None:
        """Raise if a tied matrix is adapted under one name and trained whole under the other.

        Which of the two names the update belongs to is not kept where the base has one matrix.
        """
        for name in whole:
            if name in low_rank:
                raise CheckpointError(
                    f"{safe(self.adapter.label)} adapts {safe(name)} of "
                    f"{safe(self.base.label)} and trains it whole as well; merge it with peft "
                    "(merge_and_unload, then save_pretrained) and pass the merged model"
                )

    def _sort(self, key: str) -> None:
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise self._unknown(key)
        part = _PART.fullmatch(name.removesuffix(".weight"))
        if part is None:
            self.others[key] = name.replace(".base_layer.", ".")
        elif part[2] in self.modules[part[1]]:
            raise CheckpointError(
                f"{safe(self.adapter.label)} holds {part[2]} of {short(part[1])} under two names; "
                "which one counts cannot be known, save it again"
            )
        else:
            self.modules[part[1]][part[2]] = key

    def _unknown(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{safe(self.adapter.label)} holds {short(key)}, which its config does not speak of: "
            "no LoRA matrix, no bias that it trains and none of its modules_to_save; save the "
            "adapter again with peft"
        )

    def _trains_whole(self, key: str, name: str) -> bool:
        parents = name.split(".")[:-1]
        paths = [".".join(parents[: count + 1]) for count in range(len(parents))]
        saved = self.lora.modules_to_save or []
        if any(path.endswith(module) for path in paths for module in saved):
            return True
        if self.lora.bias == "none" or not name.endswith("bias"):
            return False
        return self.lora.bias == "all" or ".base_layer." in key

    def _named(self, name: str) -> str:
        """What the base calls `name`, whether or not it has it."""
        taken, put = self.renaming
        if name in self.known:
            return name
        renamed = put + name.removeprefix(taken)
        return renamed if renamed in self.known else name

    def _storage(self, name: str) -> str:
        named = self._named(name)
        return self.second_names.get(named, named)

    def _info(self, key: str, target: str) -> TensorInfo:
        """What the base has to be changed by `key`."""
        source = target if target in self.known else self.second_names.get(target, target)
        if source in self.known:
            return self.base.info(source)
        module = target.removesuffix("weight")
        instead = [name for name in self.known if name.startswith(module)]
        hint = nearest(target, self.known) or "; is this the base it was trained on?"
        if instead:
            hint = f"; it has {first_few(sorted(instead))}"
            if self.base.config.get("quantization_config"):
                hint += "; is it quantised? Pass the base in bfloat16"
        raise CheckpointError(
            f"{safe(self.adapter.label)} holds {short(key)}, but {safe(self.base.label)} has no "
            f"tensor {short(target)}{hint}"
        )

    def _check_whole(self, key: str, name: str, target: str) -> None:
        there, mine = self._info(key, target), self.adapter.info(key)
        if there.shape != mine.shape:
            raise self._misfit([key], there, f"it has another shape than {short(name)} there")
        if there.dtype != mine.dtype and not {there.dtype, mine.dtype} <= set(ARITHMETIC):
            raise self._misfit([key], there, "the one cannot be cast to the other")

    def _low_rank(self, module: str, parts: Mapping[str, str]) -> LowRank:
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        kind = "lora_embedding_" if is_embedding else "lora_"
        for part in parts:
            if part != "lora_magnitude_vector" and not (
                part.startswith(kind) and part.removeprefix(kind) in ("A", "B")
            ):
                raise CheckpointError(
                    f"{safe(self.adapter.label)} holds {first_few(sorted(parts.values()))}: "
                    "matrices for a linear layer and for an embedding at once; save it again"
                )
        wanted = [kind + "A", kind + "B"] + ["lora_magnitude_vector"] * bool(self.lora.use_dora)
        for part in wanted:
            if part not in parts:
                raise CheckpointError(
                    f"{safe(self.adapter.label)} holds {short(next(iter(parts.values())))} "
                    f"without the {part} of the same module; it was cut short, save it again"
                )
        if not self.lora.use_dora and "lora_magnitude_vector" in parts:
            raise self._unknown(parts["lora_magnitude_vector"])
        if not is_targeted(self.lora, module):
            raise CheckpointError(
                f"{safe(self.adapter.label)} holds {short(parts[kind + 'A'])}, but the "
                "target_modules of its config leave that module out; save it again with peft"
            )
        rank, alpha = rank_and_alpha(self.lora, module)
        keys = parts[kind + "A"], parts[kind + "B"]
        target = self._storage(f"{module}.weight")
        there = self._info(keys[0], target)
        magnitude = parts.get("lora_magnitude_vector")
        form = self._form(is_embedding, keys, there, rank)
        if magnitude is not None:
            columns = self.adapter.info(keys[1]).shape[0]
            if self.adapter.info(magnitude).shape != (columns,):
                raise self._misfit([magnitude], there, f"it must have {columns:,} entries")
        for key in (*keys, *([magnitude] if magnitude else [])):
            if self.adapter.info(key).dtype not in ARITHMETIC:
                raise self._misfit([key], there, "it is in no dtype to calculate in")
        if there.dtype not in ARITHMETIC:
            raise self._misfit(
                keys, there, "the base is quantised: pass it in bfloat16, or the merged model"
            )
        return LowRank(target, form, *keys, magnitude, rank, alpha)

    def _form(
        self, is_embedding: bool, keys: tuple[str, str], there: TensorInfo, rank: int
    ) -> Form:
        a, b = (self.adapter.info(key).shape for key in keys)
        if len(a) != 2 or len(b) != 2:
            raise self._misfit(keys, there, "only matrices are handled, no convolutions")
        if a[0] != rank or b[1] != rank:
            raise self._misfit(keys, there, f"the rank in its config is {rank:,}")
        rows_are_outputs, rows_are_inputs = there.shape == (b[0], a[1]), there.shape == (a[1], b[0])
        if not (rows_are_inputs if is_embedding else rows_are_outputs or rows_are_inputs):
            raise self._misfit(keys, there, "is this the base it was trained on?")
        if is_embedding:
            return "embedding"
        if rows_are_outputs and rows_are_inputs:
            return "conv1d" if self._squares_are_conv1d() else "linear"
        return "linear" if rows_are_outputs else "conv1d"

    def _squares_are_conv1d(self) -> bool:
        """How a square matrix lies, which its shape does not tell.

        peft goes by the class of the module and saves one flag for all of them, whatever the last
        one was; so the biases and the other matrices of the model are asked first.
        """
        seen = set()
        for parts in self.modules.values():
            if {"lora_A", "lora_B"} <= parts.keys() and not _is_vocabulary(parts["lora_A"]):
                a, b = (self.adapter.info(parts[part]).shape for part in ("lora_A", "lora_B"))
                module = parts["lora_A"].removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                name = self._storage(f"{module}.weight")
                if name in self.known and len(a) == len(b) == 2 and a[1] != b[0]:
                    seen.add(self.base.info(name).shape == (a[1], b[0]))
        for name in self.known:
            bias = f"{name.removesuffix('weight')}bias"
            if name.endswith(".weight") and bias in self.known:
                shape, outputs = self.base.info(name).shape, self.base.info(bias).shape
                if len(shape) == 2 and shape[0] != shape[1] and outputs in (shape[:1], shape[1:]):
                    seen.add(outputs == shape[1:])
        return seen.pop() if len(seen) == 1 else bool(self.lora.fan_in_fan_out)

    def _misfit(self, keys: Sequence[str], there: TensorInfo, why: str) -> CheckpointError:
        infos = [self.adapter.info(key) for key in keys]
        mine = " and ".join(f"{short(i.name)} {spell_tensor(i.dtype, i.shape)}" for i in infos)
        return CheckpointError(
            f"{safe(self.adapter.label)} does not fit {safe(self.base.label)}: {mine} against "
            f"{short(there.name)} {spell_tensor(there.dtype, there.shape)}; {why}"
        )


def _is_vocabulary(name: str) -> bool:
    return any(part in (*_EMBEDDINGS, "lm_head", "embed_out") for part in name.split("."))


def is_tied_by_config(config: Mapping[str, object]) -> bool:
    """Whether a config says that the head is the embedding; without a word it says nothing."""
    text = config.get("text_config")
    flags = [
        part.get("tie_word_embeddings")
        for part in (config, text if isinstance(text, dict) else {})
        if isinstance(part.get("tie_word_embeddings"), bool)
    ]
    return bool(flags and flags[0])


def _second_names(base: Checkpoint) -> dict[str, str]:
    """Names of the base whose matrix is another's, by its storage or by its config."""
    found = dict(base.ties)
    names = base.names()
    embeddings = [
        name for name in names if name.endswith(tuple(f"{each}.weight" for each in _EMBEDDINGS))
    ]
    if is_tied_by_config(base.config) and len(embeddings) == 1 and HEAD not in found:
        (embedding,) = embeddings
        alike = HEAD not in names or base.info(HEAD)[1:] == base.info(embedding)[1:]
        if alike and HEAD not in found.values():
            found[HEAD] = embedding
    return found


def _renaming(names: Iterable[str], known: set[str]) -> tuple[str, str]:
    """The prefix of the backbone that only one side writes: what to take off, what to put before.

    Taken only if every name that the base does not have is found with it.
    """
    left = [name for name in names if name not in known and name != HEAD]
    for prefix in _BACKBONES if left else ():
        for taken, put in ((prefix, ""), ("", prefix)):
            if all(
                name.startswith(taken) and put + name.removeprefix(taken) in known for name in left
            ):
                return taken, put
    return "", ""
