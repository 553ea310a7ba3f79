"""What the tests have workers of Ray do; these import it by this name."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Slow:
    """Other work, slowly, with an entry in a diary whenever a unit is begun."""

    work: Any
    diary: str
    seconds: float = 0.3

    @contextmanager
    def open(self) -> Iterator[Callable[[Any], Any]]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        with self.work.open() as compute:

            def slowly(unit: Any) -> Any:
                (Path(self.diary) / f"{node}-{uuid.uuid4().hex}").touch()
                time.sleep(self.seconds)
                return compute(unit)

            yield slowly


@dataclass(frozen=True)
class Deadly:
    """Doubles numbers; the worker that is given a seven dies, as often as there are lives."""

    lives: str

    @contextmanager
    def open(self) -> Iterator[Callable[[int], int]]:
        yield self._double

    def _double(self, number: int) -> int:
        if number == 7:
            for life in Path(self.lives).iterdir():
                life.unlink()
                os._exit(1)
        return 2 * number


@dataclass(frozen=True)
class Unpicklable:
    """Work that cannot arrive."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("no_such_module_on_the_worker",)
