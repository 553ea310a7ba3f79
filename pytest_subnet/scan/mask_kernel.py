"""The CPU kernel for masks: counters as ever, and in the same pass which entries they counted.

64 entries become one word: a comparison of vectors gives a bit an entry. Of 16-bit floats the
strata are counted too (`Found`). Most of a tensor's exponents lie within eight of each other, so
these are told apart by three bits of the exponent, each a word as well, and counted by popcounts of
what is common to them; what lies outside, and the entries whose mantissa is zero, are counted one
by one. Each step goes through a run of words in a loop of its own: one loop for all is slower.
"""

# Numba compiles this module, as it does `numba_kernel`.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg"
# mypy: disable-error-code="call-arg, var-annotated, unreachable"

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pytest_subnet.scan.compiling import compiled
from pytest_subnet.scan.numba_kernel import (
    _LANES,
    _WORDS,
    BLOCK,
    _above,
    _Ask,
    _bits,
    _compare_block,
    _from_magnitude,
    _larger,
    _magnitude,
    _pread,
    _value,
    _words,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.contracts import Place
    from pytest_subnet.scan.counters import Counters
    from pytest_subnet.scan.found import Found

_GROUP = 64
_SAMPLE = 8 * _GROUP
_SLICED = 256
_WINDOW_BITS = 3
_WINDOW = 1 << _WINDOW_BITS

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
_COUNTS = types.Array(types.int64, 1, "C")

_FORMATS = {types.uint16: (7, 0xFF), types.int16: (10, 0x1F)}
"""Of bfloat16 and float16: the bits of the mantissa, and the exponent's after a shift by them."""


def _group(integer, value=None):
    """The type of 64 integers in one vector, or a constant of it."""
    vector = ir.VectorType(integer, _GROUP)
    return vector if value is None else ir.Constant(vector, [value] * _GROUP)


def _load(context, builder, array_type, array, start):
    """64 words from `start` on, as integers."""
    width = array_type.dtype.bitwidth
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.bitcast(builder.gep(data, [start]), _group(ir.IntType(width)).as_pointer())
    loaded = builder.load(place)
    loaded.align = width // 8
    return loaded


@intrinsic
def _differ_64(typingctx, base, tuned, start):
    """Which of 64 words differ, a bit each."""

    def generate(context, builder, signature, args):
        sides = [
            _load(context, builder, side, value, args[2])
            for side, value in zip(signature.args[:2], args[:2], strict=True)
        ]
        return builder.bitcast(builder.icmp_unsigned("!=", *sides), _I64)

    return types.uint64(base, tuned, start), generate


@intrinsic
def _far_64(typingctx, base, tuned, start, limit):
    """Which of 64 finite words are further apart than `limit`, a bit each."""
    wide = _group(ir.FloatType() if limit == types.float32 else ir.DoubleType())

    def value(builder, words, word):
        if word == types.uint16:
            return builder.bitcast(
                builder.shl(builder.zext(words, _group(_I32)), _group(_I32, 16)), wide
            )
        if word == types.int16:  # as in `_value`
            bits = builder.zext(words, _group(_I32))
            magnitude = builder.shl(builder.and_(bits, _group(_I32, 0x7FFF)), _group(_I32, 13))
            scale = ir.Constant(wide, [2.0**112] * _GROUP)
            scaled = builder.bitcast(
                builder.fmul(builder.bitcast(magnitude, wide), scale), _group(_I32)
            )
            sign = builder.shl(builder.and_(bits, _group(_I32, 0x8000)), _group(_I32, 16))
            return builder.bitcast(builder.or_(scaled, sign), wide)
        if word == types.float32:
            return builder.fpext(builder.bitcast(words, _group(ir.FloatType())), wide)
        return builder.bitcast(words, wide)

    def generate(context, builder, signature, args):
        before, after = (
            value(builder, _load(context, builder, side, array, args[2]), side.dtype)
            for side, array in zip(signature.args[:2], args[:2], strict=True)
        )
        one = builder.insert_element(ir.Constant(wide, ir.Undefined), args[3], ir.Constant(_I32, 0))
        reach = builder.shuffle_vector(one, one, _group(_I32, 0))
        delta = builder.fsub(after, before)
        above = builder.fcmp_ordered(">", delta, reach)
        below = builder.fcmp_ordered("<", delta, builder.fneg(reach))
        return builder.bitcast(builder.or_(above, below), _I64)

    return types.uint64(base, tuned, start, limit), generate


@intrinsic
def _pack_64(typingctx, flags, start):
    """Which of 64 bytes are not zero, a bit each."""

    def generate(context, builder, signature, args):
        loaded = _load(context, builder, signature.args[0], args[0], args[1])
        return builder.bitcast(builder.icmp_unsigned("!=", loaded, _group(_I8, 0)), _I64)

    return types.uint64(flags, start), generate


@intrinsic
def _slice_64(typingctx, words, start, first, planes, group):
    """Slice the exponents of 64 words, less `first`, into their three lowest bits.

    `planes`, uint64 `[4, groups]`, gets one word that has a bit for each entry whose exponent is
    `first` up to `first + 7`, zero mantissas apart, and one for each bit sliced. Gives the others.
    """
    shift, exponents = _FORMATS.get(words.dtype, (0, 0))

    def generate(context, builder, signature, args):
        if not shift:  # wider words have no strata: never called
            return _I64(0)
        loaded = _load(context, builder, signature.args[0], args[0], args[1])
        mantissa = builder.and_(loaded, _group(_I16, (1 << shift) - 1))
        ordinary = builder.icmp_unsigned("!=", mantissa, _group(_I16, 0))
        exponent = builder.trunc(builder.lshr(loaded, _group(_I16, shift)), _group(_I8))
        exponent = builder.and_(exponent, _group(_I8, exponents))
        lowest = builder.insert_element(
            ir.Constant(_group(_I8), ir.Undefined), args[2], ir.Constant(_I32, 0)
        )
        relative = builder.sub(exponent, builder.shuffle_vector(lowest, lowest, _group(_I32, 0)))
        within = builder.icmp_unsigned("<", relative, _group(_I8, _WINDOW))
        sliced = [builder.bitcast(builder.and_(ordinary, within), _I64)]
        shifted = builder.shl(relative, _group(_I8, 8 - _WINDOW_BITS))
        for _ in range(_WINDOW_BITS):
            sliced.append(builder.bitcast(builder.icmp_signed("<", shifted, _group(_I8, 0)), _I64))
            shifted = builder.add(shifted, shifted)
        data = context.make_array(signature.args[3])(context, builder, args[3]).data
        for plane, word in enumerate(sliced):
            place = builder.add(args[4], _I64(plane * _SLICED))
            builder.store(word, builder.gep(data, [place]))
        return builder.not_(sliced[0])

    planes_type = types.Array(types.uint64, 2, "C")
    return types.uint64(words, types.int64, types.uint8, planes_type, types.int64), generate


@njit(nogil=True)
def _add_up(planes, chosen, sums):
    """Add to `sums`, int64 `[8]`, how many of the chosen entries are at each of eight exponents."""
    all_here, fours, twos, ones = 0, 0, 0, 0
    sixes, fives, threes, sevens = 0, 0, 0, 0
    for group in range(chosen.size):
        here = planes[0, group] & chosen[group]
        four, two, one = planes[1, group] & here, planes[2, group] & here, planes[3, group] & here
        all_here += _popcount(here)
        fours += _popcount(four)
        twos += _popcount(two)
        ones += _popcount(one)
        sixes += _popcount(four & two)
        fives += _popcount(four & one)
        threes += _popcount(two & one)
        sevens += _popcount(four & two & one)
    # Each is counted in all that its bits contain: inclusion and exclusion.
    sums[0] += all_here - fours - twos - ones + sixes + fives + threes - sevens
    sums[1] += ones - fives - threes + sevens
    sums[2] += twos - sixes - threes + sevens
    sums[3] += threes - sevens
    sums[4] += fours - sixes - fives + sevens
    sums[5] += fives - sevens
    sums[6] += sixes - sevens
    sums[7] += sevens


@intrinsic
def _lowest_bit(typingctx, word):
    """The place of the lowest bit that is set; 64 where none is."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], _I1(0))

    return types.int64(types.uint64), generate


@intrinsic
def _popcount(typingctx, word):
    """How many bits are set."""

    def generate(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def _stratum(typingctx, word):
    """2 * exponent + (mantissa == 0) of a 16-bit float."""
    shift, exponents = _FORMATS.get(word, (0, 0))

    def generate(context, builder, signature, args):
        if not shift:
            return _I64(0)
        exponent = builder.and_(builder.lshr(args[0], _I16(shift)), _I16(exponents))
        mantissa = builder.and_(args[0], _I16((1 << shift) - 1))
        is_zero = builder.zext(builder.icmp_unsigned("==", mantissa, _I16(0)), _I16)
        return builder.zext(builder.or_(builder.shl(exponent, _I16(1)), is_zero), _I64)

    return types.int64(word), generate


@njit(nogil=True)
def _is_beyond(base, tuned, limit, relative, infinity, zero):
    """Whether one entry is beyond a tolerance; where it is not finite, whether its bits differ."""
    before, after = _value(base), _value(tuned)
    largest = _larger(_magnitude(before), _magnitude(after))
    reach = limit * _from_magnitude(largest) if relative else limit
    beyond = _above(_magnitude(after - before), _magnitude(reach)) != zero
    finite = _above(infinity, largest) != zero
    return beyond if finite else _bits(base) != _bits(tuned)


@njit(nogil=True)
def _flag_beyond(base, tuned, limit, relative, infinity, zero, flags):
    """`_is_beyond` of a block, a byte each."""
    for i in range(base.size):
        flags[i] = np.uint8(_is_beyond(base[i], tuned[i], limit, relative, infinity, zero))


@njit(nogil=True)
def _mark(base, tuned, asked, finite, lane, flags, words):
    """Set the bits of a block in which some words differ; `finite` is whether all of them are."""
    limit, relative, same_bits = asked
    near = finite and not relative
    whole = base.size // _GROUP
    if same_bits:
        for word in range(whole):
            words[word] = _differ_64(base, tuned, word * _GROUP)
    elif near:
        for word in range(whole):
            words[word] = _far_64(base, tuned, word * _GROUP, limit)
    else:
        _flag_beyond(base, tuned, limit, relative, lane[2], lane[0], flags)
        for word in range(whole):
            words[word] = _pack_64(flags, word * _GROUP)
    for i in range(whole * _GROUP, base.size):
        if same_bits:
            found = _bits(base[i]) != _bits(tuned[i])
        else:
            found = _is_beyond(base[i], tuned[i], limit, relative, lane[2], lane[0])
        words[whole] |= np.uint64(found) << np.uint64(i - whole * _GROUP)


@njit(nogil=True)
def _count_one_by_one(words, marked, population, members):
    """Count the strata of a few entries."""
    for i in range(words.size):
        stratum = _stratum(words[i])
        population[stratum] += 1
        members[stratum] += np.int64(marked[i // _GROUP] >> np.uint64(i % _GROUP) & np.uint64(1))


@njit(nogil=True)
def _find_bits(words, places):
    """The places of the bits that are set; gives their number."""
    found = 0
    first, lowest = np.uint64(0), np.uint64(1)
    for position in range(words.size):
        word = words[position]
        more = _popcount(word)
        # Three are written whether they are there or not: mostly there are no more, and a loop
        # whose length no processor can foresee costs more than all the rest.
        places[found] = first + np.uint64(_lowest_bit(word))
        word &= word - lowest
        places[found + 1] = first + np.uint64(_lowest_bit(word))
        word &= word - lowest
        places[found + 2] = first + np.uint64(_lowest_bit(word))
        for place in range(found + 3, found + more):
            word &= word - lowest
            places[place] = first + np.uint64(_lowest_bit(word))
        found += more
        first += np.uint64(_GROUP)
    return found


@njit(nogil=True)
def _count_at(places, words, marked, population, members):
    """Count the strata of the entries at some places."""
    for position in range(places.size):
        place = np.uint64(places[position])
        stratum = _stratum(words[place])
        member = marked[place >> np.uint64(6)] >> (place & np.uint64(63)) & np.uint64(1)
        population[stratum] += 1
        members[stratum] += np.int64(member)


@njit(nogil=True)
def _busiest_window(population):
    """The first of eight exponents that cover most of what has been counted."""
    best, most = 0, population[: 2 * _WINDOW : 2].sum()
    covered = most
    for first in range(1, population.size // 2 - _WINDOW + 1):
        covered += population[2 * (first + _WINDOW - 1)] - population[2 * (first - 1)]
        if covered > most:
            best, most = first, covered
    return best


@njit(nogil=True)
def _count_strata(words, marked, population, members):
    """Count the strata of a run of entries whose bits are `marked`."""
    whole = words.size // _GROUP
    start = 0
    if not population.any():
        start = min(whole, _SAMPLE // _GROUP)
        _count_one_by_one(words[: start * _GROUP], marked, population, members)
    first = _busiest_window(population) if start < whole else 0
    inside, chosen = np.zeros(_WINDOW, np.int64), np.zeros(_WINDOW, np.int64)
    others = np.empty(_SLICED, np.uint64)
    planes = np.empty((1 + _WINDOW_BITS, _SLICED), np.uint64)
    places = np.empty(_SLICED * _GROUP + 3, np.uint64)
    for begin in range(start, whole, _SLICED):
        groups = min(_SLICED, whole - begin)
        for group in range(groups):
            others[group] = _slice_64(
                words, (begin + group) * _GROUP, np.uint8(first), planes, group
            )
        _add_up(planes, planes[0, :groups], inside)
        _add_up(planes, marked[begin : begin + groups], chosen)
        run = slice(begin * _GROUP, (begin + groups) * _GROUP)
        found = _find_bits(others[:groups], places)
        _count_at(places[:found], words[run], marked[begin : begin + groups], population, members)
    for position in range(_WINDOW):
        population[2 * (first + position)] += inside[position]
        members[2 * (first + position)] += chosen[position]
    rest = whole * _GROUP
    _count_one_by_one(words[rest:], marked[whole:], population, members)


@njit(nogil=True)
def _mask_run(base, tuned, asked, limits, relative, lane, counted, found):
    """Count and mark a run of entries of one segment that starts a word of its bits."""
    integers, sums, peaks = counted
    words, population, members = found
    flags = np.empty(BLOCK, np.uint8)
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        before, after = base[start:stop], tuned[start:stop]
        marked = words[start // _GROUP : -(-stop // _GROUP)]
        changed, broken = integers[0], integers[2] + integers[3]
        _compare_block(before, after, limits, relative, lane, integers, sums, peaks)
        if integers[0] != changed:
            finite = integers[2] + integers[3] == broken
            _mark(before, after, asked, finite, lane, flags, marked)
    if population.size:
        _count_strata(base, words, population, members)


@compiled()
def _mask_buffers(base, tuned, bounds, asked, limits, relative, lane, counted, found):
    """Count and mark all segments of two buffers."""
    integers, sums, peaks = counted
    words, starts, population, members = found
    for row in range(bounds.size - 1):
        run = slice(bounds[row], bounds[row + 1])
        _mask_run(
            base[run],
            tuned[run],
            asked,
            limits,
            relative,
            lane,
            (integers[row], sums[row], peaks[row : row + 1]),
            (words[starts[row] : starts[row + 1]], population[row], members[row]),
        )


@compiled()
def _mask_files(files, base, tuned, bounds, asked, limits, relative, lane, counted, found):
    """As `_compare_files`; every segment but the last is whole words of bits."""
    base_file, base_offset, tuned_file, tuned_offset = files
    integers, sums, peaks = counted
    words, starts, population, members = found
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
            first = max(bounds[row], done)
            run = slice(first - done, min(bounds[row + 1], done + count) - done)
            _mask_run(
                base[run],
                tuned[run],
                asked,
                limits,
                relative,
                lane,
                (integers[row], sums[row], peaks[row : row + 1]),
                (
                    words[starts[row] + (first - bounds[row]) // _GROUP : starts[row + 1]],
                    population[row],
                    members[row],
                ),
            )
            if bounds[row + 1] > done + count:
                break
            row += 1
        done += count
    return done


class NumbaMaskKernel:
    """A `FileMaskKernel` for the four floating dtypes that have arithmetic here."""

    def __call__(
        self,
        base: Buffer,
        tuned: Buffer,
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> None:
        """As `MaskKernel`."""
        ask = _Ask(dtype, counters)
        arguments = _arguments(ask, dtype, found)
        _mask_buffers(_words(base, dtype), _words(tuned, dtype), bounds, *arguments)
        ask.settle()

    def mask_files(
        self,
        base: Place,
        tuned: Place,
        scratch: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> bool:
        """As `FileMaskKernel`."""
        words = _WORDS[dtype]
        entries = min(side.view(words).size for side in scratch)
        if entries % _GROUP or (bounds[:-1] % _GROUP).any():
            return False  # a buffer could end in the middle of a word of bits
        ask = _Ask(dtype, counters)
        done = _mask_files(
            (*base, *tuned),
            scratch[0].view(words),
            scratch[1].view(words),
            bounds,
            *_arguments(ask, dtype, found),
        )
        if done != bounds[-1]:
            found.clear()
            return False
        ask.settle()
        return True


def _arguments(ask: _Ask, dtype: str, found: Found) -> tuple[object, ...]:
    """What is asked and where it goes, as the compiled code takes it."""
    limits, relative, lane, integers, sums, peaks = ask.arguments
    asked = found.tolerance
    number = type(_LANES[dtype].nil)
    with np.errstate(over="ignore"):
        limit = number(asked.rtol or asked.atol or 0.0)
    return (
        (limit, asked.rtol is not None, asked.same_bits),
        limits,
        relative,
        lane,
        (integers, sums, peaks),
        (found.words, found.starts, found.population, found.members),
    )
