"""Of which checkpoints a result is: their content, not their names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.masks.update_mask import Origin
    from pytest_subnet.pairs import ModelPair


class Fingerprints(Mapping[str, str]):
    """Fingerprints by what each checkpoint is in the result; taken when they are asked for.

    To take one reads the whole checkpoint.

    >>> prints = of_pair(pair)
    >>> list(prints), prints["base"] == pair.base.fingerprint()
    (['base', 'tuned'], True)
    """

    __slots__ = ("_take", "_taken")

    def __init__(self, take: Mapping[str, Callable[[], str]]) -> None:
        """Ask `take` for each, once."""
        self._take = dict(take)
        self._taken: dict[str, str] = {}

    def __getitem__(self, role: str) -> str:
        """32 hexadecimal digits; empty where nobody knows.

        Raises:
            CheckpointError: the checkpoint has changed since, or cannot be read.
        """
        if role not in self._taken:
            self._taken[role] = self._take[role]()
        return self._taken[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._take)

    def __len__(self) -> int:
        return len(self._take)


def of_pair(pair: ModelPair) -> Fingerprints:
    """Of both sides of a pair."""
    return of_sides({"base": (pair, pair.base), "tuned": (pair, pair.tuned)})


def of_sides(sides: Mapping[str, tuple[ModelPair, Checkpoint]]) -> Fingerprints:
    """Of some sides of some pairs, which must be as they were when they were opened."""
    return Fingerprints({role: partial(_of_side, *side) for role, side in sides.items()})


def of_masks(a: Origin, b: Origin) -> Fingerprints:
    """Of the bases and the tuned checkpoints of two masks, as far as the masks know."""
    return Fingerprints(
        {
            f"{side}_{letter}": partial(getattr, origin, side)
            for side in ("base", "tuned")
            for letter, origin in (("a", a), ("b", b))
        }
    )


def _of_side(pair: ModelPair, checkpoint: Checkpoint) -> str:
    pair.check_unchanged()
    return checkpoint.fingerprint()
