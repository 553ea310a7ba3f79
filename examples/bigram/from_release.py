"""What this example takes from the release demo: the laboratory's base, its text, building once."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "release"))

from laboratory import Settings, build_base, build_once, encode, read_standard_library

__all__ = ["Settings", "build_base", "build_once", "encode", "read_standard_library"]
