"""What a device is called, and which of several processes this is."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]?))?")
"""As torch spells them, which ends with an error of its own at `cuda:01` and `cuda:1000`."""


def is_device(name: str) -> bool:
    """Whether `name` is `cpu`, `cuda` or `cuda:N`; it need not be there.

    >>> is_device("cuda:1"), is_device("gpu")
    (True, False)
    """
    return _DEVICE.fullmatch(name) is not None


def follows(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun started this process as another than the first.

    What all of them find out alike is then shown by the first one alone.

    >>> follows({"RANK": "1", "WORLD_SIZE": "2"}), follows({"RANK": "0", "WORLD_SIZE": "2"})
    (True, False)
    """
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    return rank.isdecimal() and size.isdecimal() and int(size) > 1 and int(rank) > 0
