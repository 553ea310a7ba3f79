"""A search as a file, so that one that was killed goes on: safetensors, whole or not at all.

Of the attempt under way the file holds the numbers of the soft mask and both moments of its
optimiser, by the place of the weight; of the attempt and of the runs that ended, the history and,
of the runs, the packed bits of their masks. What search it is, and how far, is in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import numpy as np

from pytest_subnet.atomic import write_bytes
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.masks.bits import packed_bytes
from pytest_subnet.text import safe
from pytest_subnet.training.finding_masks import mask_of, packed
from pytest_subnet.training.finding_result import SearchStep, SubnetworkRun
from pytest_subnet.training.finding_run import Attempt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from pytest_subnet.training.finding_run import Settings
    from pytest_subnet.training.soft_mask import SoftMask

_FORMAT = "pytest-subnet search"
_VERSION = "1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Search(NamedTuple):
    """What is looked for: two searches that agree in it give the same subnetwork.

    Attributes:
        settings: of the search.
        names: of the weights masked.
        weights: the fingerprint of the model.
    """

    settings: Settings
    names: tuple[str, ...]
    weights: str

    def facts(self) -> dict[str, Any]:
        """By name, as they are compared."""
        named = {"weights masked": list(self.names), "the model": self.weights}
        return {**asdict(self.settings), "lambdas": list(self.settings.lambdas), **named}


class Progress:
    """How far a search has come.

    Attributes:
        runs: those that ended.
        number: which attempt at the next λ this is, from 0.
        attempt: what it has done; None before it begins.
    """

    def __init__(self) -> None:
        """Nothing done."""
        self.runs: list[SubnetworkRun] = []
        self.number = 0
        self.attempt: Attempt | None = None


def save(path: Path, search: Search, progress: Progress) -> None:
    """Write how far the search has come.

    Raises:
        CheckpointError: it cannot be written.
    """
    import torch
    from safetensors.torch import save as to_bytes

    tensors: dict[str, torch.Tensor] = {}
    for place, run in enumerate(progress.runs):
        tensors[f"run.{place}.history"] = _history(run.history)
        for index, name in enumerate(search.names):
            tensors[f"run.{place}.bits.{index}"] = torch.from_numpy(packed(run.mask, name))
    attempt = progress.attempt
    if attempt is not None:
        tensors["history"] = _history(attempt.history)
        for index, numbers in enumerate(attempt.mask.numbers):
            tensors[f"numbers.{index}"] = numbers.detach().cpu()
            for moment in _MOMENTS:
                state = attempt.optimizer.state[numbers]
                tensors[f"{moment}.{index}"] = state[moment].cpu()
    done = [
        {
            "score": run.score,
            "stopped": run.stopped,
            "retrained": run.retrained,
            "stable": run.stable,
        }
        for run in progress.runs
    ]
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "search": json.dumps(search.facts()),
        "runs": json.dumps(done),
        "attempt": json.dumps([progress.number, attempt is not None]),
    }
    try:
        write_bytes(path, to_bytes(tensors, metadata))
    except OSError as error:
        raise CheckpointError(
            f"cannot write the search to {safe(path)}: {error.strerror or error}; give a path in a "
            "directory that is there, can be written to and has room"
        ) from error


def load(path: Path, search: Search, model: torch.nn.Module) -> Progress:
    """How far the search in `path` had come; from the start where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or belongs to another search.
    """
    if not path.exists():
        return Progress()
    tensors, metadata = _read(path)
    _check_same(path, search, metadata)
    try:
        return _progress(search, model, tensors, metadata)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        _broken(path, f"{type(error).__name__}: {error}")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == _FORMAT and metadata.get("version") == _VERSION:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        _broken(path, str(error))
    raise CheckpointError(
        f"{safe(path)} is a safetensors file, and none that a search for a subnetwork wrote in "
        "this version; name another for checkpoint"
    )


def _check_same(path: Path, search: Search, metadata: dict[str, str]) -> None:
    try:
        there = json.loads(metadata["search"])
        others = [name for name, value in search.facts().items() if there[name] != value]
    except (KeyError, ValueError, TypeError) as error:
        _broken(path, f"{type(error).__name__}: {error}")
    if others:
        here = search.facts()
        told = [
            f"{name} ({short(there[name])} there, {short(here[name])} here)"
            if name in asdict(search.settings)
            else name
            for name in others
        ]
        raise CheckpointError(
            f"{safe(path)} is of another search, which differs in {', '.join(told)}; delete it to "
            "begin anew, or name another file for checkpoint"
        )


def _progress(
    search: Search,
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
) -> Progress:
    progress = Progress()
    done = json.loads(metadata["runs"])
    lambdas = search.settings.lambdas
    if len(done) > len(lambdas):
        raise ValueError(f"{len(done)} runs of {len(lambdas)}")
    fresh = Attempt(model, search.names, lambdas[min(len(done), len(lambdas) - 1)], search.settings)
    shapes, dtypes = fresh.mask.shapes, fresh.mask.dtypes
    for place, each in enumerate(done):
        lambda_ = lambdas[place]
        bits = [
            _tensor(tensors, f"run.{place}.bits.{index}", (packed_bytes(int(np.prod(shape))),))
            for index, shape in enumerate(shapes)
        ]
        arrays = [each.numpy() for each in bits]
        mask = mask_of(search.names, shapes, dtypes, arrays, lambda_, search.weights)
        stopped = each["stopped"]
        if stopped not in ("settled", "max_steps"):
            raise ValueError(f"stopped is {short(stopped)}")
        progress.runs.append(
            SubnetworkRun(
                lambda_=lambda_,
                mask=mask,
                score=None if each["score"] is None else float(each["score"]),
                stopped=stopped,
                retrained=int(each["retrained"]),
                stable=bool(each["stable"]),
                history=_steps(tensors[f"run.{place}.history"]),
            )
        )
    number, under_way = json.loads(metadata["attempt"])
    progress.number = int(number)
    if under_way:
        fresh.history = list(_steps(tensors["history"]))
        _fill(fresh, tensors)
        progress.attempt = fresh
    return progress


def _fill(attempt: Attempt, tensors: dict[str, torch.Tensor]) -> None:
    import torch

    states = {}
    mask: SoftMask = attempt.mask
    with torch.no_grad():
        for index, numbers in enumerate(mask.numbers):
            shape = tuple(numbers.shape)
            numbers.copy_(_tensor(tensors, f"numbers.{index}", shape))
            moments = {each: _tensor(tensors, f"{each}.{index}", shape) for each in _MOMENTS}
            states[index] = {"step": torch.tensor(float(len(attempt.history))), **moments}
    groups = attempt.optimizer.state_dict()["param_groups"]
    attempt.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _tensor(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}")
    return tensors[name]


def _history(steps: Sequence[SearchStep]) -> torch.Tensor:
    import torch

    return torch.tensor(steps, dtype=torch.float64).reshape(len(steps), 3)


def _steps(history: torch.Tensor) -> tuple[SearchStep, ...]:
    rows = cast("list[list[float]]", history.tolist())
    return tuple(SearchStep(loss, int(kept), int(undecided)) for loss, kept, undecided in rows)


def _broken(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{safe(path)} is no search that can be continued: {short(why)}; delete it to begin anew"
    )
