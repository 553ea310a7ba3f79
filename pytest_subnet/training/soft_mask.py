"""A mask that can be trained: a number per entry, whose sigmoid multiplies the weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

from pytest_subnet.errors import SelectionError
from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.pairs.selection import as_list, matching
from pytest_subnet.text import nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from pytest_subnet.pairs.selection import Patterns

_NEVER = frozenset({"embed", "position", "head", "norm", "bias", "buffer"})
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_OUT = -1e6
"""Where a weight is 0 to begin with: it has no gradient, and would stay undecided for ever."""


class Counts(NamedTuple):
    """How far a soft mask has come.

    Attributes:
        kept: entries whose sigmoid is above 0.9.
        undecided: those between 0.1 and 0.9, both included.
    """

    kept: int
    undecided: int


class SoftMask:
    """Numbers `m`, one an entry of the chosen weights: W becomes W * sigmoid(temperature * m).

    The model is never written to: masked weights stand in for its own during a call, and so do
    copies of its buffers.

    Attributes:
        names: of the weights.
        numbers: float32, of the shape of each weight and where it is; 0 to begin with, and far
            below where the weight is 0.
        numel: how many there are.
    """

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        """Nothing decided yet about the parameters `names` of `model`."""
        import torch

        self.names = names
        self._model = model
        parameters = dict(model.named_parameters())
        self._all = {name: each.detach() for name, each in parameters.items()}
        self._weights = [self._all[name] for name in names]
        self.numbers: list[torch.Tensor] = []
        for weight in self._weights:
            start = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            self.numbers.append(start.masked_fill_(weight == 0, _OUT).requires_grad_())
        self.numel = sum(each.numel() for each in self.numbers)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weights."""
        return [tuple(each.shape) for each in self._weights]

    @property
    def dtypes(self) -> list[str]:
        """Of the weights, as torch names them."""
        return [str(each.dtype).removeprefix("torch.") for each in self._weights]

    def gates(self, temperature: float) -> list[torch.Tensor]:
        """The sigmoids, with their gradient towards the numbers."""
        import torch

        return [torch.sigmoid(temperature * each) for each in self.numbers]

    def counts(self, temperature: float) -> Counts:
        """How many entries are kept, and how many undecided."""
        limit = math.log(9) / temperature  # there the sigmoid is 0.9, and at minus that 0.1
        kept = sum(int((each.detach() > limit).sum()) for each in self.numbers)
        left_out = sum(int((each.detach() < -limit).sum()) for each in self.numbers)
        return Counts(kept, self.numel - kept - left_out)

    def bits(self) -> list[torch.Tensor]:
        """Which entries are in the mask: those whose number is above 0; bool, on the CPU."""
        return [(each.detach() > 0).cpu() for each in self.numbers]

    def call(
        self, function: Callable[..., object], gates: list[torch.Tensor], *arguments: object
    ) -> object:
        """What `function(model, *arguments)` gives while each weight is multiplied by its gate."""
        import torch

        masked = {
            name: weight * gate.to(weight.device, weight.dtype)
            for name, weight, gate in zip(self.names, self._weights, gates, strict=True)
        }
        buffers = {name: each.clone() for name, each in self._model.named_buffers()}
        stand_ins = {f"model.{name}": each for name, each in (self._all | masked | buffers).items()}
        with_function = _with_function(self._model, function)
        return cast("object", torch.func.functional_call(with_function, stand_ins, arguments))


def maskable(
    model: torch.nn.Module,
    *,
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
) -> tuple[str, ...]:
    """The weights of `model` that a mask is trained for: matrices of attention and MLPs.

    Raises:
        SelectionError: a pattern matches nothing, nothing is left, or a weight is not whole here.
        TypeError: a pattern is no string.
    """
    kind = {
        name: kind_of(name, is_parameter=True)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and _dtype(parameter) in _DTYPES
    }
    tables = _tables(model)
    names = [
        name
        for name, parameter in model.named_parameters()
        if kind.get(name, "bias") not in _NEVER and id(parameter) not in tables
    ]
    if not names:
        raise SelectionError(
            f"{safe(type(model).__name__)} has no weight to mask: of its "
            f"{plural(len(list(model.parameters())), 'parameter')} none is a matrix in "
            f"{', '.join(_DTYPES)} that is no embedding, head or norm"
        )
    included = matching("include", include, names)
    excluded = matching("exclude", exclude, names)
    wanted = None if kinds is None else set(as_list("kinds", kinds))
    present = {kind[name] for name in names}
    for each in wanted or ():
        if each not in present:
            known = ", ".join(safe(one) for one in sorted(present))
            raise SelectionError(
                f"kinds={safe(each)!r} is no kind of weight that is masked here; there are "
                f"{known}{nearest(each, present)}"
            )
    chosen = tuple(
        name
        for name in names
        if (included is None or name in included)
        and (excluded is None or name not in excluded)
        and (wanted is None or kind[name] in wanted)
    )
    if not chosen:
        raise SelectionError(
            f"nothing is left to mask: include={include!r}, exclude={exclude!r} and "
            f"kinds={kinds!r} leave none of {plural(len(names), 'weight')}"
        )
    _check_whole(model, chosen)
    return chosen


def _tables(model: torch.nn.Module) -> set[int]:
    """The `id` of every weight that embeds tokens or scores them, whatever it is called."""
    import torch

    found = {
        id(each.weight)
        for each in model.modules()
        if isinstance(each, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    head: object = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return found if weight is None else found | {id(weight)}


def _check_whole(model: torch.nn.Module, names: tuple[str, ...]) -> None:
    parameters: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    for name in names:
        if hasattr(parameters[name], "to_local"):
            raise SelectionError(
                f"{safe(name)} is sharded over several processes; find a subnetwork without FSDP "
                "or tensor parallelism"
            )
        if parameters[name].is_meta:
            raise SelectionError(f"{safe(name)} is on the meta device and has no entries; load it")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _with_function(model: torch.nn.Module, function: Callable[..., object]) -> torch.nn.Module:
    """A module whose forward calls `function` with `model`, so that its weights can be stood in."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arguments: object) -> object:
            return function(self.model, *arguments)

    return Called()
