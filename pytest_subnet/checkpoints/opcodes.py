"""A pickle looked over before it is loaded: what it builds must not take for ever to look at.

A tuple that holds another one twice, and that one another one twice, is a few bytes a level; its
hash goes through all of them, 2 to the power of the levels, and nothing interrupts it. What torch
writes nests tuples a few levels deep, so each one is weighed by following the opcodes: the stack
and the memo as they will be, with nothing but weights on them.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap

_HEAVIEST = 1000
"""What a tuple may hold, all levels together: a few dozen in what torch writes."""

_SKIPPED = {pickle.PROTO[0]: 1, pickle.FRAME[0]: 8}
"""Opcodes that change nothing, and the bytes that follow them."""

_PUSHES = {
    pickle.NONE[0]: 0,
    pickle.NEWTRUE[0]: 0,
    pickle.NEWFALSE[0]: 0,
    pickle.EMPTY_TUPLE[0]: 0,
    pickle.EMPTY_LIST[0]: 0,
    pickle.EMPTY_DICT[0]: 0,
    pickle.EMPTY_SET[0]: 0,
    pickle.BININT1[0]: 1,
    pickle.BININT2[0]: 2,
    pickle.BININT[0]: 4,
    pickle.BINFLOAT[0]: 8,
}
"""Opcodes that push something, and the bytes that follow them."""

_COUNTED = {
    pickle.SHORT_BINUNICODE[0]: 1,
    pickle.BINUNICODE[0]: 4,
    pickle.BINUNICODE8[0]: 8,
    pickle.SHORT_BINBYTES[0]: 1,
    pickle.SHORT_BINSTRING[0]: 1,
    pickle.BINBYTES[0]: 4,
    pickle.LONG1[0]: 1,
    pickle.LONG4[0]: 4,
}
"""Opcodes that push what follows them, and the size of the number that says how much that is."""

_TAKES = {
    pickle.APPEND[0]: 1,
    pickle.SETITEM[0]: 2,
    pickle.BUILD[0]: 1,
    pickle.REDUCE[0]: 1,
    pickle.NEWOBJ[0]: 1,
    pickle.NEWOBJ_EX[0]: 2,
    pickle.STACK_GLOBAL[0]: 1,
    pickle.BINPERSID[0]: 0,
}
"""Opcodes that take so many off the stack and leave one that is no tuple."""

_PUTS = {pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4}
_TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
_FILLS = (pickle.APPENDS[0], pickle.SETITEMS[0])
_TUPLE, _MARK, _GLOBAL, _STOP = (
    each[0] for each in (pickle.TUPLE, pickle.MARK, pickle.GLOBAL, pickle.STOP)
)
_MEMOIZE, _BINGET, _LONG_BINGET = (
    each[0] for each in (pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET)
)


class HeavyTupleError(Exception):
    """A tuple holds more than any that torch writes."""


def look_over(raw: bytes | mmap.mmap, *, pickles: int = 1) -> None:
    """Raise unless every tuple that is built from `raw` is small, however it is nested.

    The callables it may name must make no tuples out of tuples; that is up to who loads it. One
    that ends too early is not refused: loading it fails at the same byte.

    Args:
        raw: what is to be loaded; may go on after it.
        pickles: how many lie one after the other.

    Raises:
        HeavyTupleError: a tuple is too large.
        pickle.UnpicklingError: it is damaged, or has opcodes that torch's pickles do not have.

    >>> import pickle
    >>> look_over(pickle.dumps({("model", "weight"): (1, 2)}))
    """
    at = 0
    try:
        for _ in range(pickles):
            at = _follow(raw, at)
    except (IndexError, KeyError):
        raise pickle.UnpicklingError("it takes what was not put there") from None


def _follow(raw: bytes | mmap.mmap, at: int) -> int:
    """Where the pickle that begins at `at` ends."""
    stack: list[int] = []
    below: list[list[int]] = []  # the stacks under each mark
    memo: dict[int, int] = {}
    end = len(raw)
    while at < end:
        opcode = raw[at]
        at += 1
        if opcode == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif opcode == _LONG_BINGET:
            stack.append(memo[int.from_bytes(raw[at : at + 4], "little")])
            at += 4
        elif opcode == _BINGET:
            stack.append(memo[raw[at]])
            at += 1
        elif opcode in _PUSHES:
            stack.append(1)
            at += _PUSHES[opcode]
        elif opcode in _TAKES:
            for _ in range(_TAKES[opcode]):
                stack.pop()
            stack[-1] = 1
        elif opcode in _TUPLES:
            weight = 1
            for _ in range(_TUPLES[opcode]):
                weight += stack.pop()
            if weight > _HEAVIEST:
                raise HeavyTupleError
            stack.append(weight)
        elif opcode == _MARK:
            below.append(stack)
            stack = []
        elif opcode in _FILLS:
            stack = below.pop()
        elif opcode == _TUPLE:
            weight = 1 + sum(stack)
            if weight > _HEAVIEST:
                raise HeavyTupleError
            stack = below.pop()
            stack.append(weight)
        elif opcode in _COUNTED:
            size = _COUNTED[opcode]
            at += size + int.from_bytes(raw[at : at + size], "little")
            stack.append(1)
        elif opcode in _PUTS:
            size = _PUTS[opcode]
            memo[int.from_bytes(raw[at : at + size], "little")] = stack[-1]
            at += size
        elif opcode in _SKIPPED:
            at += _SKIPPED[opcode]
        elif opcode == _GLOBAL:
            at = raw.find(b"\n", raw.find(b"\n", at) + 1) + 1
            if not at:
                raise pickle.UnpicklingError("a name has no end")
            stack.append(1)
        elif opcode == _STOP:
            return at
        else:
            raise pickle.UnpicklingError(f"opcode {chr(opcode)!r} at byte {at - 1:,}")
    return at
