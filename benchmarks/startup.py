"""What a test suite pays that has the plugin installed and does not use it; the command line.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import measure
import numpy as np
from safetensors.numpy import save_file

ROUNDS = 40
COLLECT = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
HEAVY = ["torch", "numpy", "transformers", "numba", "scipy"]
SHELL = str(Path(sysconfig.get_path("scripts")) / "pytest-subnet")
LOADED = f"import sys, pytest_subnet.plugin; print([m for m in {HEAVY} if m in sys.modules])"


def main() -> None:
    """Collect a directory of tests with and without the plugin, in turn; then the command line."""
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
        told = min(measure.run(SHELL, "--help").seconds for _ in range(ROUNDS))
        base, tuned = _tiny_pair(Path(scratch))
        compared = min(measure.run(SHELL, "diff", base, tuned).seconds for _ in range(5))
    imported = measure.python(LOADED).output.strip()
    measure.show(
        [
            (
                "added to --collect-only, ms of processor time",
                f"{added:.0f}",
                "30",
            ),
            ("heavy modules that it imports", imported, "[]"),
            ("pytest-subnet --help, s", f"{told:.2f}", "0.15"),
            ("pytest-subnet diff of two tiny checkpoints, s", f"{compared:.2f}", "2.5"),
        ]
    )


def _tiny_pair(scratch: Path) -> tuple[str, str]:
    """Two checkpoints of 64 weights each."""
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        weights = {"model.layers.0.mlp.up_proj.weight": np.full((8, 8), value, np.float32)}
        save_file(weights, scratch / f"{name}.safetensors")
    return str(scratch / "base.safetensors"), str(scratch / "tuned.safetensors")


if __name__ == "__main__":
    main()
