"""The processes that train one model, and what they tell each other of it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable

ResultT = TypeVar("ResultT")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others at a place to which all of them must come."""


class _Word(NamedTuple):
    """What a process says where all of them meet; plain types.

    Attributes:
        place: where it is.
        error: what it failed with; empty where it did not.
        result: what it found out.
    """

    place: str
    error: str
    result: object


class Processes:
    """Those of torch's default process group; or this one alone, where there is none.

    They talk through a gloo group of their own, so that the weights may be on any device. Whoever
    asks must be asked in every process, in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        """Those of `group`; this process alone without one."""
        self._group = group

    @property
    def count(self) -> int:
        """How many they are."""
        if self._group is None:
            return 1
        import torch.distributed as dist

        return dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        """The number of this one."""
        if self._group is None:
            return 0
        import torch.distributed as dist

        return dist.get_rank(self._group)

    def gather(self, place: str, find_out: Callable[[], ResultT]) -> list[ResultT]:
        """What `find_out` gives in each process, by rank.

        An error in one of them is an error in all.

        Args:
            place: in words, where this is called; must be the same in all of them.
            find_out: gives plain types.

        Raises:
            SubnetError: another process failed here, is at another place, or did not come.
        """
        failure, result = None, None
        try:
            result = find_out()
        except Exception as error:  # whatever it is, the others must not wait for this process
            failure = error
        words = self._exchange(_Word(place, "" if failure is None else _spell(failure), result))
        if failure is not None:
            raise failure
        for rank, word in enumerate(words):
            if word.error:
                raise SubnetError(f"rank {rank} failed at {safe(place)}: {safe(word.error)}")
        places = {word.place: rank for rank, word in reversed(list(enumerate(words)))}
        if len(places) > 1:
            spelled = ", ".join(f"rank {rank} at {safe(at)}" for at, rank in sorted(places.items()))
            raise SubnetError(
                f"the processes do not measure the same: {spelled}; every rank must record and "
                "measure the same updates in the same order"
            )
        return [cast("ResultT", word.result) for word in words]

    def tell(self, place: str, error: BaseException) -> None:
        """Tell the others, who wait at `place`, that this process failed before it got there."""
        try:
            self._exchange(_Word(place, _spell(error), None))
        except SubnetError:
            return  # nobody listens; the caller is about to raise `error` itself

    def _exchange(self, word: _Word) -> list[_Word]:
        if self._group is None:
            return [word]
        import torch.distributed as dist

        words: list[Any] = [None] * self.count
        try:
            dist.monitored_barrier(self._group, PATIENCE, wait_all_ranks=True)
            dist.all_gather_object(words, tuple(word), self._group)
        except (RuntimeError, ValueError) as error:  # of gloo, and of a group that was destroyed
            raise _left_alone(word.place, error) from error
        return [_Word(*each) for each in words]


_joined: tuple[object, Processes] | None = None


def joined_processes() -> Processes:
    """Those of torch's default process group.

    The first call in a group makes a group of their own, in which every process must take part.
    """
    import torch.distributed as dist

    global _joined
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Processes()
    world = dist.group.WORLD
    if _joined is None or _joined[0] is not world:
        try:
            _joined = world, Processes(dist.new_group(backend="gloo", timeout=PATIENCE))
        except RuntimeError as error:
            raise _left_alone("their first record_update", error) from error
    return _joined[1]


def _left_alone(place: str, error: Exception) -> SubnetError:
    waited = plural(int(PATIENCE.total_seconds()), "second")
    first = str(error).strip().partition("\n")[0]
    return SubnetError(
        f"not every process came to {safe(place)} within {waited} (torch: {safe(first)}); every "
        "rank of the process group must record and measure the same updates in the same order"
    )


def _spell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().removesuffix(":")
