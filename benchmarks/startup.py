"""What a test suite pays that has the plugin installed and does not use it.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import measure

ROUNDS = 40
COLLECT = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
HEAVY = ["torch", "numpy", "transformers", "numba", "scipy"]
LOADED = f"import sys, pytest_subnet.plugin; print([m for m in {HEAVY} if m in sys.modules])"


def main() -> None:
    """Collect a directory of tests with and without the plugin, in turn."""
    # Only our plugin: others take ten times as long to load, and vary by more than we cost.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(10):
            tests = "\n".join(f"def test_{i}(): pass" for i in range(20))
            (Path(scratch) / f"test_{number}.py").write_text(tests)
        # The least processor time of many runs: what other processes do to a run only adds to it.
        plain, plugged = [], []
        for _ in range(ROUNDS):
            plain.append(measure.run(*COLLECT, scratch).cpu_seconds)
            plugged.append(measure.run(*COLLECT, "-p", "pytest_subnet.plugin", scratch).cpu_seconds)
        added = (min(plugged) - min(plain)) * 1e3
    imported = measure.python(LOADED).output.strip()
    measure.show(
        [
            (
                "added to --collect-only, ms of processor time",
                f"{added:.0f}",
                "30",
            ),
            ("heavy modules that it imports", imported, "[]"),
        ]
    )


if __name__ == "__main__":
    main()
