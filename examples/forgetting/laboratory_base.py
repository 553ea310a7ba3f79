"""What this example takes from the release demo: the laboratory's base, and building once."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "release"))

from laboratory import Settings, build_base, build_once
from tune import sha256

__all__ = ["Settings", "build_base", "build_once", "sha256"]
