"""Training inside a mask, for trainers that own their optimiser."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pytest_subnet.errors import SubnetError
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.text import plural
from pytest_subnet.training.inside import train_inside

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from pytest_subnet.training.inside import InsideTraining


class SubnetworkCallback(TrainerCallback):
    """Has a `transformers.Trainer`, or a trainer of TRL, train only the entries of a mask.

    What `train_inside` does, from the start of training to its end. Should training end by an
    exception, call `close()` before the optimiser is used for anything else; training again does.

    Args:
        mask: as in `train_inside`.
        gradients_only: as in `train_inside`.

    Attributes:
        inside: what `train_inside` gave when training last began; None before.

    Raises:
        SubnetError: from training: the trainer takes its steps past the optimiser that it shows
            (DeepSpeed and FSDP do), so that nothing would be masked; or as in `train_inside`.

    Source: arXiv 2505.11711, section 4.

    >>> mask = UpdateMask.of({"weight": [[True] * 4, *[[False] * 4] * 3]})
    >>> SubnetworkCallback(mask)
    SubnetworkCallback(<UpdateMask given: 4 of 16 entries of 1 tensor (density 0.25)>)
    """

    def __init__(self, mask: UpdateMask, *, gradients_only: bool = False) -> None:
        if not isinstance(mask, UpdateMask):
            raise TypeError(f"mask is {type(mask).__name__}, not an UpdateMask")
        self.inside: InsideTraining | None = None
        self._mask = mask
        self._gradients_only = gradients_only
        self._block = ExitStack()
        self._first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Enter the block."""
        self.close()
        self._first_step = state.global_step
        self.inside = self._block.enter_context(
            train_inside(
                kwargs["model"],
                kwargs["optimizer"],
                self._mask,
                gradients_only=self._gradients_only,
            )
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop a run that is not masked at its first step."""
        if not args.fp16:  # whose scaler leaves out steps, often the first ones
            self._check_masked(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the block."""
        self.close()
        self._check_masked(state)

    def close(self) -> None:
        """Give the optimiser back as it was; again does nothing."""
        self._block.close()

    def _check_masked(self, state: TrainerState) -> None:
        taken = state.global_step - self._first_step
        if taken and self.inside is not None and not self.inside.steps:
            self.close()
            raise SubnetError(
                f"the trainer took {plural(taken, 'step')}, none of them by the optimiser that it "
                "shows: its engine (DeepSpeed, FSDP) has one of its own, and nothing was masked; "
                "train without it"
            )

    def __repr__(self) -> str:
        return f"SubnetworkCallback({self._mask!r})"
