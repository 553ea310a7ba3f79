"""20,000 small tensors, as in a mixture of experts: what one tensor costs.

python benchmarks/many_tensors.py [DIRECTORY]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
from pairs import build_small_tensors_pair

from pytest_subnet import assert_update_sparsity, open_pair, update_sparsity

TENSORS = 20_000


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch))


def report(root: Path) -> None:
    """Measure opening, and opening with a scan, on the pair in `root`."""
    base, tuned = build_small_tensors_pair(root / "small-tensors", TENSORS)
    update_sparsity(open_pair(base, tuned))  # compiles, and fills the page cache

    def verdict() -> None:
        assert_update_sparsity(open_pair(base, tuned), at_least=0.5)

    opened = [measure.seconds(lambda: open_pair(base, tuned)) / TENSORS * 1e6 for _ in range(5)]
    judged = [measure.seconds(verdict) / TENSORS * 1e6 for _ in range(5)]
    measure.show(
        [
            ("open both, align: µs a tensor", measure.spread(opened, 1), "-"),
            ("open, scan, verdict: µs a tensor", measure.spread(judged, 1), "60"),
        ]
    )


if __name__ == "__main__":
    main()
