"""Counting the columns of packed bits, compiled by Numba.

Bits that lie above each other are added without unpacking them: eight words hold the eight binary
digits of 64 counts, and a further word is carried through them (Harley and Seal). After 255 rows
the counts are full and taken out.
"""

# Compiled by Numba, which has no stubs.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, misc"

from __future__ import annotations

import numpy as np

from pytest_subnet.scan.compiling import compiled

_DIGITS = 8
_MOST = (1 << _DIGITS) - 1


@compiled()
def count_columns(words, columns):
    """Add to `columns`, int64 `[64 * width]`, the bits of `words`, uint64 `[rows, width]`."""
    height, width = words.shape
    digits = np.empty((_DIGITS, width), np.uint64)
    for first in range(0, height, _MOST):
        digits[:] = 0
        for row in range(first, min(first + _MOST, height)):
            for j in range(width):
                carried = words[row, j]
                for digit in range(_DIGITS):
                    before = digits[digit, j]
                    digits[digit, j] = before ^ carried
                    carried &= before
        for j in range(width):
            for bit in range(64):
                for digit in range(_DIGITS):
                    one = (digits[digit, j] >> np.uint64(bit)) & np.uint64(1)
                    columns[64 * j + bit] += np.int64(one) << digit
