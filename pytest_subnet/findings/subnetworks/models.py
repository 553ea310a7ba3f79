"""A live model whose weights are filled inside or outside a mask, and then put back to the bit."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.experts import ExpertsCheckpoint, fused_otherwise
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import CheckpointError, PairMismatchError, SelectionError, SubnetError
from pytest_subnet.masks.bits import unpack
from pytest_subnet.pairs.alignment import experts_to_split, match_names
from pytest_subnet.text import first_few, plural, safe
from pytest_subnet.training.parts import Part, inside_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    import torch
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.masks.update_mask import UpdateMask

    Words = NDArray[np.uint64]
    Bits = Callable[["Covered"], Words]


class Covered(NamedTuple):
    """A tensor of the tuned model that the mask covers.

    Attributes:
        name: in the mask.
        own: in the model.
        shape: of the tensor.
        dtype: of the model's weights.
        inside: entries in the mask.
        replaced_inside: of these, those that get other bits when they are filled.
        replaced_outside: likewise of the entries outside.
    """

    name: str
    own: str
    shape: tuple[int, ...]
    dtype: str
    inside: int
    replaced_inside: int
    replaced_outside: int

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)

    @property
    def replaced_by_random(self) -> float:
        """How many entries get other bits on average when as many random ones are filled."""
        return self.inside * (self.replaced_inside + self.replaced_outside) / max(1, self.numel)


class _Kept(NamedTuple):
    """What a covered tensor holds, and what it is filled with; both as words, bit for bit."""

    values: torch.Tensor
    filler: torch.Tensor


class FilledModel:
    """The tuned model, while its weights may be filled; what `filling` gives.

    Attributes:
        base: the model before.
        tuned: the model that is filled.
        covered: the tensors that the mask covers, tied ones once.
        left: names of weights that the mask does not cover, which stay as they are.
        left_numel: how many entries they have.
        notes: what else a reader of the scores must know.
    """

    def __init__(
        self, base: torch.nn.Module, tuned: torch.nn.Module, mask: UpdateMask, fill: str
    ) -> None:
        """Look everything up and keep a copy of all that may be written to; nothing is yet."""
        self.base, self.tuned = open_checkpoint(base), open_checkpoint(tuned)
        self._mask = mask
        self._view, met = _located(self.tuned, mask, "tuned")
        names = _counted_once(self._view, met, mask)
        from_base = _read(self.base, mask) if fill == "base" else None
        refuse_another_base(mask, self.base, self.tuned)
        shared = _shared(self.base, self._view, names, from_base)
        if shared and from_base is None:
            raise PairMismatchError(
                f"{plural(len(shared), 'tensor')} of the mask {_hold(shared)} the same memory in "
                f"base and tuned (share_identical): {first_few(shared)}; fill={fill!r} would write "
                'to both models, so load them without sharing, or take fill="base"'
            )
        self._kept: dict[str, _Kept] = {}
        self.covered: list[Covered] = []
        for name, own in names.items():
            self._keep(name, own, fill, from_base, is_shared=name in shared)
        self._others = {
            name: self._view.read(name).clone()
            for name in self._view.names()
            if name not in self._view.ties and name not in self._kept
        }
        counted = {self._view.ties.get(own, own) for own in names.values()}
        self.left = [
            name
            for name in self._view.names()
            if name not in self._view.ties
            and name not in self._view.buffers
            and name not in counted
        ]
        self.left_numel = sum(self._view.info(name).numel for name in self.left)
        self.notes = _notes(self.left, self.left_numel, shared, mask, names)

    def _keep(
        self,
        name: str,
        own: str,
        fill: str,
        from_base: Mapping[str, torch.Tensor] | None,
        *,
        is_shared: bool,
    ) -> None:
        tensor = self._view.read(own)
        words = _words(name, tensor)
        filler = (
            _constant(name, tensor, fill)
            if from_base is None
            else _words(name, _same_dtype(name, from_base[name], tensor))
        ).to(words.device)
        other = words != filler
        inside = self._mask.info(name).entries
        replaced = int((other & _flags(self._bits_of(name), words)).sum())
        info = self._view.info(own)
        self.covered.append(
            Covered(
                name, own, info.shape, info.dtype, inside, replaced, int(other.sum()) - replaced
            )
        )
        if not is_shared:  # a write would show in the base, and there is nothing to fill
            self._kept[own] = _Kept(words.clone(), filler)

    def fill(self, bits: Bits | None = None, *, outside: bool) -> None:
        """Fill the entries outside a set of entries, or those inside; the others are as tuned.

        Args:
            bits: gives the words of each covered tensor's set of entries; None takes the mask.
            outside: whether what is outside is filled, or what is inside.
        """
        import torch

        for each in self.covered:
            kept = self._kept.get(each.own)
            if kept is None:
                continue
            words = _words(each.name, self._view.read(each.own))
            inside = _flags(self._bits_of(each.name) if bits is None else bits(each), words)
            stays, goes = (kept.values, kept.filler) if outside else (kept.filler, kept.values)
            with torch.no_grad():
                torch.where(inside, stays, goes, out=words)
        torch.clear_autocast_cache()  # casts of other weights

    def fill_all(self) -> None:
        """Fill every entry that the mask covers."""
        import torch

        for own, kept in self._kept.items():
            _words(own, self._view.read(own)).copy_(kept.filler)
        torch.clear_autocast_cache()

    def put_back(self) -> list[str]:
        """Write back what was there, and check every bit; raise `SubnetError` where one is not.

        Returns:
            The tensors that had other bits though nothing here fills them: `evaluate` wrote to them
            behind torch's back (`.data`).
        """
        import torch

        lost, written = [], []
        for own, kept in self._kept.items():
            try:
                words = _words(own, self._view.read(own))
                words.copy_(kept.values)
                if not torch.equal(words, kept.values.to(words.device)):
                    lost.append(own)
            except CheckpointError:  # replaced, or of another dtype: not the weights that were kept
                lost.append(own)
        for name, before in self._others.items():
            try:
                now = self._view.read(name)
                if not _same_bits(now, before):
                    now.copy_(before)
                    written.append(name)
            except CheckpointError:
                lost.append(name)
        torch.clear_autocast_cache()
        if lost:
            raise SubnetError(
                f"{plural(len(lost), 'tensor')} of {safe(self.tuned.label)} could not be put back, "
                f"as evaluate replaced them: {first_few(lost)}; load the model again, and leave "
                "its weights alone in evaluate"
            )
        return written

    def _bits_of(self, name: str) -> Words:
        return np.concatenate([np.empty(0, np.uint64), *self._mask.words(name)])


@contextmanager
def filling(
    base: torch.nn.Module, tuned: torch.nn.Module, mask: UpdateMask, fill: str
) -> Iterator[FilledModel]:
    """Let `tuned` be filled inside the block; afterwards, whatever happened, it is as it was.

    Args:
        base: the model before.
        tuned: the model after; written to in place, one tensor after the other.
        mask: over tensors of the model.
        fill: `"base"`, `"zero"` or `"mean"`.

    Raises:
        PairMismatchError: the mask is of another model or base, or the two models share memory.
        SelectionError: a tensor cannot be filled so.
        SubnetError: at the end: the weights could not be put back, or others were written to.
    """
    model = FilledModel(base, tuned, mask, fill)
    try:
        yield model
    except BaseException:
        model.put_back()
        raise
    written = model.put_back()
    if written:
        raise SubnetError(
            f"evaluate wrote to {plural(len(written), 'tensor')} of {safe(model.tuned.label)} that "
            f"the mask does not cover: {first_few(written)}; all is put back. Only run the model "
            "there"
        )


def refuse_another_base(mask: UpdateMask, base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise if the mask was made from other checkpoints, as far as that can be known.

    Fingerprints are of whole checkpoints: they can be compared where the mask covers all weights of
    a model under the same names, shapes and dtypes.
    """
    made_from = mask.origin.base
    covered = {(each.name, each.shape, each.dtype) for each in mask.tensors}
    if not made_from or covered != _weights(base):
        return
    if made_from not in (base.fingerprint(), tuned.fingerprint()):
        raise PairMismatchError(
            f"the mask of {mask.origin.what} was made from another base than {safe(base.label)}: "
            f"{made_from} is the fingerprint of neither model; make it from checkpoints of these "
            "models, or take its entries without their origin: "
            "UpdateMask.of({name: mask[name] for name in mask})"
        )


def _weights(model: Checkpoint) -> set[tuple[str, tuple[int, ...], str]]:
    return {
        (name, info.shape, info.dtype)
        for name in model.names()
        if name not in model.ties and name not in model.buffers
        for info in [model.info(name)]
        if info.dtype in ARITHMETIC
    }


def _located(model: Checkpoint, mask: UpdateMask, role: str) -> tuple[Checkpoint, dict[str, str]]:
    """The model as the mask names its tensors, and its own name of each."""
    view, met = _met(model, mask)
    lost = [name for name in mask.names() if name not in met]
    if lost:
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names {plural(len(lost), 'tensor')} that "
            f"{safe(model.label)} ({role}) does not have: {first_few(lost)}; make the mask from "
            "checkpoints of this model"
        )
    for name, own in met.items():
        expected, found = mask.info(name).shape, view.info(own).shape
        if expected != found:
            raise PairMismatchError(
                f"{safe(own)} of {safe(model.label)} ({role}) has shape {list(found)}, the mask of "
                f"{mask.origin.what} was made for {list(expected)}; make it from checkpoints of "
                "this model"
            )
    return view, met


def _counted_once(view: Checkpoint, met: Mapping[str, str], mask: UpdateMask) -> dict[str, str]:
    """The model's name of each tensor of the mask that has entries, tied ones under one name."""
    first: dict[str, str] = {}
    for name, own in met.items():
        known = first.setdefault(view.ties.get(own, own), name)
        if known != name and not np.array_equal(mask[known], mask[name]):
            raise PairMismatchError(
                f"{safe(known)} and {safe(name)} are one tensor in {safe(view.label)} (tuned), and "
                "the mask holds other entries of each; leave one of them out of the mask"
            )
    return {name: met[name] for name in first.values() if mask.info(name).numel}


def _met(model: Checkpoint, mask: UpdateMask) -> tuple[Checkpoint, dict[str, str]]:
    """The model's name of each tensor of the mask; its experts one by one where the mask has so."""
    as_checkpoint = cast("Checkpoint", mask)  # only names and shapes are looked at

    def match(view: Checkpoint) -> dict[str, str]:
        own = {name: name for name in view.names()}
        return match_names(as_checkpoint, view, mask.names(), own).met

    met = match(model)
    left = {name: name for name in mask.names() if name not in met}
    if left and not fused_otherwise(model.config.get("model_type")):
        used = set(met.values())
        others = {name: name for name in model.names() if name not in used}
        parts = experts_to_split(model, others, as_checkpoint, left)
        if parts:
            view = ExpertsCheckpoint(model, parts)
            return view, match(view)
    return model, met


def _read(model: Checkpoint, mask: UpdateMask) -> dict[str, torch.Tensor]:
    """The tensors of the base where they are, by the mask's names."""
    view, met = _located(model, mask, "base")
    return {name: view.read(own) for name, own in met.items()}


def _shared(
    base: Checkpoint,
    tuned: Checkpoint,
    names: Mapping[str, str],
    from_base: Mapping[str, torch.Tensor] | None,
) -> list[str]:
    """Tensors of the mask whose memory the base uses too."""
    memory = {_storage(base.read(name)) for name in base.names()}
    shared = []
    for name, own in names.items():
        tensor = tuned.read(own)
        if _storage(tensor) not in memory:
            continue
        if from_base is not None and from_base[name].data_ptr() != tensor.data_ptr():
            raise PairMismatchError(
                f"{safe(name)} of tuned lies in memory that the base uses for another tensor; "
                "load the models without sharing"
            )
        shared.append(name)
    return shared


def _storage(tensor: torch.Tensor) -> Hashable:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _same_dtype(name: str, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    if base.dtype != tuned.dtype:
        dtypes = [str(each.dtype).removeprefix("torch.") for each in (base, tuned)]
        raise PairMismatchError(
            f"{safe(name)} is {dtypes[0]} in base and {dtypes[1]} in tuned; load both in one dtype"
        )
    return base


def _constant(name: str, tensor: torch.Tensor, fill: str) -> torch.Tensor:
    """The one value that a tensor is filled with, as a word of its dtype."""
    import torch

    if fill == "zero":
        return _words(name, torch.zeros((), dtype=tensor.dtype))
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ARITHMETIC:
        raise SelectionError(
            f'{safe(name)} is {dtype}, which has no mean; take fill="zero" or fill="base", or '
            "leave it out of the mask"
        )
    mean = tensor.mean(dtype=torch.float64).to(tensor.dtype)
    if not mean.isfinite():
        raise SelectionError(
            f'{safe(name)} of tuned has no finite mean: it holds NaN or Inf; take fill="base" or '
            'fill="zero", or leave it out of the mask'
        )
    return _words(name, mean)


def _words(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The entries of `tensor` where they are, as integers with the same bits."""
    import torch

    if hasattr(tensor, "to_local"):
        raise SelectionError(
            f"{safe(name)} is sharded over several processes, where a mask of whole tensors does "
            "not fit; load the model without FSDP or tensor parallelism"
        )
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.element_size() not in sizes:
        raise SelectionError(
            f"{safe(name)} is {tensor.dtype}, which cannot be filled; leave it out"
        )
    return tensor.detach().view(sizes[tensor.element_size()])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    flat = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)


def _flags(bits: Words, like: torch.Tensor) -> torch.Tensor:
    """Packed entries as booleans in the shape of `like`, where it is."""
    import torch

    if like.device.type == "cpu":
        return torch.from_numpy(unpack(bits.view(np.uint8), like.numel())).reshape(like.shape)
    return inside_of(Part("", torch.from_numpy(bits.view(np.uint8))), like)


def _notes(
    left: list[str],
    left_numel: int,
    shared: list[str],
    mask: UpdateMask,
    names: Mapping[str, str],
) -> tuple[str, ...]:
    notes = []
    if left:
        stay = "stays" if len(left) == 1 else "stay"
        notes.append(
            f"{plural(len(left), 'tensor')} with {plural(left_numel, 'entry')} that the mask does "
            f"not cover {stay} as tuned: {first_few(left)}"
        )
    notes += [
        f"{safe(name)} is tied, counted once"
        for name in mask.names()
        if name not in names and mask.info(name).numel
    ]
    if shared:
        notes.append(
            f"{plural(len(shared), 'tensor')} {_hold(shared)} the same memory in both models, and "
            "so nothing to fill"
        )
    return tuple(notes)


def _hold(names: list[str]) -> str:
    return "holds" if len(names) == 1 else "hold"
