"""PEFT adapters: a base and what LoRA adds to it, read as one model."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard, get_args

from pytest_subnet.checkpoints.adapters.config import CONFIG, read_config
from pytest_subnet.checkpoints.adapters.keys import LowRank, Whole, make_plan
from pytest_subnet.checkpoints.adapters.notes import caveats, oddities, summary
from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import check_stamp, exists, names_in, stamp
from pytest_subnet.checkpoints.folders import is_state
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.checkpoints.safetensors import SafetensorsCheckpoint
from pytest_subnet.checkpoints.wording import looked_in, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.adapters.keys import Plan
    from pytest_subnet.checkpoints.base import Buffer, Extent
    from pytest_subnet.checkpoints.opening import Source

Reading: TypeAlias = Literal["merged", "algebraic"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_COMPARED = 4 * 1024 * 1024
"""Entries of a copy compared with the base at once."""

_KEPT, _KEPT_BYTES = 2, 128 * 1024 * 1024
"""Merged matrices that are kept at least, and the bytes up to which more are."""


def is_adapter(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether `source` is the path of a directory that holds a PEFT adapter and no model.

    >>> is_adapter("base")
    False
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        return False
    directory = _directory(source)
    if not exists(directory) or not directory.is_dir():
        return False
    present = names_in(directory)
    models = [
        name
        for name in present
        if name.endswith(_MODELS) and not (name.startswith("adapter_") or is_state(name))
    ]
    return CONFIG in present and any(name in present for name in _WEIGHTS) and not models


def open_adapter(
    path: str | os.PathLike[str],
    base: Source,
    *,
    reading: Reading = "merged",
    label: str | None = None,
) -> Checkpoint:
    """Open a PEFT adapter on its base as the model that the two are; headers are read.

    An update by LoRA can be read in two ways, which differ in their sparsity and their rank.
    *Merged* are the weights as peft merges them and as they are served: in the base's dtype, the
    update added in float32 and rounded once; most of a small update may vanish there, and what is
    left has full rank. *Algebraic* is what was trained: base + update in float64, unrounded; dense,
    and of the adapter's rank.

    What peft leaves alone is read where the base has it. A changed matrix is made when it is first
    asked for, one at a time, and the last ones are kept; peak memory is the largest matrix in
    float32 (float64 for algebraic; four times that with DoRA), once in the base's dtype, and what
    is kept: two matrices, or 128 MB of them. An adapter stores copies of the embeddings that it
    adapts; they are compared with the base when it is opened, as its only fingerprint.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        base: the model that it was trained on; anything `open_checkpoint` takes. What the config
            names as its base is not followed.
        reading: `"merged"` or `"algebraic"`; see above.
        label: how messages name it; the path by default.

    Returns:
        The whole model. With `"merged"` every tensor has the base's dtype, with `"algebraic"` the
        matrices with an update are float64: compare them with
        `open_pair(base, algebraic, as_dtype="float64")`.

    Raises:
        CheckpointError: the adapter cannot be read, is not LoRA (rsLoRA, DoRA), needs more of peft
            than is handled, or does not fit the base: a module it does not have, another shape,
            other embeddings.
        ValueError: an unknown `reading`.

    >>> merged = open_adapter("adapter", "base")
    >>> merged.info("model.layers.0.self_attn.q_proj.weight").dtype
    'bfloat16'
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading={safe(repr(reading))} is not one of 'merged', 'algebraic'")
    directory = _directory(path)
    if not exists(directory) or not directory.is_dir():
        raise CheckpointError(
            f"no adapter at {short(path)}: there is no such directory{looked_in(os.fspath(path))}"
        )
    if CONFIG not in (present := names_in(directory)):
        raise CheckpointError(
            f"{short(path)} is no PEFT adapter: it has no {CONFIG} (it holds "
            f"{first_few(sorted(present), 5)}); pass the directory that does, as "
            "open_adapter(adapter, base)"
        )
    opened = open_checkpoint(base)
    return AdapterCheckpoint(directory, opened, reading, label=label or os.fspath(path))


class AdapterCheckpoint(Checkpoint):
    """A base with a PEFT adapter on it; made by `open_adapter`."""

    def __init__(self, directory: Path, base: Checkpoint, reading: Reading, *, label: str) -> None:
        """Read the adapter's config and header, and hold them to the base.

        Args:
            directory: of the adapter.
            base: the model under it.
            reading: `"merged"` or `"algebraic"`.
            label: how messages name it.
        """
        self.label = label
        self.directory = directory
        self._config_stamp = stamp(directory / CONFIG)
        self._lora, named = read_config(directory)
        self._adapter = _open_weights(directory, label)
        self._base, self._reading = base, reading
        self._peft = version("peft")
        self._plan = make_plan(self._adapter, base, self._lora)
        for key, target in self._plan.copies.items():
            _check_copy(self._adapter, key, base, target)
        untied = _untied_names(self._plan)
        self._known = frozenset(base.names())
        self._names = [*base.names(), *sorted(untied - self._known)]
        self._changed = self._changes(untied)
        self._infos = {name: self._changed_info(name) for name in self._changed}
        self.buffers = base.buffers
        self.shows_buffers, self.shows_ties = base.shows_buffers, base.shows_ties
        self.is_live = base.is_live
        self.ties = {
            name: source for name, source in base.ties.items() if {name, source}.isdisjoint(untied)
        }
        self.config = _without_tie(base.config) if untied else base.config
        cast = [name for name in self._plan.whole if self._stored(name) is None]
        self.notes = (
            *base.notes,
            *summary(label, base, self._plan, self._lora, reading),
            *caveats(label, self._adapter, base, self._plan, self._lora, reading),
            *oddities(label, base, self._plan, named, cast, sorted(untied)),
        )
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, NDArray[np.uint8]] = OrderedDict()

    def names(self) -> Sequence[str]:
        """All tensor names, in the base's order."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """What the base's header says of `name`; of an algebraic sum, that it is float64."""
        if name in self._infos:
            return self._infos[name]
        if name in self._known:
            return self._base.info(name)
        if name in self._names:
            return self._base.info(self._in_base(name))._replace(name=name)
        raise self.unknown(name)

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where the base or the adapter has the bytes; None for what is made of both."""
        self.check_range(name, start, nbytes)
        stored = self._stored(name)
        return None if stored is None else stored[0].extents(stored[1], start, nbytes)

    def view(self, name: str) -> Buffer | None:
        """The bytes of what is made of base and adapter, which makes it the first time."""
        self.info(name)
        stored = self._stored(name)
        return self._made(name) if stored is None else stored[0].view(stored[1])

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy bytes from the base, from the adapter or from what is made of both."""
        self.check_range(name, start, len(buffer))
        stored = self._stored(name)
        if stored is not None:
            stored[0].read_into(stored[1], start, buffer)
        else:
            buffer[:] = self._made(name)[start : start + len(buffer)].data

    def identity(self) -> Hashable:
        """That of the base, of the adapter's two files, the reading, and the peft that merges.

        Every scan asks for it first: what was made of a live base is made again, since torch does
        not tell of every write to that.
        """
        if self.is_live:
            with self._lock:
                self._kept.clear()
        config = stamp(self._config_stamp.path)
        return self._base.identity(), config, self._adapter.identity(), self._reading, self._peft

    def identity_when_opened(self) -> Hashable:
        """The same as they were when they were opened."""
        opened = self._base.identity_when_opened(), self._adapter.identity_when_opened()
        return opened[0], self._config_stamp, opened[1], self._reading, self._peft

    def check_unchanged(self) -> None:
        """Raise if a file of the base or of the adapter was written to since."""
        self._base.check_unchanged()
        check_stamp(self._config_stamp)
        self._adapter.check_unchanged()

    def __getstate__(self) -> dict[str, object]:
        """All but what was made and is kept: another process makes it again."""
        return {**self.__dict__, "_lock": None, "_kept": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with nothing made."""
        self.__dict__.update(state)
        self._lock, self._kept = threading.Lock(), OrderedDict()

    def _changes(self, untied: set[str]) -> dict[str, LowRank | Whole]:
        """What is not as the base has it, under each name that it has."""
        changed: dict[str, LowRank | Whole] = {**self._plan.low_rank, **self._plan.whole}
        for name, source in self._plan.second_names.items():
            if name in self._known and name not in untied and source in changed:
                changed[name] = changed[source]
        return changed

    def _changed_info(self, name: str) -> TensorInfo:
        change, there = self._changed[name], self._base.info(self._in_base(name))
        dtype = there.dtype
        if self._reading == "algebraic":
            dtype = "float64"
            if isinstance(change, Whole):
                dtype = self._adapter.info(change.key).dtype
        return TensorInfo(name, there.shape, dtype, there.numel * DTYPES[dtype].itemsize)

    def _in_base(self, name: str) -> str:
        """Where the base has `name`: a head that it only ties is there as the embedding."""
        return name if name in self._known else self._plan.second_names[name]

    def _stored(self, name: str) -> tuple[Checkpoint, str] | None:
        """Who has the bytes of `name`, and under which name; None if they have to be made."""
        change = self._changed.get(name)
        if change is None:
            return self._base, self._in_base(name)
        if isinstance(change, Whole) and (
            self._infos[name].dtype == self._adapter.info(change.key).dtype
        ):
            return self._adapter, change.key
        return None

    def _made(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a changed tensor; one is made at a time, however many threads ask."""
        change = self._changed[name]
        key = (change.target, self._base.identity() if self.is_live else None)
        with self._lock:
            found = self._kept.pop(key, None)
            self._kept[key] = made = self._make(change, name) if found is None else found
            while len(self._kept) > _KEPT and sum(map(len, self._kept.values())) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return made

    def _make(self, change: LowRank | Whole, name: str) -> NDArray[np.uint8]:
        import torch

        from pytest_subnet.checkpoints.adapters.merging import merge

        dtype = getattr(torch, self._infos[name].dtype)
        if isinstance(change, Whole):
            tensor = self._adapter.read(change.key).to(dtype)
        else:
            tensor = merge(change, self._adapter, self._base, self._lora, dtype)
        made: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        return made


def _untied_names(plan: Plan) -> set[str]:
    """Names that the base ties and the merged model does not: one of them was trained apart."""
    ties = [{name, source} for name, source in plan.second_names.items()]
    return {name for tie in ties if not tie.isdisjoint(plan.whole) for name in tie}


def _without_tie(config: Mapping[str, object]) -> dict[str, object]:
    text = config.get("text_config")
    inner = {"text_config": _without_tie(text)} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _directory(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # `~name` of nobody: the path as it stands, which will not exist
        return Path(path).absolute()


def _open_weights(directory: Path, label: str) -> Checkpoint:
    present = names_in(directory)
    found = [name for name in _WEIGHTS if name in present]
    if len(found) != 1:
        has = " and ".join(found) or "neither " + " nor ".join(_WEIGHTS)
        raise CheckpointError(
            f"{safe(directory)} holds {has}; "
            + ("remove the stale one" if found else "was the save cut short?")
        )
    path = directory / found[0]
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, label=label, config={})
    from pytest_subnet.checkpoints.torch_files import TorchCheckpoint

    return TorchCheckpoint(path, label=label, config={})


def _check_copy(adapter: Checkpoint, key: str, base: Checkpoint, target: str) -> None:
    """Raise unless `key` is what `target` is, in the dtype that the model was loaded in."""
    import torch

    info = adapter.info(key)
    dtype = getattr(torch, info.dtype)
    rows = info.shape[0] if info.shape else 0
    step = max(_COMPARED * rows // max(info.numel, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        copy, there = adapter.read(key, part), base.read(target, part).detach().cpu().to(dtype)
        if not torch.equal(_bytes(copy), _bytes(there)):
            raise CheckpointError(
                f"{safe(adapter.label)} was not trained on {safe(base.label)}: {short(key)}, its "
                f"copy of {short(target)}, holds other values; pass the base that it was trained on"
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
