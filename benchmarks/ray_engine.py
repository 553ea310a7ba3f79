"""20,000 small tensors through Ray, a worker a core, against a thread a core.

python benchmarks/ray_engine.py [DIRECTORY]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import measure
from many_tensors import TENSORS
from pairs import build_small_tensors_pair

from pytest_subnet import open_pair
from pytest_subnet.scan import PAPER
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.ray_cluster import connect, disconnect


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch))


def report(root: Path) -> None:
    """Measure opening with a scan by both engines, in turn, on the pair in `root`."""
    base, tuned = build_small_tensors_pair(root / "small-tensors", TENSORS)

    def opened_and_scanned(engine: str) -> None:
        pair = open_pair(base, tuned, engine=engine)
        found.append(scan(pair, range(len(pair.tensors)), (PAPER,)).integers.tobytes())

    def scanned(engine: str) -> None:
        pair = pairs[engine]
        found.append(scan(pair, range(len(pair.tensors)), (PAPER,)).integers.tobytes())

    pairs = {engine: open_pair(base, tuned, engine=engine) for engine in ("ray", "threads")}
    found: list[bytes] = []
    started = measure.seconds(connect)
    for engine in pairs:  # compiles, starts workers and fills the page cache
        scanned(engine)
    whole = measure.ratios(
        lambda: opened_and_scanned("ray"), lambda: opened_and_scanned("threads"), 5
    )
    scans = measure.ratios(lambda: scanned("ray"), lambda: scanned("threads"), 5)
    per_tensor = statistics.median(measure.seconds(lambda: scanned("ray")) for _ in range(5))
    disconnect()
    if len(set(found)) != 1:
        raise SystemExit("the engines do not give the same integers")
    measure.show(
        [
            ("open and scan: Ray ÷ threads", measure.spread(whole), "1.5"),
            ("scan alone: Ray ÷ threads", measure.spread(scans), "-"),
            ("scan by Ray: µs a tensor", f"{per_tensor / TENSORS * 1e6:.1f}", "-"),
            ("start of a local cluster: s", f"{started:.1f}", "-"),
        ]
    )


if __name__ == "__main__":
    main()
