"""From two sources to a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from pytest_subnet.checkpoints.adapters.opening import is_adapter, open_adapter
from pytest_subnet.checkpoints.collector import collector_at_rest
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.experts import ExpertsCheckpoint, fused_otherwise
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.devices import is_device
from pytest_subnet.errors import Problem, SelectionError
from pytest_subnet.pairs.alignment import experts_stored_otherwise, experts_to_split, match_names
from pytest_subnet.pairs.kinds import kind_of, layer_of
from pytest_subnet.pairs.model_pair import ModelPair, TensorPair
from pytest_subnet.pairs.sameness import refuse_same, refuse_shared
from pytest_subnet.pairs.ties import compare_heads, find_head
from pytest_subnet.text import first_few, nearest, plural, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from pytest_subnet.checkpoints import Checkpoint, TensorInfo
    from pytest_subnet.checkpoints.experts import Part
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.pairs.alignment import Match

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
Vocab: TypeAlias = Literal["strict", "common"]

_HEAD_BIASES = ("lm_head.bias", "embed_out.bias")
_SCALES = ("weight_scale", "_scale_inv")
_PACKED = (
    *("weight_packed", "qweight", "qzeros", "_blocks", "_scales"),  # compressed, GPTQ, AWQ, MXFP4
    *(".absmax", ".quant_map", ".SCB"),  # bitsandbytes
)
"""Ends of the names under which quantised formats store what is not a weight by itself."""


def open_pair(
    base: Source,
    tuned: Source,
    *,
    rename: Rename | None = None,
    vocab: Vocab = "strict",
    as_dtype: str | None = None,
    device: str | torch.device | None = None,
    engine: str | None = None,
) -> ModelPair:
    """Open two checkpoints and align them tensor by tensor; only headers are read.

    Args:
        base: the model before; anything `open_checkpoint` takes.
        tuned: the model after; likewise, or the directory of a PEFT adapter, which is merged onto
            `base`.
        rename: from names in `tuned` to names in `base`, as a mapping or a function.
        vocab: `"common"` compares the common rows of embeddings and head where the vocabulary was
            resized, and reports the others; `"strict"` makes a resized vocabulary a problem.
        as_dtype: cast floating tensors of both sides to `"bfloat16"`, `"float16"`, `"float32"` or
            `"float64"` before they are compared; by default different dtypes are a problem.
        device: where to compare; None takes the CPU, and compares what is on a GPU there.
        engine: who does the work: None or `"threads"` is one thread a core in this process;
            `"ray"` is a Ray cluster, that of `RAY_ADDRESS` or a local one, to which only what is
            in files can go.

    Returns:
        The pair. What does not align is in `.problems`, never an error here.

    Raises:
        CheckpointError: one of them cannot be read, or was written to since it was opened.
        PairMismatchError: base and tuned are the same files or the same memory.
        SelectionError: `rename` names a tensor that `tuned` does not have.
        TypeError: `rename` is neither a function nor a mapping of strings.
        ValueError: an unknown `vocab`, `as_dtype`, `device` or `engine`.

    >>> open_pair("base", "tuned")
    <ModelPair base -> tuned: 21 tensors>
    """
    if vocab not in get_args(Vocab):
        raise ValueError(f"vocab={safe(repr(vocab))} is not one of 'strict', 'common'")
    if as_dtype is not None and as_dtype not in ARITHMETIC:
        raise ValueError(f"as_dtype={safe(repr(as_dtype))} is not one of {', '.join(ARITHMETIC)}")
    device = None if device is None else str(device)  # a torch.device spells itself so
    if device is not None and not is_device(device):
        raise ValueError(f"device={safe(repr(device))} is not one of 'cpu', 'cuda', 'cuda:N'")
    if engine not in (None, "threads", "ray"):
        raise ValueError(f"engine={safe(repr(engine))} is not one of 'threads', 'ray'")
    _check_rename(rename)
    base = open_checkpoint(base)
    tuned = open_adapter(tuned, base) if is_adapter(tuned) else open_checkpoint(tuned)
    for checkpoint in (base, tuned):
        checkpoint.check_unchanged()
    refuse_same(base, tuned)
    with collector_at_rest():
        pair = _Alignment(base, tuned, rename, vocab, as_dtype).pair(device, engine)
    refuse_shared(pair.base, pair.tuned, pair.tensors)
    return pair


class _Alignment:
    """Collects tensors, problems and notes while one pair is aligned."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        rename: Rename | None,
        vocab: Vocab,
        as_dtype: str | None,
    ) -> None:
        self.base, self.tuned = base, tuned
        self.vocab, self.as_dtype = vocab, as_dtype
        self.problems: list[Problem] = []
        self.notes = list(dict.fromkeys([*base.notes, *tuned.notes]))
        self.tied: dict[str, str] = {}
        self.second_names: list[tuple[Checkpoint, str, str]] = []
        self.new_names = _renamed(tuned, rename)
        self.left = dict.fromkeys(base.names())
        self.right = dict(self.new_names)
        self.quantised = _quantised([*self.left, *self.right])
        self.heads = find_head(base), find_head(tuned, self.new_names)
        self.kinds: dict[str, str] = {}

    def pair(self, device: str | None, engine: str | None) -> ModelPair:
        head = self._settle_head()
        match = match_names(self.base, self.tuned, self.left, self.right)
        if self._split_experts(match):
            match = match_names(self.base, self.tuned, self.left, self.right)
        self._report_unmatched(match)
        tuned_names = self._called_in_tuned(match.met)
        self._drop_second_names(match.met)
        found = [self._compare(name, name, old) for name, old in match.met.items()]
        tensors = [tensor for tensor in (*found, head) if tensor is not None]
        if self.as_dtype is not None:
            casts = sum(t.base_dtype != t.dtype or t.tuned_dtype != t.dtype for t in tensors)
            self.notes.append(f"{plural(casts, 'tensor')} cast to {self.as_dtype}")
        return ModelPair(
            self.base,
            self.tuned,
            tensors=tensors,
            problems=self.problems,
            renamed={old: name for name, old in match.met.items() if old != name},
            tied=self.tied,
            notes=self.notes,
            device=device,
            engine=engine,
            second_names=self.second_names,
            tuned_names=tuned_names,
            problem_kinds={each.name: self.kinds[each.name] for each in self.problems},
        )

    def _settle_head(self) -> TensorPair | None:
        """Deal with a head that is tied, stored once or only on one side."""
        base, tuned = self.heads
        verdict = compare_heads(base, tuned)
        if verdict in ("separate", "missing"):
            return None
        new = next((new for new, old in self.new_names.items() if old == tuned.head), None)
        self.left.pop(base.head or "", None)
        self.right.pop(new or "", None)
        name = base.head or new or ""
        if verdict == "unclear":
            self.kinds[name] = "head"
            self._problem(
                "only tuned" if base.head is None else "only base",
                name,
                "and no tie_word_embeddings in a config.json says whether the other side ties it "
                "to its embedding; put the config beside the weights",
            )
            return None
        if verdict == "tied":
            self.tied[name] = base.embedding or ""
            self.second_names = [*base.second_names(), *tuned.second_names()]
            return None
        self.notes.append(f"{safe(name)}: tied on one side; compared with its embedding there")
        return self._compare(
            name, base.head or base.embedding or "", tuned.head or tuned.embedding or ""
        )

    def _split_experts(self, match: Match) -> bool:
        """Show fused experts as a matrix an expert where that is how the other side has them."""
        used = set(match.met.values())
        left = {name: name for name in self.left if name not in match.met}
        right = {new: old for new, old in self.right.items() if old not in used}
        sides = self.base, self.tuned
        if not left or not right or any(fused_otherwise(s.config.get("model_type")) for s in sides):
            return False
        for names in (left, right):
            for name in names.keys() & self.quantised:
                del names[name]
        in_base = experts_to_split(self.base, left, self.tuned, right)
        in_tuned = experts_to_split(self.tuned, right, self.base, left)
        if in_base:
            self.left = dict.fromkeys(
                called
                for name in self.left
                for called in ([part.name for part in in_base[name]] if name in in_base else [name])
            )
            self.base = self._with_experts(self.base, {name: name for name in in_base}, in_base)
        pairs = [
            pair
            for new, old in self.right.items()
            for pair in (_called(new, in_tuned[new]) if new in in_tuned else [(new, old)])
        ]
        if len(dict(pairs)) < len(pairs):  # a rename has taken the name of a matrix
            in_tuned = {}
        if in_tuned:
            self.right = dict(pairs)
            self.tuned = self._with_experts(self.tuned, right, in_tuned)
        return bool(in_base or in_tuned)

    def _with_experts(
        self, checkpoint: Checkpoint, names: Mapping[str, str], parts: Mapping[str, list[Part]]
    ) -> Checkpoint:
        """The checkpoint with its fused experts split, and a note of it."""
        self.notes.append(
            f"{safe(checkpoint.label)}: {plural(len(parts), 'tensor')} of fused experts compared "
            "matrix by matrix, as the other side stores them"
        )
        return ExpertsCheckpoint(checkpoint, {names[new]: found for new, found in parts.items()})

    def _report_unmatched(self, match: Match) -> None:
        """Make a problem of every name that met no other."""
        used = set(match.met.values())
        sides = {
            "only base": [name for name in self.left if name not in match.met],
            "only tuned": [new for new, old in self.right.items() if old not in used],
        }
        for (kind, names), others in zip(sides.items(), reversed(sides.values()), strict=True):
            experts = experts_stored_otherwise(names, others)
            for name in names:
                stored = (name, None) if kind == "only base" else (None, self.right[name])
                self.kinds[name] = self._kind(name, *stored)
                if name in match.ambiguous:
                    other = "tuned" if kind == "only base" else "base"
                    could_be = first_few(match.ambiguous[name])
                    self._problem("ambiguous", name, f"could be, in {other}: {could_be}")
                elif name in experts:
                    self._problem(
                        kind,
                        name,
                        "one side has all experts of a block in one tensor, the other one matrix "
                        "an expert; save the model that is in memory and compare files with files",
                    )
                else:
                    self._problem(kind, name, "")

    def _called_in_tuned(self, met: dict[str, str]) -> dict[str, str]:
        """The tuned checkpoint's name of all that it has of the base, counted or not."""
        names = dict(met)
        base, tuned = self.heads
        if tuned.head is not None:
            names.setdefault(base.head_name, tuned.head)
        if base.embedding is not None and tuned.embedding is not None:
            names.setdefault(base.embedding, tuned.embedding)
        return names

    def _drop_second_names(self, met: dict[str, str]) -> None:
        """Count tensors once that both sides hold in one storage under two names."""
        ties = self.tuned.ties
        for name, source in self.base.ties.items():
            if name not in met or source not in met:
                continue
            one, other = met[name], met[source]
            if ties.get(one, one) == ties.get(other, other):
                self.tied[name] = source
                del met[name]

    def _compare(self, name: str, base_name: str, tuned_name: str) -> TensorPair | None:
        """The aligned tensor, or None and a problem."""
        base, tuned = self.base.info(base_name), self.tuned.info(tuned_name)
        kind = self.kinds[name] = self._kind(name, base_name, tuned_name)
        if name in self.quantised:
            dtypes = base.dtype if base.dtype == tuned.dtype else f"{base.dtype} -> {tuned.dtype}"
            self._problem(
                "quantised",
                name,
                f"{dtypes}, quantised, with scales of its own; fp8 and compressed-tensors files "
                "are read through dequantised(PATH) in place of PATH",
            )
            return None
        if 0 in base.shape or 0 in tuned.shape:
            side = "base" if 0 in base.shape else "tuned"
            self._problem(
                "empty", name, f"has no entries in {side} (a sharded save that was not gathered?)"
            )
            return None
        shape = (
            base.shape if base.shape == tuned.shape else self._common_rows(name, kind, base, tuned)
        )
        dtype = self._common_dtype(name, base.dtype, tuned.dtype) if shape is not None else None
        if shape is None or dtype is None:
            return None
        return TensorPair(
            name=name,
            base_name=base_name,
            tuned_name=tuned_name,
            shape=shape,
            dtype=dtype,
            base_dtype=base.dtype,
            tuned_dtype=tuned.dtype,
            layer=layer_of(name),
            kind=kind,
            is_weight=kind != "buffer" and DTYPES[base.dtype].floating,
        )

    def _common_rows(
        self, name: str, kind: str, base: TensorInfo, tuned: TensorInfo
    ) -> tuple[int, ...] | None:
        """The shape to compare of two that differ, or None and a problem."""
        change = (
            f"{spell_tensor(base.dtype, base.shape)} -> {spell_tensor(tuned.dtype, tuned.shape)}"
        )
        is_vocab = kind in ("embed", "head") or name.endswith(_HEAD_BIASES)
        if not is_vocab or base.shape[1:] != tuned.shape[1:]:
            self._problem("reshaped", name, change)
            return None
        before, after = base.shape[0], tuned.shape[0]
        rows = f"{plural(abs(after - before), 'row')} {'added' if after > before else 'removed'}"
        if self.vocab == "strict":
            self._problem("reshaped", name, f'{change}, {rows}; allow with vocab="common"')
            return None
        self.notes.append(f"{safe(name)}: {before:,} -> {after:,} rows, {rows}, not compared")
        return (min(before, after), *base.shape[1:])

    def _common_dtype(self, name: str, base: str, tuned: str) -> str | None:
        """The dtype to compare in, or None and a problem."""
        castable = base in ARITHMETIC and tuned in ARITHMETIC
        if self.as_dtype is not None and castable:
            return self.as_dtype
        if base == tuned:
            return base
        # An adapter's sum is float64: a cast to less would round what it was asked to keep.
        wide = "float64" if "float64" in (base, tuned) else "bfloat16"
        hint = f'; cast both with as_dtype="{wide}"' if castable else ""
        self._problem("retyped", name, f"{base} -> {tuned}{hint}")
        return None

    def _kind(self, name: str, base_name: str | None, tuned_name: str | None) -> str:
        """What a tensor is for: buffer or not is known of a module, and else read off its name."""
        if base_name in self.base.buffers or tuned_name in self.tuned.buffers:
            return "buffer"
        in_base = base_name is not None and self.base.shows_buffers
        in_tuned = tuned_name is not None and self.tuned.shows_buffers
        return kind_of(name, is_parameter=in_base or in_tuned)

    def _problem(self, kind: str, name: str, text: str) -> None:
        self.problems.append(Problem(kind, name, text))


def _called(new: str, parts: Iterable[Part]) -> list[tuple[str, str]]:
    """What the parts of a fused tensor are called after the user's rename, and their own names."""
    experts = new.rpartition(".")[0]
    return [
        (experts + part.name.removeprefix(part.fused.rpartition(".")[0]), part.name)
        for part in parts
    ]


def _quantised(names: Iterable[str]) -> set[str]:
    """Those of `names` that mean nothing without their scales, and the scales."""
    known = set(names)
    found = {name for name in known if name.endswith((*_PACKED, *_SCALES))}
    scaled = {
        name.removesuffix("_inv").removesuffix("_scale") for name in found if name.endswith(_SCALES)
    }
    absmax = {name.removesuffix(".absmax") for name in found if name.endswith(".absmax")}
    return found | ((scaled | absmax) & known)


def _check_rename(rename: object) -> None:
    if isinstance(rename, Mapping):
        for name in (*rename, *rename.values()):
            if not isinstance(name, str):
                raise TypeError(f"rename maps names to names; {safe(repr(name))} is not a string")
    elif rename is not None and not callable(rename):
        raise TypeError(
            f"rename={safe(repr(rename))} is neither a mapping from names in tuned to names in "
            "base nor a function"
        )


def _renamed(tuned: Checkpoint, rename: Rename | None) -> dict[str, str]:
    """The tuned checkpoint's names by what they are called from now on."""
    names = tuned.names()
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        known = set(names)
        for name in rename:
            if name not in known:
                raise SelectionError(
                    f"rename: {safe(tuned.label)} has no tensor {safe(name)}{nearest(name, known)}"
                )
        mapping = rename
        new_names = {name: mapping.get(name, name) for name in names}
    else:
        new_names = {name: rename(name) for name in names}
    result: dict[str, str] = {}
    for old, new in new_names.items():
        if not isinstance(new, str):
            raise TypeError(f"rename gave {type(new).__name__} for {safe(old)}, not a name")
        if result.setdefault(new, old) != old:
            raise SelectionError(
                f"rename gives {safe(result[new])} and {safe(old)} the same name {safe(new)}"
            )
    return result
