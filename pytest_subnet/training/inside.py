"""Train only the entries of a mask (arXiv 2505.11711, section 4)."""

from __future__ import annotations

import functools
import types
import warnings
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.errors import SubnetError
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.text import first_few, plural, safe, size
from pytest_subnet.training.parts import Part, Parts, check_model, divide, inside_of, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    import torch


class InsideTraining:
    """Training inside a mask, while it lasts; what `train_inside` gives.

    Attributes:
        entries: how many entries the optimiser can move.
        steps: how many steps it has taken inside the block, without those that raised.
        mask_bytes: what the mask takes on the parameters' devices: one bit an entry of every
            parameter that lies in it in part.
        kept_bytes: the most that a step kept of entries outside, from before it until after it.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        parts: Parts,
        *,
        gradients_only: bool,
    ) -> None:
        """Not attached to an optimiser yet."""
        self.entries = parts.entries
        self.steps = 0
        self.mask_bytes = parts.mask_bytes
        self.kept_bytes = 0
        self._model = model
        self._divided = parts
        self._gradients_only = gradients_only
        self._depth = 0
        self._kept: dict[int, _Kept] = {}
        self._gradients: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook: mask the gradients, now and whenever a closure has computed them again."""
        # A step of a subclass that calls its parent's runs the hooks twice, one inside the other.
        self._depth += 1
        self._check_owned(optimizer)
        has_closure = any(callable(each) for each in (*args[1:], *kwargs.values()))
        if not self._gradients_only:
            self._keep(optimizer, everything=has_closure or not _is_of_torch(optimizer))
        self._mask_gradients(optimizer)
        if not has_closure:
            return None

        def masked(value: object) -> object:
            return self._masked_after(value, optimizer) if callable(value) else value

        return (args[0], *map(masked, args[1:])), {
            key: masked(value) for key, value in kwargs.items()
        }

    def after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Hook: put back what the step moved outside."""
        self._depth -= 1
        self._put_back()
        if self._depth == 0:
            self.steps += 1
            self._let_go()

    def abandon_step(self) -> None:
        """Put back what a step moved that did not end; nothing of it is held any longer."""
        self._put_back()
        self._let_go()
        self._depth = 0

    def _check_owned(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters are known by identity: one put in the place of another has no mask."""
        owned = {id(each) for group in optimizer.param_groups for each in group["params"]}
        trained, known = self._divided.trained, self._divided.known
        lost = [name for key, name in trained.items() if key not in owned]
        mend = "end the block before parameters are replaced, and enter a new one after"
        if lost:
            raise SubnetError(
                f"the optimiser no longer owns {plural(len(lost), 'parameter')} that the mask "
                f"covers: {first_few(lost)}; {mend}"
            )
        if owned <= known.keys():
            return
        new = [
            name
            for name, each in parameters_of(self._model)
            if id(each) in owned and id(each) not in known
        ]
        if new:
            raise SubnetError(
                f"the model has {plural(len(new), 'parameter')} now that it had not when the block "
                f"was entered, and the optimiser owns: {first_few(new)}; {mend}"
            )

    def _masked_after(
        self, closure: Callable[[], object], optimizer: torch.optim.Optimizer
    ) -> Callable[[], object]:
        def masked() -> object:
            loss = closure()
            self._mask_gradients(optimizer)
            return loss

        return masked

    def _mask_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, part in self._parts(optimizer):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != _strided():
                raise SubnetError(
                    f"the gradient of {safe(part.name)} is sparse and cannot be masked; build the "
                    "embedding with sparse=False"
                )
            if part.packed is not None:
                gradient.detach().masked_fill_(~inside_of(part, parameter), 0)
                continue
            gradient.detach().zero_()
            if not self._gradients_only:
                # Without a gradient optimisers pass a parameter over, decay and momentum included:
                # nothing of it has to be kept.
                self._gradients[id(parameter)] = parameter, gradient
                parameter.grad = None

    def _keep(self, optimizer: torch.optim.Optimizer, *, everything: bool) -> None:
        for parameter, part in self._parts(optimizer):
            if id(parameter) in self._kept:
                continue
            values = parameter.detach()
            if part.packed is not None and (everything or parameter.grad is not None):
                kept = values.masked_select(~inside_of(part, parameter))
                self._kept[id(parameter)] = _Kept(parameter, part, kept)
            elif part.packed is None and everything:  # LBFGS adds 0, which makes 0.0 of -0.0
                self._kept[id(parameter)] = _Kept(parameter, part, values.clone())
        held = sum(each.values.nbytes for each in self._kept.values())
        self.kept_bytes = max(self.kept_bytes, held)

    def _put_back(self) -> None:
        for parameter, part, kept in self._kept.values():
            if part.packed is None:
                parameter.detach().copy_(kept)
            else:
                parameter.detach().masked_scatter_(~inside_of(part, parameter), kept)

    def _let_go(self) -> None:
        self._kept.clear()
        for parameter, gradient in self._gradients.values():
            if parameter.grad is None:
                parameter.grad = gradient
        self._gradients.clear()

    def _parts(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, Part]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                part = self._divided.outside.get(id(parameter))
                if part is not None:
                    yield parameter, part

    def __repr__(self) -> str:
        """One line: how much is trained, how often, what it costs."""
        costs = f"mask {size(self.mask_bytes)}, kept {size(self.kept_bytes)} in a step"
        return (
            f"<InsideTraining {plural(self.entries, 'entry')}, {plural(self.steps, 'step')}, "
            f"{costs}>"
        )


class _Kept(NamedTuple):
    """The entries of a parameter outside the mask, as they were before a step."""

    parameter: torch.Tensor
    part: Part
    values: torch.Tensor


_USE = "use `with train_inside(model, optimizer, mask) as inside:` around the training steps"


class InsideBlock(AbstractContextManager[InsideTraining]):
    """What `train_inside` gives: the block to enter; before and after it, nothing is masked."""

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        mask: UpdateMask,
        *,
        gradients_only: bool,
    ) -> None:
        """Not attached to the optimiser before the block is entered."""
        self._arguments = model, optimizer, mask, gradients_only
        self._blocks: list[AbstractContextManager[InsideTraining]] = []
        self._was_entered = False

    def __enter__(self) -> InsideTraining:
        """Mask the steps from here on."""
        self._was_entered = True
        block = _masked(*self._arguments)
        inside = block.__enter__()
        self._blocks.append(block)
        return inside

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Leave the optimiser as it was."""
        return self._blocks.pop().__exit__(kind, error, traceback)

    def __getattr__(self, name: str) -> object:
        """Only reached for what the training inside has and this has not."""
        if name.startswith("_"):
            raise AttributeError(name)
        state = "" if self._was_entered else "nothing was masked, since no block was entered: "
        raise SubnetError(f"{state}{_USE}, and read `inside`")

    def __del__(self) -> None:
        """Say so where `with` was forgotten: the steps that followed trained everything."""
        if not self.__dict__.get("_was_entered", True):
            warnings.warn(
                f"train_inside was called and no block entered, so that nothing was masked; {_USE}",
                RuntimeWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        """One line: whether steps are masked now."""
        if self._blocks:
            return "<train_inside, in its block>"
        state = "its block has ended" if self._was_entered else "not entered"
        return f"<train_inside, {state}: no step is masked>"


def train_inside(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    mask: UpdateMask,
    *,
    gradients_only: bool = False,
) -> InsideBlock:
    """Train only the entries of `model` that are in `mask`, as long as the block lasts.

    Gradients outside the mask become zero right before every step of `optimizer`: after
    accumulation, unscaling and clipping (a norm clipped is that of the whole gradient). Entries
    outside are then the same to the bit after the step as before it; weight decay and momentum
    would move them. Parameters of the model that the mask does not name are outside whole; what
    the optimiser owns besides the model is left alone. After a step that raised, entries outside
    are put back at once. When the block ends, also by an exception, the optimiser is as it was.

    Valid usages:
        with train_inside(model, optimizer, mask): ...                      # kept to the bit
        with train_inside(model, optimizer, mask, gradients_only=True): ... # the paper's letter
        with train_inside(masters, optimizer, mask): ...                    # float32 masters

    Args:
        model: the module, wrapped (`torch.compile`, data parallelism, adapters) or not; or, where
            the optimiser owns float32 copies of the weights, these by the weights' names.
        optimizer: any `torch.optim.Optimizer`, fused, foreach and with closures included;
            `accelerate`'s is looked through.
        mask: over tensors of the model, which may be under the names that files give them.
        gradients_only: only mask gradients; what weight decay or momentum from before the block
            do to entries outside is let through.

    Returns:
        A context manager that gives an `InsideTraining`: `.entries`, `.steps`, `.mask_bytes` (one
        bit an entry) and `.kept_bytes` (what a step keeps of entries outside, in their dtype). It
        masks nothing before it is entered; never entered, it warns (`RuntimeWarning`).

    Raises:
        TypeError: an argument is something else.
        SelectionError: when the block is entered: the mask is empty or covers nothing that can be
            trained, the optimiser does not own a parameter that it covers, or parameters are
            sharded.
        PairMismatchError: likewise: the mask names tensors that the model does not have, or has in
            other shapes, or holds two sets of entries of tied tensors.
        SubnetError: in a step: a gradient is sparse, or a parameter was replaced in the block.

    Source: arXiv 2505.11711, section 4 (there gradients only).

    >>> mask = UpdateMask.of({"weight": [[True] * 4, *[[False] * 4] * 3]})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> with record_update(model) as update, train_inside(model, optimizer, mask) as inside:
    ...     model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> inside
    <InsideTraining 4 entries, 1 step, mask 8 B, kept 48 B in a step>
    >>> update_sparsity(update)
    UpdateSparsity(sparsity=0.8, updated=4 of 20, same bits, f32)
    """
    check_model(model)
    _with_hooks(optimizer)
    if not isinstance(mask, UpdateMask):
        raise TypeError(
            f"mask is {type(mask).__name__}, not an UpdateMask; make one with update_mask(pair), "
            "UpdateMask.of({name: booleans}) or UpdateMask.load(path)"
        )
    return InsideBlock(model, optimizer, mask, gradients_only=gradients_only)


@contextmanager
def _masked(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    mask: UpdateMask,
    gradients_only: bool,
) -> Iterator[InsideTraining]:
    inner = _with_hooks(optimizer)
    owned = {id(each) for group in inner.param_groups for each in group["params"]}
    inside = InsideTraining(model, divide(model, owned, mask), gradients_only=gradients_only)
    hooks = [
        inner.register_step_pre_hook(inside.before_step),
        inner.register_step_post_hook(inside.after_step),
    ]
    try:
        with _guarded_steps(inner, inside):
            yield inside
    finally:
        for hook in hooks:
            hook.remove()
        inside.abandon_step()


@contextmanager
def _guarded_steps(optimizer: torch.optim.Optimizer, inside: InsideTraining) -> Iterator[None]:
    """Tell `inside` of each step that raises, after which no hook is called."""
    its_own = vars(optimizer).get("step")  # of a scheduler, or another block
    step = optimizer.step
    in_block = True

    # A method like the one it replaces: schedulers take the function of it, scalers its signature.
    @functools.wraps(getattr(step, "__func__", step))
    def guarded(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except BaseException:
            if in_block:
                inside.abandon_step()
            raise

    method = types.MethodType(guarded, optimizer)
    vars(optimizer)["step"] = method
    try:
        yield
    finally:
        in_block = False
        # A scheduler that was made in the block has wrapped it, and goes on to call it.
        if vars(optimizer).get("step") is method:
            if its_own is None:
                del vars(optimizer)["step"]
            else:
                vars(optimizer)["step"] = its_own


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known to pass over a parameter that has no gradient."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _with_hooks(optimizer: object) -> torch.optim.Optimizer:
    """The optimiser that takes the steps: wrappers that only forward them have no hooks."""
    import torch

    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(
        inner, "_optimizer_step_pre_hooks"
    ):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, not a torch.optim.Optimizer, and has no "
            "hooks before and after a step"
        )
    return inner


def _strided() -> torch.layout:
    import torch

    return torch.strided
