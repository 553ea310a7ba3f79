"""What a device is called."""

from __future__ import annotations

import re

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def is_device(name: str) -> bool:
    """Whether `name` is `cpu`, `cuda` or `cuda:N`; it need not be there.

    >>> is_device("cuda:1"), is_device("gpu")
    (True, False)
    """
    return _DEVICE.fullmatch(name) is not None
