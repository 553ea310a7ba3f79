"""The pairs and runs that a session opened: the same arguments twice give the same one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.errors import SubnetError
from pytest_subnet.reports.session import report_key
from pytest_subnet.settings import locate, settings_key, shown
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.opening import Rename, Vocab
    from pytest_subnet.settings import Settings
    from pytest_subnet.trajectories import Trajectory


def chosen_device(settings: Settings) -> str:
    """The device to work on, of those that this process can see.

    Raises:
        SubnetError: a GPU was asked for by name, and there is none.
    """
    asked = settings.device
    if asked == "cpu":
        return "cpu"
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of drivers it cannot use: no GPU, then
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is not None and (count == 0 or (":" in asked and int(asked[5:]) >= count)):
        raise SubnetError(
            f"--subnet-device {asked}: torch {torch.__version__} sees {count} CUDA devices; "
            "install a CUDA build of torch or check CUDA_VISIBLE_DEVICES, or ask for cpu"
        )
    if count == 0:
        return "cpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = int(worker[2:] if worker.startswith("gw") else os.environ.get("LOCAL_RANK") or 0)
    return asked if asked is not None and ":" in asked else f"cuda:{number % count}"


class Opened:
    """Opens pairs and runs for whoever asks: fixtures and policies.

    Paths are relative to the rootdir. Checkpoints that were written to in between, models that were
    trained and runs that gained a checkpoint are others than before.
    """

    def __init__(self, config: pytest.Config) -> None:
        """Nothing opened yet."""
        self._config = config
        self._settings = config.stash[settings_key]
        self._sources = _Sources(self._settings.root)
        self._pairs: dict[Hashable, ModelPair] = {}
        self._runs: dict[Hashable, Trajectory] = {}

    def pair(
        self,
        base: Source,
        tuned: Source,
        *,
        rename: Rename | None = None,
        vocab: Vocab = "strict",
        as_dtype: str | None = None,
    ) -> ModelPair:
        """Open a pair, or give the one that was opened with these arguments before."""
        from pytest_subnet.pairs.opening import open_pair
        from pytest_subnet.scan.gathering import declare, remember_in

        _check_types(rename, vocab, as_dtype)
        settings, pairs = self._settings, self._pairs
        left = self._sources.open(base)
        right = self._sources.open_on(left, tuned)
        renamed = tuple(sorted(rename.items())) if isinstance(rename, Mapping) else rename
        key = (left.label, left.identity(), right.label, right.identity(), renamed, vocab, as_dtype)
        if key not in pairs:
            pairs[key] = open_pair(
                left,
                right,
                rename=rename,
                vocab=vocab,
                as_dtype=as_dtype,
                device=self._device_for_pairs(),
                engine=settings.engine,
            )
            declare(pairs[key], settings.parsed_tolerances())
            directory = _cache_directory(self._config)
            if directory is not None:
                remember_in(pairs[key], directory)
            if not follows():  # all processes of a launcher read the same files
                self._config.stash[report_key].watch(pairs[key])
        return pairs[key]

    def _device_for_pairs(self) -> str | None:
        if self._settings.device and self._settings.engine != "ray":
            return chosen_device(self._settings)
        return self._settings.device  # the GPUs of a cluster need not be here

    def trajectory(
        self,
        source: str | os.PathLike[str] | Sequence[Source],
        *,
        pattern: str = "checkpoint-*",
        as_dtype: str | None = None,
    ) -> Trajectory:
        """Open the checkpoints of a run in numeric order, or give those opened before."""
        from pytest_subnet.scan.following import declare
        from pytest_subnet.trajectories.opening import align, find_checkpoints, open_all

        _check_types(None, None, as_dtype)
        settings, runs = self._settings, self._runs
        if isinstance(source, str | os.PathLike) and os.fspath(source):
            source = settings.root / os.path.expanduser(source)  # noqa: PTH111 - as in locate
        names, found = find_checkpoints(source, pattern)
        checkpoints = open_all(found, self._sources.open)
        key = (as_dtype, *((each.label, each.identity()) for each in checkpoints))
        if key not in runs:
            runs[key] = align(names, checkpoints, as_dtype)
            for pair in runs[key].pairs:
                pair.engine = settings.engine
            declare(runs[key], settings.parsed_tolerances())
        return runs[key]


opened_key = pytest.StashKey[Opened]()


def _cache_directory(config: pytest.Config) -> Path | None:
    """Where this run and its workers keep what they count; None without pytest's cache."""
    cache: pytest.Cache | None = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is None:
        return None
    try:
        return cache.mkdir("subnet")
    except OSError:  # nothing can be written below the rootdir
        return None


def _check_types(rename: object, vocab: object, as_dtype: object) -> None:
    """Raise for what `open_pair` cannot take, and no key of a known pair could hold."""
    for keyword, value in (("vocab", vocab), ("as_dtype", as_dtype)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{keyword}={safe(repr(value))} is not a string")
    if not isinstance(rename, Mapping):
        if rename is not None and not callable(rename):
            raise TypeError(
                f"rename={safe(repr(rename))} is neither a mapping from names in tuned to names in "
                "base nor a function"
            )
        return
    for name in (*rename, *rename.values()):
        if not isinstance(name, str):
            raise TypeError(f"rename maps names to names; {safe(repr(name))} is not a string")


class _Sources:
    """Opens what `open_model_pair` is given; a path again only if its files were written to."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[Checkpoint, Hashable]] = {}

    def open(self, source: Source) -> Checkpoint:
        from pytest_subnet.checkpoints.opening import open_checkpoint

        if not isinstance(source, str | os.PathLike):
            return open_checkpoint(source)
        path = locate(os.fspath(source), self._root)
        if not self._is_good(path):
            checkpoint = open_checkpoint(path)
            checkpoint.label = shown(checkpoint.label, self._root)
            self._known[path] = checkpoint, checkpoint.identity()
        return self._known[path][0]

    def open_on(self, base: Checkpoint, source: Source) -> Checkpoint:
        """As `open`; an adapter is opened on `base`."""
        from pytest_subnet.checkpoints.adapters.opening import is_adapter, open_adapter

        if not isinstance(source, str | os.PathLike):
            return self.open(source)
        path = locate(os.fspath(source), self._root)
        if not is_adapter(path):
            return self.open(source)
        return open_adapter(path, base, label=shown(path, self._root))

    def _is_good(self, path: str) -> bool:
        if path not in self._known:
            return False
        checkpoint, identity = self._known[path]
        try:
            return checkpoint.identity() == identity
        except SubnetError:  # a file is gone
            return False
