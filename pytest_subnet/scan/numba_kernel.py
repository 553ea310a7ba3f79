"""The CPU kernel: all counters in one pass over two buffers, compiled by Numba.

Entries are taken 4,096 at a time. The common case, a block of finite values of ordinary size, goes
through loops that vectorise; what they find to be rare (a value that is not finite, sums that leave
the range of float32, zeros that may have changed sign) is counted again, exactly, by a loop of its
own. The bits of a block are compared in the width of its words, 16-bit floats in float32 with
32-bit counters, wider ones in float64 with 64-bit counters: a loop has one vector width.

The dtype of an array tells its format: uint16 is bfloat16, int16 is float16.
"""

# Numba compiles this module: its arithmetic is spelled with intrinsics, because `int32 + int32` is
# int64 to Numba, which halves the width of a vector, and a floating maximum does not vectorise.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg"
# mypy: disable-error-code="call-arg, var-annotated, unreachable"

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pytest_subnet.scan.compiling import compiled
from pytest_subnet.scan.counters import FIRST_TOLERANCE, Counters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.contracts import FileRun

BLOCK = 4096
_WORDS = {
    "bfloat16": np.uint16,
    "float16": np.int16,
    "float32": np.float32,
    "float64": np.float64,
}

# Reordering is what lets sums vectorise. "nnan" and "ninf" are left out: a NaN stays a NaN.
_FAST = {"reassoc", "contract", "nsz"}


class _Lane(NamedTuple):
    """Constants in the width in which a dtype is compared.

    Sums of squares between `least` and `most` lost nothing to underflow or overflow.
    """

    zero: np.int32 | np.int64
    nil: np.float32 | np.float64
    infinity: np.int32 | np.int64
    least: np.float32 | np.float64
    most: np.float32 | np.float64


_NARROW = _Lane(
    zero=np.int32(0),
    nil=np.float32(0),
    infinity=np.float32(np.inf).view(np.int32),
    least=np.float32(1e-28),
    most=np.float32(1e30),
)
_WIDE = _Lane(
    zero=np.int64(0),
    nil=np.float64(0),
    infinity=np.float64(np.inf).view(np.int64),
    least=np.float64(1e-280),
    most=np.float64(1e280),
)
_LANES = {"bfloat16": _NARROW, "float16": _NARROW, "float32": _WIDE, "float64": _WIDE}

_I32, _I64, _F32, _F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


_pread = types.ExternalFunction(
    "pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64)
)


@intrinsic
def _value(typingctx, word):
    """A stored word as the float in which differences are formed."""
    narrow = word in (types.uint16, types.int16)

    def bfloat16(context, builder, signature, args):
        wide = builder.zext(args[0], _I32)
        return builder.bitcast(builder.shl(wide, _I32(16)), _F32)

    def float16(context, builder, signature, args):
        # Shifted into place the exponent is 112 too small, for subnormals too: scaling mends both.
        wide = builder.zext(args[0], _I32)
        magnitude = builder.and_(wide, _I32(0x7FFF))
        shifted = builder.bitcast(builder.shl(magnitude, _I32(13)), _F32)
        scaled = builder.bitcast(builder.fmul(shifted, _F32(2.0**112)), _I32)
        not_finite = builder.icmp_signed(">=", magnitude, _I32(0x7C00))
        exponent = builder.select(not_finite, _I32(0x7F800000), _I32(0))
        sign = builder.shl(builder.and_(wide, _I32(0x8000)), _I32(16))
        return builder.bitcast(builder.or_(builder.or_(scaled, exponent), sign), _F32)

    def float32(context, builder, signature, args):
        return builder.fpext(args[0], _F64)

    def float64(context, builder, signature, args):
        return args[0]

    loads = {
        types.uint16: bfloat16,
        types.int16: float16,
        types.float32: float32,
        types.float64: float64,
    }
    return (types.float32 if narrow else types.float64)(word), loads[word]


_INTEGERS: dict[object, types.Integer] = {
    types.uint16: types.int16,
    types.int16: types.int16,
    types.float32: types.int32,
    types.float64: types.int64,
}


@intrinsic
def _bits(typingctx, word):
    """The bits of a stored word as a signed integer of its width: -0 is the least there is."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _INTEGERS[word](word), generate


@intrinsic
def _differ(typingctx, one, other):
    """1 where two integers differ, as a counter of their width."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.icmp_unsigned("!=", args[0], args[1]), args[0].type)

    return one(one, one), generate


@intrinsic
def _widen(typingctx, count, like):
    """A counter in the width of another."""

    def generate(context, builder, signature, args):
        return builder.zext(args[0], args[1].type) if args[0].type != args[1].type else args[0]

    return like(count, like), generate


@intrinsic
def _smaller(typingctx, one, other):
    """The smaller of two integers."""

    def generate(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", args[0], args[1]), args[0], args[1])

    return one(one, one), generate


@intrinsic
def _magnitude(typingctx, value):
    """The bits of a float without its sign: they are ordered as |value| is, NaN above Inf."""
    narrow = value == types.float32
    integer, mask = (_I32, 2**31 - 1) if narrow else (_I64, 2**63 - 1)

    def generate(context, builder, signature, args):
        return builder.and_(builder.bitcast(args[0], integer), integer(mask))

    return (types.int32 if narrow else types.int64)(value), generate


@intrinsic
def _from_magnitude(typingctx, bits):
    """The float whose bits these are."""
    narrow = bits == types.int32

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], _F32 if narrow else _F64)

    return (types.float32 if narrow else types.float64)(bits), generate


@intrinsic
def _add(typingctx, one, other):
    """The sum of two counters in their own width."""

    def generate(context, builder, signature, args):
        return builder.add(args[0], args[1])

    return one(one, one), generate


@intrinsic
def _above(typingctx, one, other):
    """1 where one integer is above the other, as a counter of their width."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.icmp_signed(">", args[0], args[1]), args[0].type)

    return one(one, one), generate


@intrinsic
def _larger(typingctx, one, other):
    """The larger of two integers."""

    def generate(context, builder, signature, args):
        return builder.select(builder.icmp_signed(">", args[0], args[1]), args[0], args[1])

    return one(one, one), generate


@njit(nogil=True)
def _count_beyond(base, tuned, limit, relative, infinity, zero):
    """Entries of a block beyond one tolerance; where one is not finite, those with other bits."""
    count = zero
    for i in range(base.size):
        before, after = _value(base[i]), _value(tuned[i])
        largest = _larger(_magnitude(before), _magnitude(after))
        reach = limit * _from_magnitude(largest) if relative else limit
        beyond = _above(_magnitude(after - before), _magnitude(reach))
        finite = _above(infinity, largest)
        changed = _widen(_differ(_bits(base[i]), _bits(tuned[i])), zero)
        count = _add(count, beyond if finite != zero else changed)
    return np.int64(count)


@njit(nogil=True)
def _count_zero_flips(base, tuned, zero):
    """Entries that are zero on both sides, with another sign."""
    count = zero
    for i in range(base.size):
        largest = _larger(_magnitude(_value(base[i])), _magnitude(_value(tuned[i])))
        changed = _widen(_differ(_bits(base[i]), _bits(tuned[i])), zero)
        count = _add(count, changed if largest == zero else zero)
    return np.int64(count)


@njit(nogil=True)
def _count_not_finite(words, infinity, zero):
    """Entries that are NaN or Inf."""
    finite = zero
    for i in range(words.size):
        finite = _add(finite, _above(infinity, _magnitude(_value(words[i]))))
    return words.size - np.int64(finite)


@njit(nogil=True, fastmath=_FAST)
def _sum_rare_block(base, tuned, infinity, sums, peaks):
    """Sums and largest difference of a block in float64, over what is finite."""
    delta_squares, base_squares, tuned_squares = 0.0, 0.0, 0.0
    peak = np.int64(0)
    for i in range(base.size):
        before, after = _value(base[i]), _value(tuned[i])
        base_finite = _magnitude(before) < infinity
        tuned_finite = _magnitude(after) < infinity
        wide_before = np.float64(before) if base_finite else 0.0
        wide_after = np.float64(after) if tuned_finite else 0.0
        delta = wide_after - wide_before if base_finite and tuned_finite else 0.0
        peak = _larger(peak, _magnitude(delta))
        delta_squares += delta * delta
        base_squares += wide_before * wide_before
        tuned_squares += wide_after * wide_after
    sums[0] += delta_squares
    sums[1] += base_squares
    sums[2] += tuned_squares
    peaks[0] = max(peaks[0], _from_magnitude(peak))


@njit(nogil=True)
def _compare_bits(base, tuned):
    """How many words of a block differ, and whether one of them is -0."""
    lowest = _bits(base[0])
    changed = _differ(lowest, lowest)
    for i in range(base.size):
        before, after = _bits(base[i]), _bits(tuned[i])
        changed = _add(changed, _differ(before, after))
        lowest = _smaller(lowest, _smaller(before, after))
    return np.int64(changed), np.int64(lowest) == -(1 << (8 * base.itemsize - 1))


@njit(nogil=True, fastmath=_FAST)
def _compare_block(base, tuned, limits, relative, lane, integers, sums, peaks):
    """Count a block; where the arithmetic of its loop does not hold, count again."""
    zero, nil, infinity, least, most = lane
    fused = limits.size > 0 and not relative[0]
    limit = _magnitude(limits[0]) if fused else infinity
    beyond, peak = zero, zero
    delta_squares, base_squares, tuned_squares = nil, nil, nil
    for i in range(base.size):
        before, after = _value(base[i]), _value(tuned[i])
        delta = after - before
        size = _magnitude(delta)
        beyond = _add(beyond, _above(size, limit))
        peak = _larger(peak, size)
        delta_squares += delta * delta
        base_squares += before * before
        tuned_squares += after * after
    changed, negative_zero = _compare_bits(base, tuned)
    integers[0] += changed
    if changed > 0 and negative_zero:
        integers[1] += _count_zero_flips(base, tuned, zero)
    finite = peak < infinity  # a value that is not finite makes a difference that is not
    if not finite:
        integers[2] += _count_not_finite(base, infinity, zero)
        integers[3] += _count_not_finite(tuned, infinity, zero)
    if fused and finite:
        integers[4] += beyond
    if changed > 0:
        for k in range(1 if fused and finite else 0, limits.size):
            integers[4 + k] += _count_beyond(base, tuned, limits[k], relative[k], infinity, zero)
    if (
        finite
        and least < base_squares < most
        and least < tuned_squares < most
        and (peak == zero or least < delta_squares < most)
    ):
        sums[0] += delta_squares
        sums[1] += base_squares
        sums[2] += tuned_squares
        peaks[0] = max(peaks[0], np.float64(_from_magnitude(peak)))
    else:
        _sum_rare_block(base, tuned, infinity, sums, peaks)


@njit(nogil=True)
def _compare_run(base, tuned, limits, relative, lane, integers, sums, peaks):
    """Count a run of entries of one segment, block by block."""
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        _compare_block(
            base[start:stop], tuned[start:stop], limits, relative, lane, integers, sums, peaks
        )


@compiled()
def _compare_buffers(base, tuned, bounds, limits, relative, lane, integers, sums, peaks):
    """Count all segments of two buffers."""
    for row in range(bounds.size - 1):
        run = slice(bounds[row], bounds[row + 1])
        _compare_run(
            base[run],
            tuned[run],
            limits,
            relative,
            lane,
            integers[row],
            sums[row],
            peaks[row : row + 1],
        )


@compiled()
def _compare_files(files, base, tuned, bounds, limits, relative, lane, integers, sums, peaks):
    """Read two files a buffer at a time and count each while it is in the cache.

    `files` are descriptor and offset of base and of tuned. Gives the number of entries done: fewer
    than there are where a read came back short.
    """
    base_file, base_offset, tuned_file, tuned_offset = files
    total = bounds[-1]
    done = row = 0
    while done < total:
        count = min(base.size, total - done)
        nbytes = count * base.itemsize
        at = done * base.itemsize
        if _pread(base_file, base.ctypes, nbytes, base_offset + at) != nbytes:
            return done
        if _pread(tuned_file, tuned.ctypes, nbytes, tuned_offset + at) != nbytes:
            return done
        while row < bounds.size - 1 and bounds[row] < done + count:
            run = slice(max(bounds[row], done) - done, min(bounds[row + 1], done + count) - done)
            _compare_run(
                base[run],
                tuned[run],
                limits,
                relative,
                lane,
                integers[row],
                sums[row],
                peaks[row : row + 1],
            )
            if bounds[row + 1] > done + count:
                break
            row += 1
        done += count
    return done


class NumbaKernel:
    """A `FileKernel` for the four floating dtypes that have arithmetic here."""

    def __call__(
        self, base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
    ) -> None:
        """As `Kernel`."""
        ask = _Ask(dtype, counters)
        _compare_buffers(_words(base, dtype), _words(tuned, dtype), bounds, *ask.arguments)
        ask.settle()

    def compare_files(
        self,
        runs: Iterable[FileRun],
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
    ) -> bool:
        """As `FileKernel`; the interpreter is not entered between reading and comparing."""
        words = _WORDS[dtype]
        ask = _Ask(dtype, counters)
        *asked, integers, sums, peaks = ask.arguments
        start = 0
        for base, tuned, scratch, entries in runs:
            end = start + entries
            rows = slice(
                int(np.searchsorted(bounds, start, "right")) - 1,
                int(np.searchsorted(bounds, end, "left")),
            )
            done = _compare_files(
                (*base, *tuned),
                scratch[0].view(words),
                scratch[1].view(words),
                np.clip(bounds[rows.start : rows.stop + 1], start, end) - start,
                *asked,
                integers[rows],
                sums[rows],
                peaks[rows],
            )
            if done != entries:
                return False
            start = end
        if start != bounds[-1]:
            return False
        ask.settle()
        return True


def _words(buffer: Buffer, dtype: str) -> NDArray[np.generic]:
    """A buffer as words; copied where it is unaligned or read-only: that would be other code."""
    if not isinstance(buffer, np.ndarray):
        raise TypeError(f"this kernel compares numpy arrays, not {type(buffer).__name__}")
    return np.require(buffer.view(_WORDS[dtype]), requirements=["A", "W"])


class _Ask:
    """Counters and tolerances as the compiled code takes them."""

    def __init__(self, dtype: str, counters: Counters) -> None:
        lane = _LANES[dtype]
        number = type(lane.nil)
        tolerances = counters.tolerances
        # Absolute tolerances first: the fused loop serves one of them.
        self._order = sorted(range(len(tolerances)), key=lambda k: tolerances[k].atol is None)
        in_order = [tolerances[k] for k in self._order]
        self._counters = counters
        self._part = Counters(len(counters.peaks), tolerances)
        with np.errstate(over="ignore"):  # nothing is beyond a tolerance that the dtype cannot hold
            limits = np.array([t.rtol if t.atol is None else t.atol for t in in_order], number)
        self.arguments = (
            limits,
            np.array([t.atol is None for t in in_order], np.bool_),
            lane,
            self._part.integers,
            self._part.sums,
            self._part.peaks,
        )

    def settle(self) -> None:
        """Add what was counted."""
        columns = [*range(FIRST_TOLERANCE), *(FIRST_TOLERANCE + k for k in self._order)]
        restored = np.empty_like(self._part.integers)
        restored[:, columns] = self._part.integers
        self._part.integers = restored
        self._counters.add(np.arange(len(self._part.peaks)), self._part)
