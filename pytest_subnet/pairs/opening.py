"""From two sources to a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.alignment import match_names
from pytest_subnet.pairs.kinds import kind_of, layer_of
from pytest_subnet.pairs.model_pair import ModelPair, TensorPair
from pytest_subnet.pairs.problems import Problem
from pytest_subnet.pairs.ties import compare_heads, find_head
from pytest_subnet.text import nearest, plural, safe, spell_tensor

if TYPE_CHECKING:
    from pytest_subnet.checkpoints import Checkpoint, TensorInfo
    from pytest_subnet.checkpoints.opening import Source

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
Vocab: TypeAlias = Literal["strict", "common"]

_QUANTISED = ("_scale_inv", "weight_packed", "weight_scale", "qweight", "_blocks", "_scales")


def open_pair(
    base: Source,
    tuned: Source,
    *,
    rename: Rename | None = None,
    vocab: Vocab = "strict",
    as_dtype: str | None = None,
    device: str | None = None,
    engine: str | None = None,
) -> ModelPair:
    """Open two checkpoints and align them tensor by tensor; only headers are read.

    Args:
        base: the model before; anything `open_checkpoint` takes.
        tuned: the model after; likewise.
        rename: from names in `tuned` to names in `base`, as a mapping or a function.
        vocab: `"common"` compares the common rows of embeddings and head where the vocabulary was
            resized, and reports the others; `"strict"` makes a resized vocabulary a problem.
        as_dtype: cast floating tensors of both sides to `"bfloat16"`, `"float16"`, `"float32"` or
            `"float64"` before they are compared; by default different dtypes are a problem.
        device: where to compare; None takes the CPU, and compares what is on a GPU there.
        engine: None is one thread a core in this process.

    Returns:
        The pair. What does not align is in `.problems`, never an error here.

    Raises:
        CheckpointError: one of them cannot be read.
        PairMismatchError: base and tuned are the same file or the same tensors.
        SelectionError: `rename` names a tensor that `tuned` does not have.
        ValueError: an unknown `vocab`, `as_dtype` or `engine`.

    >>> open_pair(base_dir, tuned_dir)
    <ModelPair base -> tuned: 21 tensors>
    """
    if vocab not in get_args(Vocab):
        raise ValueError(f"vocab={vocab!r} is not one of 'strict', 'common'")
    if as_dtype is not None and as_dtype not in ARITHMETIC:
        raise ValueError(f"as_dtype={as_dtype!r} is not one of {', '.join(ARITHMETIC)}")
    if engine not in (None, "threads"):
        raise ValueError(f"engine={engine!r} is not known; only 'threads' is")
    base, tuned = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(base, tuned)
    return _Alignment(base, tuned, rename, vocab, as_dtype).pair(device, engine)


def _refuse_same(base: Checkpoint, tuned: Checkpoint) -> None:
    if base is tuned or base.identity() == tuned.identity():
        raise PairMismatchError(
            f"base and tuned are the same: {safe(base.label)}; a comparison of a thing with itself "
            "says nothing. Was the path given twice, or a model kept without a copy?"
        )


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
        self.notes: list[str] = []
        self.tied: dict[str, str] = {}
        self.buffers = base.buffers | tuned.buffers
        self.new_names = _renamed(tuned, rename)
        self.left = dict.fromkeys(base.names())
        self.right = dict(self.new_names)

    def pair(self, device: str | None, engine: str | None) -> ModelPair:
        self._drop_second_names()
        head = self._settle_head()
        met = match_names(self.base, self.tuned, self.left, self.right)
        found = [self._compare(name, name, old) for name, old in met.items()]
        tensors = [tensor for tensor in (*found, head) if tensor is not None]
        used = set(met.values())
        self.problems += [Problem("only base", name, "") for name in self.left if name not in met]
        self.problems += [
            Problem("only tuned", new, "") for new, old in self.right.items() if old not in used
        ]
        if self.as_dtype is not None:
            casts = sum(t.base_dtype != t.dtype or t.tuned_dtype != t.dtype for t in tensors)
            self.notes.append(f"{plural(casts, 'tensor')} cast to {self.as_dtype}")
        return ModelPair(
            self.base,
            self.tuned,
            tensors=tensors,
            problems=self.problems,
            renamed={old: name for name, old in met.items() if old != name},
            tied=self.tied,
            notes=self.notes,
            device=device,
            engine=engine,
        )

    def _drop_second_names(self) -> None:
        """Count tensors once that both sides hold in one storage under two names."""
        for name, source in self.base.ties.items():
            old = self.right.get(name)
            if old is not None and self.tuned.ties.get(old) == self.right.get(source):
                self._drop(name, old, source)

    def _settle_head(self) -> TensorPair | None:
        """Deal with a head that is tied, stored once or only on one side."""
        base, tuned = find_head(self.base), find_head(self.tuned)
        verdict = compare_heads(base, tuned)
        if verdict in ("separate", "missing"):
            return None
        side = "base" if tuned.head is None else "tuned"
        new = next((n for n, old in self.new_names.items() if old == tuned.head), None)
        name = base.head or new or ""
        self._drop(base.head, tuned.head, base.embedding or "")
        if verdict == "tied":
            return None
        if verdict == "unclear":
            self._problem(
                f"only {side}",
                name,
                "and no config.json says whether the other side ties it to its embedding; "
                "put the config beside the weights, or leave the head out with exclude=",
            )
            return None
        del self.tied[name]
        self.notes.append(f"{safe(name)}: tied on one side; compared with its embedding there")
        return self._compare(
            name, base.head or base.embedding or "", tuned.head or tuned.embedding or ""
        )

    def _drop(self, base_name: str | None, tuned_name: str | None, source: str) -> None:
        """Take a second name out of the comparison."""
        self.left.pop(base_name or "", None)
        new = next((n for n, old in self.new_names.items() if old == tuned_name), None)
        self.right.pop(new or "", None)
        self.tied[base_name or new or ""] = source

    def _compare(self, name: str, base_name: str, tuned_name: str) -> TensorPair | None:
        """The aligned tensor, or None and a problem."""
        base, tuned = self.base.info(base_name), self.tuned.info(tuned_name)
        kind = "buffer" if name in self.buffers else kind_of(name)
        pair = TensorPair(
            name=name,
            base_name=base_name,
            tuned_name=tuned_name,
            shape=base.shape,
            dtype=base.dtype,
            base_dtype=base.dtype,
            tuned_dtype=tuned.dtype,
            layer=layer_of(name),
            kind=kind,
            is_weight=kind != "buffer" and DTYPES[base.dtype].floating,
        )
        if name.endswith(_QUANTISED):
            return self._problem("quantised", name, "dequantise both sides first")
        if 0 in base.shape or 0 in tuned.shape:
            side = "base" if 0 in base.shape else "tuned"
            return self._problem(
                "empty", name, f"has no entries in {side} (a sharded save that was not gathered?)"
            )
        if base.shape != tuned.shape:
            resized = self._common_rows(pair, base, tuned)
            if resized is None:
                return None
            pair = resized
        return self._common_dtype(pair)

    def _common_rows(
        self, pair: TensorPair, base: TensorInfo, tuned: TensorInfo
    ) -> TensorPair | None:
        change = (
            f"{spell_tensor(base.dtype, base.shape)} -> {spell_tensor(tuned.dtype, tuned.shape)}"
        )
        is_vocab = pair.kind in ("embed", "head") or pair.name.endswith("lm_head.bias")
        if not is_vocab or base.shape[1:] != tuned.shape[1:]:
            self._problem("reshaped", pair.name, change)
            return None
        added = tuned.shape[0] - base.shape[0]
        rows = f"{plural(abs(added), 'row')} {'added' if added > 0 else 'removed'}"
        if self.vocab == "strict":
            self._problem("reshaped", pair.name, f'{change}  ({rows}; allow with vocab="common")')
            return None
        self.notes.append(f"{safe(pair.name)}: {rows}, not compared")
        return replace(pair, shape=(min(base.shape[0], tuned.shape[0]), *base.shape[1:]))

    def _common_dtype(self, pair: TensorPair) -> TensorPair | None:
        castable = pair.base_dtype in ARITHMETIC and pair.tuned_dtype in ARITHMETIC
        if self.as_dtype is not None and castable and pair.is_weight:
            return replace(pair, dtype=self.as_dtype)
        if pair.base_dtype == pair.tuned_dtype:
            return pair
        hint = '; cast both with as_dtype="bfloat16"' if castable else ""
        return self._problem("retyped", pair.name, f"{pair.base_dtype} -> {pair.tuned_dtype}{hint}")

    def _problem(self, kind: str, name: str, text: str) -> None:
        self.problems.append(Problem(kind, name, text))


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
