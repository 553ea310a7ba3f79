"""The work of a scan: read both sides of a unit and run the kernel over them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import bits_kernel
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.reading import Sides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.scan.contracts import Kernel
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.scan.units import ScanUnit


@dataclass(frozen=True)
class Compare:
    """`Work` that counts what differs in a unit.

    Attributes:
        kernel: for the dtypes with arithmetic; the others are compared by bits.
        tolerances: what to count beyond, without same bits.
        base: where units without extents are read from; None when all of them have extents.
        tuned: likewise.
    """

    kernel: Kernel
    tolerances: tuple[Tolerance, ...]
    base: Checkpoint | None
    tuned: Checkpoint | None

    @contextmanager
    def open(self) -> Iterator[Callable[[ScanUnit], Counters]]:
        """As `Work.open`."""
        with FileReader() as reader:
            sides = Sides(reader, self.base, self.tuned)

            def compare(unit: ScanUnit) -> Counters:
                base, tuned = sides.load(unit)
                counters = Counters(len(unit.segments), self.tolerances)
                bounds = np.zeros(len(unit.segments) + 1, np.int64)
                np.cumsum([segment.count for segment in unit.segments], out=bounds[1:])
                kernel = self.kernel if unit.dtype in ARITHMETIC else bits_kernel.compare
                kernel(base, tuned, unit.dtype, bounds, counters)
                return counters

            yield compare
