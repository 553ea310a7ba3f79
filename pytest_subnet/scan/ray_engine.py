"""Who does the work: tasks on the nodes of a Ray cluster."""

from __future__ import annotations

import functools
import logging
import pickle
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_subnet.errors import SubnetError
from pytest_subnet.scan.engines import ThreadEngine
from pytest_subnet.scan.ray_cluster import Node, connect, nodes_of, one_line, survey

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pytest_subnet.scan.contracts import Work

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")

_log = logging.getLogger("pytest_subnet")

_TOGETHER = 8
"""Units a task, at most: what Ray does for a task is little beside reading so much."""

_PER_SLOT = 2
"""Tasks under way for each that can run: one works, one is there when it is done."""

_RETRIES = 3
"""How often what a dead worker or node had is given to another."""

_RETRY_SECONDS = 2.0
"""Before each retry, longer every time: Ray takes a while to see that a node is gone."""

_LOOK_SECONDS = 5.0
"""How long to wait for a result before looking whether there are still nodes."""

_STUCK_SECONDS = 60.0

_GPU_THREADS = 4
"""That read for one GPU: while one piece travels there, others are read."""


@dataclass(frozen=True)
class _Batch:
    """Some units that go together, pickled.

    Attributes:
        positions: theirs.
        units: what is sent.
        nodes: by id, those that see their files; None where all do.
        lost: how often a worker or a node died with it.
        not_before: when to try again, by the monotonic clock.
    """

    positions: range
    units: bytes
    nodes: frozenset[str] | None
    lost: int = 0
    not_before: float = 0.0


class RayEngine:
    """Tasks where the files are; what a dead worker or node had is done again by another.

    At most two tasks a CPU (or GPU) are under way, and each result is handed over as it comes.
    """

    def __init__(
        self, paths_of: Callable[[Any], set[str]], *, gpus: bool = False, together: int = _TOGETHER
    ) -> None:
        """Connect to nothing yet.

        Args:
            paths_of: the files that a unit needs.
            gpus: give each task a GPU; else a CPU.
            together: how many units a task takes at most.
        """
        self._paths_of = paths_of
        self._gpus = gpus
        self._together = together

    def map(
        self, work: Work[UnitT, ResultT], units: Sequence[UnitT]
    ) -> Generator[tuple[int, ResultT]]:
        """As `Engine.map`.

        Raises:
            SubnetError: no cluster, none of its nodes can work, or workers die again and again.
            CheckpointError: a file is on no node; and whatever the work itself raises.
        """
        if not units:
            return
        ray = connect()
        nodes = nodes_of(ray, gpus=self._gpus)
        batches = self._batches(ray, nodes, units)
        yield from _Run(ray, work, batches, gpus=self._gpus).results(nodes)

    def _batches(self, ray: Any, nodes: Sequence[Node], units: Sequence[UnitT]) -> list[_Batch]:
        """The units in order, in batches that can be read in one place."""
        files = [frozenset(self._paths_of(unit)) for unit in units]
        seen = survey(ray, nodes, sorted(frozenset().union(*files)))
        places = {each: seen.nodes_with(each) for each in dict.fromkeys(files)}
        everywhere = frozenset(node.id for node in nodes)
        # A few turns for everyone, so that all are done at about the same time.
        turns = 2 * _PER_SLOT * sum(node.slots for node in nodes)
        size = max(1, min(self._together, len(units) // turns))
        batches = []
        for where, group in groupby(range(len(units)), lambda position: places[files[position]]):
            together = list(group)
            for start in range(together[0], together[-1] + 1, size):
                positions = range(start, min(start + size, together[-1] + 1))
                packed = pickle.dumps([units[position] for position in positions], 5)
                batches.append(_Batch(positions, packed, None if where >= everywhere else where))
        return batches


class _Run:
    """One map: what waits, and what is under way."""

    def __init__(self, ray: Any, work: object, batches: Sequence[_Batch], *, gpus: bool) -> None:
        self._ray = ray
        self._gpus = gpus
        self._waiting = list(reversed(batches))
        self._running: dict[Any, tuple[_Batch, str | None]] = {}
        self._task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(_compute)
        self._work = ray.put(pickle.dumps(work, 5))

    def results(self, nodes: Sequence[Node]) -> Generator[tuple[int, Any]]:
        """Every result, as it comes."""
        from ray.exceptions import RayError

        quiet_since = time.monotonic()
        try:
            while self._waiting or self._running:
                self._submit(nodes)
                ref = self._next_done()
                if ref is not None:
                    batch, _ = self._running.pop(ref)
                    try:
                        answer = pickle.loads(self._ray.get(ref))
                    except RayError as error:
                        self._again(batch, error)
                    else:
                        if isinstance(answer, BaseException):
                            raise answer
                        yield from answer
                        quiet_since = time.monotonic()
                        continue
                nodes = nodes_of(self._ray, gpus=self._gpus)
                self._check_within_reach(nodes)
                quiet_since = self._say_when_stuck(quiet_since)
        finally:
            self._cancel()

    def _submit(self, nodes: Sequence[Node]) -> None:
        """Start what may be under way; what is to wait stays."""
        room = _PER_SLOT * sum(node.slots for node in nodes) - len(self._running)
        later = []
        while self._waiting and room > 0:
            batch = self._waiting.pop()
            node = self._place(batch, nodes)
            if batch.not_before > time.monotonic() or node == "":
                later.append(batch)
                continue
            strategy: Any = "SPREAD"
            if node is not None:
                from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            ref = self._task.options(scheduling_strategy=strategy).remote(
                self._work, batch.units, batch.positions.start, self._gpus
            )
            self._running[ref] = batch, node
            room -= 1
        self._waiting += reversed(later)

    def _place(self, batch: _Batch, nodes: Sequence[Node]) -> str | None:
        """The node for a batch: None where any will do, empty where all that could are busy."""
        if batch.nodes is None:
            return None
        under_way = Counter(node for _, node in self._running.values())
        free = [
            (under_way[node.id] / node.slots, node.id)
            for node in nodes
            if node.id in batch.nodes and under_way[node.id] < _PER_SLOT * node.slots
        ]
        return min(free)[1] if free else ""

    def _next_done(self) -> Any:
        """A task that is done; None where there is none for a while."""
        if not self._running:  # something is to be tried again later
            time.sleep(self._patience())
            return None
        done, _ = self._ray.wait(list(self._running), timeout=self._patience())
        return done[0] if done else None

    def _patience(self) -> float:
        """How long to wait for a result: not longer than until something is to be tried again."""
        now = time.monotonic()
        due = [batch.not_before - now for batch in self._waiting if batch.not_before > now]
        return min([_LOOK_SECONDS, *due])

    def _again(self, batch: _Batch, error: Exception) -> None:
        """Have a batch done again that a worker or a node took with it."""
        from ray.exceptions import RayTaskError

        where = (
            "look into the logs of its workers (ray logs), or "
            'take engine="threads" (--subnet-engine threads)'
        )
        if isinstance(error, RayTaskError):  # not the work: what it raises comes back as a result
            raise SubnetError(
                f"a worker of the Ray cluster cannot work: {one_line(error)}; {where}"
            ) from error
        lost = batch.lost + 1
        if lost > _RETRIES:
            raise SubnetError(
                f"a worker of the Ray cluster died {lost} times over the same work: "
                f"{type(error).__name__}: {one_line(error)}; {where}"
            ) from error
        _log.info("a worker was lost (%s); its work is done again", type(error).__name__)
        delay = lost * _RETRY_SECONDS
        self._waiting.append(replace(batch, lost=lost, not_before=time.monotonic() + delay))

    def _check_within_reach(self, nodes: Sequence[Node]) -> None:
        """Raise if files that are to be read are on no node that is left."""
        alive = {node.id for node in nodes}
        for batch in self._waiting:
            if batch.nodes is not None and not batch.nodes & alive:
                raise SubnetError(
                    "every node of the Ray cluster that had some of the files is gone; put both "
                    "checkpoints on a file system that the nodes share, or take "
                    'engine="threads" (--subnet-engine threads)'
                )

    def _say_when_stuck(self, quiet_since: float) -> float:
        if time.monotonic() - quiet_since < _STUCK_SECONDS:
            return quiet_since
        _log.warning(
            "no result from the Ray cluster for %.0f seconds: are its %ss taken by others?",
            _STUCK_SECONDS,
            "GPU" if self._gpus else "CPU",
        )
        return time.monotonic()

    def _cancel(self) -> None:
        """Stop what is still under way, and wait a little until nobody reads any more."""
        for ref in self._running:
            self._ray.cancel(ref)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=5)


def _compute(work: bytes, units: bytes, first: int, gpus: bool) -> bytes:
    """In a worker: the results by position, or the error to raise; pickled.

    As bytes a result does not pin the store it came through, and an error stays what it is.
    """
    try:
        engine = ThreadEngine(_GPU_THREADS if gpus else 1)
        answer: object = [
            (first + position, result)
            for position, result in engine.map(_work_from(work), pickle.loads(units))
        ]
    except Exception as error:
        error.add_note(f"on the Ray node {connect().util.get_node_ip_address()}")
        answer = error
    return pickle.dumps(answer, 5)


@functools.lru_cache(maxsize=1)
def _work_from(packed: bytes) -> Any:
    return pickle.loads(packed)
