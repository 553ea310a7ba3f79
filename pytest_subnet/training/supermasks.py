"""Many tasks in one network, none of them forgotten: supermasks (SupSup, ExSSNeT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from pytest_subnet.errors import SelectionError, SubnetError
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.text import nearest, plural, safe
from pytest_subnet.training.inside import InsideTraining, train_inside
from pytest_subnet.training.supermasks_blocks import computed, guarded, swapped, training_only
from pytest_subnet.training.supermasks_layers import (
    BestScores,
    Inside,
    choose_layers,
    draw_scores,
    finite_scores,
    sign_constant_,
    top_k,
)

if TYPE_CHECKING:
    import os

    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.training.supermasks_choice import Choice
    from pytest_subnet.training.supermasks_nearest import Nearest


class Supermasks(Mapping[str, UpdateMask]):
    """One mask a task over the weights of a model, found by training scores, not weights.

    Mask M_t holds the entries of the largest |score| of each weight, exactly `density` of them to
    the nearest whole entry (half to even, at least one). With a mask alone and weights that are
    never trained this is SupSup. `learn_weights` adds what ExSSNeT does: it trains the entries
    E_t = M_t minus all earlier masks, and no others, so that what earlier tasks compute stays the
    same to the bit. Biases, norms, embeddings and what is left out stay as they are for all tasks.

    The training loops are the caller's, with optimisers, batches and schedules; the masks and what
    may change is kept here. It is a mapping from tasks, in the order in which they were learnt, to
    their masks.

    Args:
        model: whose weights of two or more dimensions, outside embeddings, are covered.
        density: in (0, 1]: share of each weight that is in a mask.
        include: glob or globs on names of parameters to cover in place of those; None takes them.
        exclude: glob or globs on names to leave out.
        signed: first set each covered weight to a constant with signs drawn, as SupSup does:
            ±√(2 / (density · fan_in)), in which `density` keeps signals as large as they were.
        seed: of the scores that each task starts from, and of the signs.
        keep_scores: keep the scores of each task, which later ones may start from: 4 bytes an entry
            and task, in main memory. Without, a task takes one bit an entry.

    Attributes:
        model: as given.
        density: as given.
        exclusive: by task, the entries E_t that no earlier mask holds.
        used: the entries that any mask holds; None before the first task.

    Raises:
        ValueError: `density` is outside (0, 1].
        TypeError: `model` is no module.
        SelectionError: there is no weight to cover, or one cannot be masked (tied, parametrised,
            of an LSTM, in fewer than two dimensions).
        SubnetError: a module keeps running statistics, as batch norms do.

    Source: arXiv 2006.14769 (SupSup), section 3; arXiv 2210.10209 (ExSSNeT), section 3; of the
        constant, arXiv 1911.13299, section 3.

    >>> masks = Supermasks(torch.nn.Linear(4, 4), density=0.25)
    >>> with masks.learn_mask("one") as scores:
    ...     optimizer = torch.optim.Adam(scores, lr=0.1)
    ...     masks.model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> optimizer = torch.optim.SGD(masks.model.parameters(), lr=0.1)
    >>> with masks.learn_weights("one", optimizer):
    ...     masks.model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> with masks.apply("one") as model:
    ...     output = model(torch.ones(1, 4))
    >>> masks, masks["one"].count
    (<Supermasks 1 task at density 0.25: 4 of 16 entries used>, 4)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        density: float,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        signed: bool = False,
        seed: int = 0,
        keep_scores: bool = True,
    ) -> None:
        """Choose what is covered; nothing but the signs is changed."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is {safe(type(model).__name__)}, not a torch.nn.Module")
        if isinstance(density, bool) or not isinstance(density, int | float):
            raise TypeError(f"density={safe(repr(density))} is not a number")
        if not 0 < density <= 1:  # also NaN
            hint = f"; {density:g}% is density={density / 100:g}" if 1 < density <= 100 else ""
            raise ValueError(f"density={density!r} is not a share in (0, 1]{hint}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={safe(repr(seed))} is not an integer of at least 0")
        self.model = model
        self.density = density
        self.used: UpdateMask | None = None
        self._layers = choose_layers(model, density, include, exclude)
        self._seed = seed
        self._keeps_scores = keep_scores
        self._masks: dict[str, UpdateMask] = {}
        self._exclusive: dict[str, UpdateMask] = {}
        self._scores: dict[str, dict[str, torch.Tensor]] = {}
        self._block = ""
        if signed:
            sign_constant_(self._layers, density, seed)

    @property
    def exclusive(self) -> Mapping[str, UpdateMask]:
        """By task, the entries that no earlier mask holds; a later one may hold them too."""
        return MappingProxyType(self._exclusive)

    def __getitem__(self, task: str) -> UpdateMask:
        """The mask of a task; `SelectionError` when none of that name was learnt."""
        if task not in self._masks:
            known = f"; learnt: {', '.join(map(safe, list(self)[-3:]))}" if self else ""
            hint = nearest(task, self._masks) if isinstance(task, str) else ""
            raise SelectionError(f"no task {safe(repr(task))} was learnt{hint or known}")
        return self._masks[task]

    def __contains__(self, task: object) -> bool:
        """Whether a task of that name was learnt."""
        return task in self._masks

    def __iter__(self) -> Iterator[str]:
        """The tasks in the order in which they were learnt."""
        return iter(self._masks)

    def __len__(self) -> int:
        """How many tasks were learnt."""
        return len(self._masks)

    @contextmanager
    def learn_mask(
        self, task: str, *, start: str | Sequence[str] | None = None
    ) -> Iterator[list[torch.nn.Parameter]]:
        """Let scores be trained; when the block ends, the best of them are the mask of `task`.

        In the block the model computes with the weights of the largest |score| alone, chosen anew
        in each forward pass, and nothing but the scores requires gradients: straight through, with
        the gradient of the mask taken for that of |score|. Where the block raises, nothing was
        learnt. Untrained scores give a random mask.

        Args:
            task: its name, not that of another one.
            start: a task, or several, of whose scores (their mean) copies are trained; None draws
                new ones. `nearest` finds one that fits.

        Yields:
            The scores, float32, one parameter a weight: what the optimiser is made of.

        Raises:
            ValueError: there is such a task already, or the name is empty.
            SelectionError: there is no task `start`, or its scores were not kept.
            SubnetError: in another block, at the end with scores that are NaN or Inf, or when
                something else of the model changed.
        """
        if not isinstance(task, str):
            raise TypeError(f"task={safe(repr(task))} is not the name of a task")
        if not task or task in self._masks:
            why = "was learnt before; a mask is learnt once" if task else "is no name"
            raise ValueError(f"task={safe(repr(task))} {why}")
        scores = self._start(start)
        best = {
            each.name: BestScores(scores[each.name].to(each.weight.device), each.kept)
            for each in self._layers
        }
        with (
            self._alone(f"learn_mask({safe(repr(task))})"),
            guarded(self.model, {}),
            training_only(self.model, ()),
            computed(self._layers, best),
        ):
            yield [each.scores for each in best.values()]
            learnt = {name: each.scores.detach().float().cpu() for name, each in best.items()}
            finite_scores(learnt, task)
        self._add(task, learnt)

    @contextmanager
    def learn_weights(
        self, task: str, optimizer: torch.optim.Optimizer
    ) -> Iterator[InsideTraining]:
        """Let `optimizer` train the entries of the mask of `task` that no earlier mask holds.

        In the block the model computes with all of the mask; only its exclusive entries change,
        whatever weight decay and momentum would do, so that every earlier task computes the same as
        before to the bit. Where the block raises, the weights are as they were before it.

        Args:
            task: the one that was learnt last: a later mask may use its entries.
            optimizer: of all of the model's parameters, or of the weights covered.

        Yields:
            What `train_inside` gives: `.entries` and `.steps`.

        Raises:
            SelectionError: there is no such task, a later one was learnt, earlier masks hold all
                of its entries (ask `masks.exclusive[task]` first), or the optimiser does not own
                a weight.
            SubnetError: in another block, or when something else of the model changed.
        """
        mask = self[task]
        latest = list(self)[-1]
        if task != latest:
            raise SelectionError(
                f"the weights of {safe(repr(task))} are used by {safe(repr(latest))}, which was "
                "learnt later and would change; learn the weights of a task before the next mask"
            )
        exclusive = self._exclusive[task]
        if not exclusive:
            raise SelectionError(
                f"earlier masks hold all {plural(mask.count, 'entry')} of {safe(repr(task))}: "
                "nothing is left to train. Go on with its mask alone, or with a smaller density"
            )
        # An empty tensor of a mask has nothing to train, and need not be owned by the optimiser.
        inside = {each.name: Inside(_on(each.weight, mask[each.name])) for each in self._layers}
        free = {
            each.name: _on(each.weight, exclusive[each.name])
            for each in self._layers
            if exclusive.info(each.name).entries
        }
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        with (
            self._alone(f"learn_weights({safe(repr(task))})"),
            guarded(self.model, free),
            training_only(self.model, free),
            computed(self._layers, inside),
            train_inside(parameters, optimizer, exclusive) as training,
        ):
            yield training

    @contextmanager
    def apply(self, task: str) -> Iterator[torch.nn.Module]:
        """Let the model compute with the mask of `task` in the block; weights are left alone.

        Args:
            task: one that was learnt.

        Yields:
            The model; its `state_dict` is that of the subnetwork as long as the block lasts.

        Raises:
            SelectionError: there is no such task.
            SubnetError: in another block.
        """
        mask = self[task]
        weights = {
            each.name: torch.where(_on(each.weight, mask[each.name]), each.weight.detach(), 0)
            for each in self._layers
        }
        with self._alone(f"apply({safe(repr(task))})"), swapped(self._layers, weights):
            yield self.model

    def choose(self, inputs: object) -> Choice:
        """Guess which task `inputs` belong to, in one forward and backward pass.

        All masks are laid on the weights at once, each with weight α_t = 1/T; the task whose α_t,
        if it grew, would lower the entropy H of the outputs most is chosen: argmin_t ∂H/∂α_t. The
        model is in evaluation mode meanwhile.

        Args:
            inputs: what the model takes: a tensor, or a mapping of its keyword arguments. All of
                one task: `H` is the mean over the batch.

        Returns:
            `.task` and `.slopes`, ∂H/∂α_t by task.

        Raises:
            SelectionError: no task was learnt.
            ValueError: the outputs are not `[…, classes]` with two classes or more.
            SubnetError: in another block, or the outputs hold NaN or Inf.

        Source: arXiv 2006.14769, section 3.3 (one-shot).
        """
        from pytest_subnet.training.supermasks_choice import choose

        self._check_any("choose")
        with self._alone("choose"):
            return choose(self.model, self._layers, self._masks, inputs)

    def nearest(
        self, inputs: torch.Tensor, labels: torch.Tensor, *, neighbours: int = 100
    ) -> Nearest:
        """Find the task whose subnetwork tells new data apart best, to start a new mask from.

        Under each mask the outputs for the first 66 % of the examples classify those of the rest by
        a vote of the nearest ones. Nothing is trained and nothing changes: the paper's code
        averages scores into those of an old task, whose mask moves with them.

        Args:
            inputs: `[examples, …]` of the new task, in random order.
            labels: int `[examples]`, of two classes or more.
            neighbours: how many vote.

        Returns:
            `.task`, None where no task does better than one class in `.classes`, and
            `.accuracies` by task. `learn_mask(name, start=masks.nearest(x, y).task)`.

        Raises:
            SelectionError: no task was learnt.
            ValueError: fewer than two classes, labels of another number, or fewer examples to
                learn from than `neighbours`.
            SubnetError: in another block, or the outputs hold NaN or Inf.

        Source: arXiv 2210.10209, section 3.3 (KKT).
        """
        from pytest_subnet.training.supermasks_nearest import nearest_task

        self._check_any("nearest")
        return nearest_task(self, inputs, labels, neighbours)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write masks and scores to `directory`; the model's weights are the caller's to save.

        Args:
            directory: made where it is not there. A mask is one safetensors file a task, which
                `UpdateMask.load` reads.

        Raises:
            CheckpointError: it cannot be written.
            SubnetError: in a block.
        """
        from pytest_subnet.training.supermasks_files import save

        with self._alone("save"):
            save(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: torch.nn.Module) -> Supermasks:
        """The masks that `save` wrote, on a model with the weights they were saved with.

        Raises:
            CheckpointError: there are none, they are damaged, or `model` has other weights.
        """
        from pytest_subnet.training.supermasks_files import load

        return load(cls, directory, model)

    def _start(self, start: str | Sequence[str] | None) -> dict[str, torch.Tensor]:
        """Scores to train, which belong to nobody else."""
        if start is None:
            number = len(self) + 1
            return {each.name: draw_scores(each, self._seed, number) for each in self._layers}
        tasks = [start] if isinstance(start, str) else list(start)
        if not tasks:
            raise ValueError("start=[] names no task; None draws new scores")
        for task in tasks:
            if self[task] is not None and task not in self._scores:
                raise SelectionError(
                    f"the scores of {safe(repr(task))} were not kept; build Supermasks with "
                    "keep_scores=True"
                )
        return {
            each.name: torch.stack([self._scores[task][each.name] for task in tasks]).mean(0)
            for each in self._layers
        }

    def _add(self, task: str, scores: dict[str, torch.Tensor]) -> None:
        entries = {
            each.name: top_k(scores[each.name].abs(), each.kept).numpy() for each in self._layers
        }
        self._add_mask(task, UpdateMask.of(entries, what=f"task {task}"))
        if self._keeps_scores:
            self._scores[task] = {name: each.clone() for name, each in scores.items()}

    def _add_mask(self, task: str, mask: UpdateMask) -> None:
        self._masks[task] = mask
        self._exclusive[task] = mask if self.used is None else mask - self.used
        self.used = mask if self.used is None else self.used | mask

    def _check_any(self, what: str) -> None:
        if not self:
            raise SelectionError(f"{what}: no task was learnt yet; learn one with learn_mask")

    @contextmanager
    def _alone(self, block: str) -> Iterator[None]:
        """Refuse what would see the weights of a block that is open."""
        if self._block:
            raise SubnetError(f"{block} inside {self._block}; end that block first")
        self._block = block
        try:
            yield
        finally:
            self._block = ""

    def __repr__(self) -> str:
        """One line: how many tasks, how much is used."""
        numel = sum(each.weight.numel() for each in self._layers) if not self._block else 0
        entries = f"{self.used.count:,} of {self.used.numel:,}" if self.used else f"0 of {numel:,}"
        return (
            f"<Supermasks {plural(len(self), 'task')} at density {self.density:g}: {entries} "
            "entries used>"
        )


def _on(weight: torch.Tensor, entries: object) -> torch.Tensor:
    return torch.as_tensor(entries).to(weight.device)
