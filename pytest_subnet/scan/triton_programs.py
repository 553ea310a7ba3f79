"""What runs on the GPU: one program a chunk of entries, each side read once.

Entries are held by lanes and vectors: a lane is a thread, its vector is one load of 16 bytes, and
sums over vectors stay inside of the thread. Where chunks lie is a table of addresses, so that one
launch serves any number of tensors. Nothing is added up between programs: each writes what it found
into its own column of `out`, so that the sums do not depend on who was quicker.

`table` is int64: the limits (absolute and relative, four of each, the bits of float64), then rows
of `chunks` numbers each: the address of base, of tuned, of the mask's bytes, and how many entries.
`out` is int64 `[COLUMNS, chunks]`.
"""

# Triton compiles this module: it has types of its own, and no stubs.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"
# mypy: disable-error-code="no-untyped-call, attr-defined, misc"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

LIMITS = 4
"""How many tolerances one launch counts beyond."""

INTEGERS = 4 + LIMITS
SUMS = INTEGERS
PEAK = SUMS + 3
HOLDS = PEAK + 1
COLUMNS = HOLDS + 1
"""Rows of `out`: integers as in `Counters`, three sums and the peak as bits of float64, and whether
the arithmetic of `count_ordinary` held."""

_INTEGERS = tl.constexpr(INTEGERS)
_SUMS = tl.constexpr(SUMS)
_PEAK = tl.constexpr(PEAK)
_HOLDS = tl.constexpr(HOLDS)
_LIMITS = tl.constexpr(LIMITS)


@triton.jit
def _words_at(table, row, chunk, chunks, DTYPE: tl.constexpr):
    address = tl.load(table + 2 * _LIMITS + row * chunks + chunk)
    if DTYPE == "float32":
        return address.to(tl.pointer_type(tl.int32))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def _value(words, DTYPE: tl.constexpr):
    """Stored words as the floats in which differences are formed."""
    if DTYPE == "bfloat16":
        return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        return words.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return words.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _limit(table, which, DTYPE: tl.constexpr):
    """A limit in the dtype in which differences are formed; the host has rounded it."""
    value = tl.load(table + which).to(tl.float64, bitcast=True)
    if DTYPE == "float32":
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def _lanes(found):
    """Sums over rows and vectors: what each thread has of its own."""
    return tl.sum(tl.sum(found, axis=2), axis=1)


@triton.jit
def _count(flags):
    return _lanes(flags.to(tl.int32))


@triton.jit
def _bytes_of(flags, V: tl.constexpr):
    """Eight flags a byte, the first one lowest."""
    place = tl.arange(0, V)[None, None, :]
    return tl.sum(flags.to(tl.int32) << place, axis=2).to(tl.uint8)


@triton.jit
def _put(out, column, chunk, chunks, value, mask):
    tl.store(out + column * chunks + chunk, value.to(tl.int64), mask=mask)


@triton.jit
def _put_float(out, column, chunk, chunks, value, mask):
    bits = value.to(tl.float64).to(tl.int64, bitcast=True)
    tl.store(out + column * chunks + chunk, bits, mask=mask)


@triton.jit
def _bound(near, share, before, after, RELATIVE: tl.constexpr):
    if RELATIVE:
        return share * tl.maximum(tl.abs(before), tl.abs(after))
    else:
        return near


@triton.jit
def _ones(flags):
    """As float32: one instruction a flag, and additions that the units for integers are spared."""
    return tl.where(flags, 1.0, 0.0)


@triton.jit(do_not_specialize=["chunks"])
def count_ordinary(
    table,
    out,
    chunks,
    DTYPE: tl.constexpr,
    TOLERANCES: tl.constexpr,
    RELATIVE: tl.constexpr,
    MARK: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    """Count chunks of whole tiles at addresses divisible by 16, as if all values were ordinary.

    Whether they were shows in the sums: a NaN or Inf, or squares that leave the range of float32,
    leave a sum that is not between bounds. `count_any` counts such a chunk again.
    """
    chunk = tl.program_id(0)
    base = _words_at(table, 0, chunk, chunks, DTYPE)
    tuned = _words_at(table, 1, chunk, chunks, DTYPE)
    count = tl.load(table + 2 * _LIMITS + 3 * chunks + chunk).to(tl.int32)
    offsets = tl.arange(0, L)[:, None] * V + tl.arange(0, V)[None, :]
    if MARK != "":
        marks = tl.load(table + 2 * _LIMITS + 2 * chunks + chunk).to(tl.pointer_type(tl.uint8))
        place = tl.arange(0, V)[None, :]
    number = tl.float64 if DTYPE == "float32" else tl.float32
    changed = tl.zeros([L], tl.float32)  # exact up to 2^24, and a chunk has 2^20 entries
    moved = tl.zeros([L], tl.float32)
    beyond_0 = tl.zeros([L], tl.float32)
    beyond_1 = tl.zeros([L], tl.float32)
    beyond_2 = tl.zeros([L], tl.float32)
    beyond_3 = tl.zeros([L], tl.float32)
    delta_squares = tl.zeros([L], tl.float64)
    base_squares = tl.zeros([L], tl.float64)
    tuned_squares = tl.zeros([L], tl.float64)
    peaks = tl.zeros([L, V], number)
    if TOLERANCES > 0:
        near_0, share_0 = _limit(table, 0, DTYPE), _limit(table, _LIMITS, DTYPE)
    if TOLERANCES > 1:
        near_1, share_1 = _limit(table, 1, DTYPE), _limit(table, _LIMITS + 1, DTYPE)
    if TOLERANCES > 2:
        near_2, share_2 = _limit(table, 2, DTYPE), _limit(table, _LIMITS + 2, DTYPE)
    if TOLERANCES > 3:
        near_3, share_3 = _limit(table, 3, DTYPE), _limit(table, _LIMITS + 3, DTYPE)
    for start in range(0, count, U * L * V):
        ones_changed = tl.zeros([L, V], tl.float32)
        ones_moved = tl.zeros([L, V], tl.float32)
        ones_0 = tl.zeros([L, V], tl.float32)
        ones_1 = tl.zeros([L, V], tl.float32)
        ones_2 = tl.zeros([L, V], tl.float32)
        ones_3 = tl.zeros([L, V], tl.float32)
        some_delta = tl.zeros([L, V], number)
        some_base = tl.zeros([L, V], number)
        some_tuned = tl.zeros([L, V], number)
        for step in tl.static_range(U):
            first = start + step * L * V
            left = tl.load(tl.multiple_of(base + first + offsets, (16, 16)))
            right = tl.load(tl.multiple_of(tuned + first + offsets, (16, 16)))
            before = _value(left, DTYPE)
            after = _value(right, DTYPE)
            differs = left != right
            delta = after - before
            size = tl.abs(delta)
            ones_changed += _ones(differs)
            ones_moved += _ones(size > 0)  # other bits of the same value: a zero's sign
            if TOLERANCES > 0:
                beyond = size > _bound(near_0, share_0, before, after, RELATIVE % 2 == 1)
                ones_0 += _ones(beyond)
            if TOLERANCES > 1:
                bound = _bound(near_1, share_1, before, after, RELATIVE // 2 % 2 == 1)
                ones_1 += _ones(size > bound)
            if TOLERANCES > 2:
                bound = _bound(near_2, share_2, before, after, RELATIVE // 4 % 2 == 1)
                ones_2 += _ones(size > bound)
            if TOLERANCES > 3:
                bound = _bound(near_3, share_3, before, after, RELATIVE // 8 % 2 == 1)
                ones_3 += _ones(size > bound)
            some_delta += delta * delta
            some_base += before * before
            some_tuned += after * after
            peaks = tl.maximum(peaks, size)
            if MARK != "":
                if MARK == "bits":
                    found = tl.sum(differs.to(tl.int32) << place, axis=1).to(tl.uint8)
                else:
                    found = tl.sum(beyond.to(tl.int32) << place, axis=1).to(tl.uint8)
                tl.store(marks + first // 8 + tl.arange(0, L), found)
        changed += tl.sum(ones_changed, axis=1)
        moved += tl.sum(ones_moved, axis=1)
        if TOLERANCES > 0:
            beyond_0 += tl.sum(ones_0, axis=1)
        if TOLERANCES > 1:
            beyond_1 += tl.sum(ones_1, axis=1)
        if TOLERANCES > 2:
            beyond_2 += tl.sum(ones_2, axis=1)
        if TOLERANCES > 3:
            beyond_3 += tl.sum(ones_3, axis=1)
        delta_squares += tl.sum(some_delta, axis=1).to(tl.float64)
        base_squares += tl.sum(some_base, axis=1).to(tl.float64)
        tuned_squares += tl.sum(some_tuned, axis=1).to(tl.float64)
    flips = changed - moved
    peak = tl.max(peaks, axis=1)
    delta_sum = tl.sum(delta_squares, axis=0)
    base_sum = tl.sum(base_squares, axis=0)
    tuned_sum = tl.sum(tuned_squares, axis=0)
    largest = tl.max(peak, axis=0)
    if DTYPE == "bfloat16":
        holds = (
            (base_sum > 1e-28)
            & (base_sum < 1e30)
            & (tuned_sum > 1e-28)
            & (tuned_sum < 1e30)
            & ((largest == 0) | ((delta_sum > 1e-28) & (delta_sum < 1e30)))
        )
    else:
        holds = (base_sum < 1e300) & (tuned_sum < 1e300) & (delta_sum < 1e300)
    _put(out, 0, chunk, chunks, tl.sum(changed, axis=0), True)
    _put(out, 1, chunk, chunks, tl.sum(flips, axis=0), True)
    _put(out, 2, chunk, chunks, tl.sum(flips, axis=0) * 0, True)
    _put(out, 3, chunk, chunks, tl.sum(flips, axis=0) * 0, True)
    _put(out, 4, chunk, chunks, tl.sum(beyond_0, axis=0), True)
    _put(out, 5, chunk, chunks, tl.sum(beyond_1, axis=0), True)
    _put(out, 6, chunk, chunks, tl.sum(beyond_2, axis=0), True)
    _put(out, 7, chunk, chunks, tl.sum(beyond_3, axis=0), True)
    _put_float(out, _SUMS, chunk, chunks, delta_sum, True)
    _put_float(out, _SUMS + 1, chunk, chunks, base_sum, True)
    _put_float(out, _SUMS + 2, chunk, chunks, tuned_sum, True)
    _put_float(out, _PEAK, chunk, chunks, largest, True)
    _put(out, _HOLDS, chunk, chunks, holds.to(tl.int32), True)


@triton.jit(do_not_specialize=["chunks", "ordinary"])
def count_any(
    table,
    out,
    chunks,
    ordinary,
    DTYPE: tl.constexpr,
    TOLERANCES: tl.constexpr,
    MARK: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    """Count chunks of any length, at any address and of any values.

    The first `ordinary` chunks have been counted by `count_ordinary`: only where that did not hold
    are they counted here.
    """
    chunk = tl.program_id(0)
    counted = tl.load(out + _HOLDS * chunks + chunk, mask=chunk < ordinary, other=0)
    mine = counted == 0
    base = _words_at(table, 0, chunk, chunks, DTYPE)
    tuned = _words_at(table, 1, chunk, chunks, DTYPE)
    count = tl.load(table + 2 * _LIMITS + 3 * chunks + chunk).to(tl.int32)
    count = tl.where(mine, count, 0)
    lane = tl.arange(0, L)[:, None, None]
    offsets = lane * V + tl.arange(0, V)[None, None, :]
    if MARK != "":
        marks = tl.load(table + 2 * _LIMITS + 2 * chunks + chunk).to(tl.pointer_type(tl.uint8))
        places = tl.arange(0, L)[:, None]
    infinity = float("inf")
    changed = tl.zeros([L], tl.int32)
    flips = tl.zeros([L], tl.int32)
    base_broken = tl.zeros([L], tl.int32)
    tuned_broken = tl.zeros([L], tl.int32)
    beyond_0 = tl.zeros([L], tl.int32)
    beyond_1 = tl.zeros([L], tl.int32)
    beyond_2 = tl.zeros([L], tl.int32)
    beyond_3 = tl.zeros([L], tl.int32)
    delta_squares = tl.zeros([L], tl.float64)
    base_squares = tl.zeros([L], tl.float64)
    tuned_squares = tl.zeros([L], tl.float64)
    peak = tl.zeros([L], tl.float64)
    if TOLERANCES > 0:
        near_0, share_0 = _limit(table, 0, DTYPE), _limit(table, _LIMITS, DTYPE)
    if TOLERANCES > 1:
        near_1, share_1 = _limit(table, 1, DTYPE), _limit(table, _LIMITS + 1, DTYPE)
    if TOLERANCES > 2:
        near_2, share_2 = _limit(table, 2, DTYPE), _limit(table, _LIMITS + 2, DTYPE)
    if TOLERANCES > 3:
        near_3, share_3 = _limit(table, 3, DTYPE), _limit(table, _LIMITS + 3, DTYPE)
    for start in range(0, count, L * V):
        inside = start + offsets < count
        left = tl.load(base + start + offsets, mask=inside, other=0)
        right = tl.load(tuned + start + offsets, mask=inside, other=0)
        before = _value(left, DTYPE)
        after = _value(right, DTYPE)
        differs = left != right
        before_finite = tl.abs(before) < infinity
        after_finite = tl.abs(after) < infinity
        finite = before_finite & after_finite
        changed += _count(differs)
        flips += _count(differs & (before == 0) & (after == 0))
        base_broken += _count(before_finite == 0)
        tuned_broken += _count(after_finite == 0)
        size = tl.abs(after - before)
        if TOLERANCES > 0:
            larger = tl.maximum(tl.abs(before), tl.abs(after))
            first = tl.where(
                finite,
                size > share_0 * larger + near_0,
                differs,
            )
            beyond_0 += _count(first)
        if TOLERANCES > 1:
            reach = share_1 * larger + near_1
            beyond_1 += _count(tl.where(finite, size > reach, differs))
        if TOLERANCES > 2:
            reach = share_2 * larger + near_2
            beyond_2 += _count(tl.where(finite, size > reach, differs))
        if TOLERANCES > 3:
            reach = share_3 * larger + near_3
            beyond_3 += _count(tl.where(finite, size > reach, differs))
        wide_before = tl.where(before_finite, before, 0).to(tl.float64)
        wide_after = tl.where(after_finite, after, 0).to(tl.float64)
        delta = tl.where(finite, wide_after - wide_before, 0)
        delta_squares += _lanes(delta * delta)
        base_squares += _lanes(wide_before * wide_before)
        tuned_squares += _lanes(wide_after * wide_after)
        peak = tl.maximum(peak, tl.max(tl.max(tl.abs(delta), axis=2), axis=1))
        if MARK != "":
            written = start + places * V < count
            if MARK == "bits":
                tl.store(marks + start // 8 + places, _bytes_of(differs, V), mask=written)
            else:
                tl.store(marks + start // 8 + places, _bytes_of(first, V), mask=written)
    _put(out, 0, chunk, chunks, tl.sum(changed, axis=0), mine)
    _put(out, 1, chunk, chunks, tl.sum(flips, axis=0), mine)
    _put(out, 2, chunk, chunks, tl.sum(base_broken, axis=0), mine)
    _put(out, 3, chunk, chunks, tl.sum(tuned_broken, axis=0), mine)
    _put(out, 4, chunk, chunks, tl.sum(beyond_0, axis=0), mine)
    _put(out, 5, chunk, chunks, tl.sum(beyond_1, axis=0), mine)
    _put(out, 6, chunk, chunks, tl.sum(beyond_2, axis=0), mine)
    _put(out, 7, chunk, chunks, tl.sum(beyond_3, axis=0), mine)
    _put_float(out, _SUMS, chunk, chunks, tl.sum(delta_squares, axis=0), mine)
    _put_float(out, _SUMS + 1, chunk, chunks, tl.sum(base_squares, axis=0), mine)
    _put_float(out, _SUMS + 2, chunk, chunks, tl.sum(tuned_squares, axis=0), mine)
    _put_float(out, _PEAK, chunk, chunks, tl.max(peak, axis=0), mine)


@triton.jit(do_not_specialize=["chunks", "first"])
def count_bits(
    table,
    out,
    chunks,
    first,
    SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    BROKEN: tl.constexpr,
    WHOLE: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
):
    """Count entries of `SIZE` bytes with other bits; NaN and Inf are `word & KEEP == BROKEN`.

    Args:
        table: as above.
        out: as above; only its first, third and fourth row are written.
        chunks: how many there are.
        first: the chunk of the first program.
        SIZE: 1, 2, 4 or 8.
        KEEP: 0 for dtypes that have neither NaN nor Inf.
        BROKEN: of the bits kept.
        WHOLE: whether these chunks are whole tiles at addresses divisible by 16.
        L: threads.
        V: entries in 16 bytes.
    """
    chunk = first + tl.program_id(0)
    words = table + 2 * _LIMITS + chunk
    if SIZE == 1:
        pointer = tl.pointer_type(tl.uint8)
    elif SIZE == 2:
        pointer = tl.pointer_type(tl.uint16)
    elif SIZE == 4:
        pointer = tl.pointer_type(tl.uint32)
    else:
        pointer = tl.pointer_type(tl.uint64)
    base = tl.load(words).to(pointer)
    tuned = tl.load(words + chunks).to(pointer)
    count = tl.load(words + 3 * chunks).to(tl.int32)
    offsets = tl.arange(0, L)[:, None, None] * V + tl.arange(0, V)[None, None, :]
    changed = tl.zeros([L], tl.int32)
    base_broken = tl.zeros([L], tl.int32)
    tuned_broken = tl.zeros([L], tl.int32)
    for start in range(0, count, L * V):
        if WHOLE:
            left = tl.load(tl.multiple_of(base + start + offsets, (16, 16, 16)))
            right = tl.load(tl.multiple_of(tuned + start + offsets, (16, 16, 16)))
        else:
            inside = start + offsets < count
            left = tl.load(base + start + offsets, mask=inside, other=0)
            right = tl.load(tuned + start + offsets, mask=inside, other=0)
        changed += _count(left != right)
        if KEEP != 0:
            base_broken += _count((left & KEEP) == BROKEN)
            tuned_broken += _count((right & KEEP) == BROKEN)
    _put(out, 0, chunk, chunks, tl.sum(changed, axis=0), True)
    _put(out, 2, chunk, chunks, tl.sum(base_broken, axis=0), True)
    _put(out, 3, chunk, chunks, tl.sum(tuned_broken, axis=0), True)
