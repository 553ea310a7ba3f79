"""Find a subnetwork that does one thing, by continuous sparsification (arXiv 2504.15471)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import SubnetError
from pytest_subnet.progress import bar
from pytest_subnet.text import safe
from pytest_subnet.training.finding_checkpoint import Progress, Search, load, save
from pytest_subnet.training.finding_masks import of_soft
from pytest_subnet.training.finding_result import FoundSubnetwork, SubnetworkRun
from pytest_subnet.training.finding_rules import is_stable, sparsest
from pytest_subnet.training.finding_run import Attempt, Settings, pick, seed_step
from pytest_subnet.training.soft_mask import maskable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import torch

    from pytest_subnet.pairs.selection import Patterns


def find_subnetwork(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    batches: Callable[[int], Any] | Sequence[Any],
    lambdas: float | Sequence[float],
    score: Callable[[Any], float] | None = None,
    within: float = 0.04,
    learning_rate: float = 5e-5,
    temperature_growth: float = 1.001,
    max_steps: int = 15_000,
    attempts: int = 3,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
) -> FoundSubnetwork:
    """Find the fewest weights of `model` that do what `loss` asks for; all others become zero.

    Each weight W becomes W * sigmoid(t * m), with a number m per entry that starts at 0 and is
    trained by AdamW on loss + λ / entries * (sum of the sigmoids). The temperature t starts at 1
    and grows with every step, until the sigmoids are 0 or 1; in the mask are entries with m > 0.
    A search ends when fewer entries are undecided (sigmoid from 0.1 to 0.9) than 1 % of those kept
    (above 0.9), or none is, or after `max_steps`. It begins again, on other batches, where the loss
    rose more than 0.25 or a quarter above the mean of ten steps and was not back 100 steps before
    the end. Entries that are 0 in the model are left out from the start.

    The model is never written to, neither its weights nor its gradients nor its buffers: `loss`
    and `score` are called with the model itself, in which other tensors stand in for the time of
    the call. It stays in the mode that it is in; call `model.eval()` before, so that no dropout
    is in the way.

    Valid usages:
        find_subnetwork(model, loss, batches=batches, lambdas=10)
        find_subnetwork(model, loss, batches=batches, lambdas=(0, 1, 5, 10, 50), score=correlation)
        find_subnetwork(model, loss, batches=batches, lambdas=10, checkpoint="search.safetensors")

    Args:
        model: any module whose weights are whole on one or several devices, in floating point.
        loss: called with the model and a batch; gives a scalar tensor with a gradient.
        batches: the batch of a step, so that a search that was killed can go on: a function of the
            step's number, or a sequence, taken one after the other and over again.
        lambdas: weight of the penalty on the share of entries kept, at least 0: one, or several of
            which one is 0; each is searched.
        score: called with the model under a mask found, without gradient; gives a number, more is
            better. Of several λ the sparsest mask is taken whose score is at most `within` below
            that of λ = 0. Needed where there are several.
        within: finite, at least 0, in the score's own unit; the paper's is a correlation.
        learning_rate: of AdamW, above 0.
        temperature_growth: factor a step, above 1.
        max_steps: of each attempt, at least 1.
        attempts: how often one λ is tried in all, at least 1; the last attempt counts if none is
            stable.
        include: glob or globs on names of weights; None takes all matrices of attention and MLPs.
            Embeddings, heads, norms and biases are never masked.
        exclude: glob or globs on names to leave out.
        kinds: kind or kinds (`"down_proj"`, `"q_proj"`, …).
        seed: torch's random numbers are seeded anew for each step from it and the step's number;
            `batches` and `loss` may draw from them. Afterwards they are as they were before.
        checkpoint: a safetensors file that is written every `checkpoint_every` steps and after
            each λ. Where it is there already, the search goes on from it, and gives to the bit what
            it would have given uninterrupted; where it has ended, its result is read back.
        checkpoint_every: steps between two, at least 1.

    Returns:
        FoundSubnetwork: mask (packed, in `UpdateMask`), `lambda_`, score, stopped, steps,
        retrained, history, and the same of every λ in `runs`.

    Raises:
        CheckpointError: the checkpoint cannot be read or written, or is of another search.
        SelectionError: no weight to mask, a pattern that matches none, or weights are sharded.
        SubnetError: the loss or a score is not finite.
        TypeError: an argument is something else; the loss is no tensor, a score no number.
        ValueError: an argument outside its range; a loss of several numbers, or without gradient.

    Source: arXiv 2504.15471; the rules for the end and for spikes are
        those of its published code.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight = torch.nn.Parameter(torch.tensor([[3.0, 0.1]]))
    >>> inputs = torch.eye(2)
    >>> def loss(model, target):
    ...     return (model(inputs) - target).square().sum()
    >>> found = find_subnetwork(
    ...     model, loss, batches=[torch.tensor([[3.0], [0.1]])], lambdas=0.5,
    ...     learning_rate=0.05, temperature_growth=1.05, max_steps=200,
    ... )
    >>> found.mask["weight"].tolist()
    [[True, False]]
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {safe(type(model).__name__)}, not a torch.nn.Module")
    _check_callable("loss", loss)
    _check_batches(batches)
    settings = Settings(
        _lambdas(lambdas),
        _above("learning_rate", learning_rate, 0),
        _above("temperature_growth", temperature_growth, 1),
        _whole("max_steps", max_steps, 1),
        _whole("attempts", attempts, 1),
        _whole("seed", seed, 0),
    )
    checkpoint_every = _whole("checkpoint_every", checkpoint_every, 1)
    _check_choice(settings.lambdas, score, within)
    names = maskable(model, include=include, exclude=exclude, kinds=kinds)
    search = Search(settings, names, open_checkpoint(model).fingerprint())
    path = None if checkpoint is None else Path(checkpoint)
    progress = Progress() if path is None else load(path, search, model)

    def keep() -> None:
        if path is not None:
            save(path, search, progress)

    with _random_state_kept():
        while len(progress.runs) < len(settings.lambdas):
            attempt = _run(model, loss, batches, search, progress, keep, checkpoint_every)
            progress.runs.append(_ended(attempt, search, progress, score))
            progress.number, progress.attempt = 0, None
            keep()
    scores = [run.score or 0.0 for run in progress.runs]
    counts = [run.mask.count for run in progress.runs]
    chosen = sparsest(settings.lambdas, scores, counts, within) if len(scores) > 1 else 0
    return FoundSubnetwork(tuple(progress.runs), chosen)


def _run(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    batches: Callable[[int], Any] | Sequence[Any],
    search: Search,
    progress: Progress,
    keep: Callable[[], None],
    every: int,
) -> Attempt:
    """Attempt the next λ until an attempt is stable, or was the last one."""
    settings = search.settings
    lambda_ = settings.lambdas[len(progress.runs)]
    while True:
        attempt = progress.attempt or Attempt(model, search.names, lambda_, settings)
        progress.attempt = attempt
        with bar(settings.max_steps, f"subnetwork, λ = {lambda_:g}", unit=" steps") as advance:
            advance(len(attempt.history))
            while not attempt.settled and len(attempt.history) < settings.max_steps:
                step = len(attempt.history)
                seed_step(settings, progress.number, step)
                attempt.step(loss, pick(batches, settings, progress.number, step))
                advance(1)
                if not attempt.settled and (step + 1) % every == 0:
                    keep()
        stable = is_stable([each.loss for each in attempt.history])
        if stable or progress.number + 1 == settings.attempts:
            return attempt
        progress.number += 1
        progress.attempt = None


def _ended(
    attempt: Attempt,
    search: Search,
    progress: Progress,
    score: Callable[[Any], float] | None,
) -> SubnetworkRun:
    lambda_ = search.settings.lambdas[len(progress.runs)]
    return SubnetworkRun(
        lambda_=lambda_,
        mask=of_soft(attempt.mask, lambda_, search.weights),
        score=None if score is None else _scored(attempt, score, lambda_),
        stopped="settled" if attempt.settled else "max_steps",
        retrained=progress.number,
        stable=is_stable([each.loss for each in attempt.history]),
        history=tuple(attempt.history),
    )


def _scored(attempt: Attempt, score: Callable[[Any], float], lambda_: float) -> float:
    """What `score` makes of the model under the binary mask."""
    import torch

    with torch.no_grad():
        value = attempt.mask.call(score, attempt.mask.bits())
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not _is_a(Real, value):
        raise TypeError(f"score gave {safe(type(value).__name__)}, not a number")
    number = float(cast("float", value))
    if not math.isfinite(number):
        raise SubnetError(
            f"score gave {number} for the mask of λ = {lambda_:g}, by which nothing can be "
            "chosen; a correlation needs values that differ"
        )
    return number


@contextmanager
def _random_state_kept() -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _lambdas(value: float | Sequence[float]) -> tuple[float, ...]:
    several = list(value) if isinstance(value, Sequence) else [value]
    if not several:
        raise ValueError("lambdas is empty; give one number of at least 0, or several")
    if not all(_is_a(Real, each) for each in several):
        raise TypeError(
            f"lambdas={safe(repr(value))} is no number of at least 0, nor several of them"
        )
    for each in several:
        if not (math.isfinite(each) and each >= 0):
            raise ValueError(f"λ = {each!r} is not a finite number of at least 0")
    if len(set(several)) != len(several):
        raise ValueError(f"lambdas={safe(repr(value))} holds one number twice")
    return tuple(float(each) for each in several)


def _check_choice(lambdas: tuple[float, ...], score: object, within: float) -> None:
    if score is not None:
        _check_callable("score", score)
    if not _is_a(Real, within):
        raise TypeError(f"within={safe(repr(within))} is not a number")
    if not (math.isfinite(within) and within >= 0):
        raise ValueError(f"within={within!r} is not a finite number of at least 0")
    if len(lambdas) == 1:
        return
    if score is None:
        raise ValueError(
            f"{len(lambdas)} λ and no score to choose one by; give score, or a single λ"
        )
    if 0 not in lambdas:
        raise ValueError(
            "of several λ one must be 0: the others are held against the score that it reaches"
        )


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} is {safe(type(value).__name__)}, not a function")


def _check_batches(batches: object) -> None:
    if callable(batches):
        return
    if not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
        raise TypeError(
            f"batches is {safe(type(batches).__name__)}, from which the batch of a step cannot be "
            "had again when a search goes on; give a function of the step's number, or list(...) "
            "of a loader"
        )
    if not len(batches):
        raise ValueError("batches is empty")


def _above(name: str, value: float, limit: float) -> float:
    if not _is_a(Real, value):
        raise TypeError(f"{name}={safe(repr(value))} is not a number")
    if not (math.isfinite(value) and value > limit):
        raise ValueError(f"{name}={value!r} is not a finite number above {limit}")
    return float(value)


def _whole(name: str, value: int, least: int) -> int:
    if not _is_a(Integral, value):
        raise TypeError(f"{name}={safe(repr(value))} is not a whole number")
    if value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")
    return int(value)


def _is_a(number: type, value: object) -> bool:
    return isinstance(value, number) and not isinstance(value, bool)
