"""Every mask kernel gives the bits and strata of the definition, for whatever bits there are."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import SAME_BITS, Tolerance
from pytest_subnet.scan.contracts import FileMaskKernel, Place
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.found import STRATA, Found, StrataCounts, merged
from pytest_subnet.scan.mask_kernel import NumbaMaskKernel
from pytest_subnet.scan.masking import mark_bits
from pytest_subnet.scan.numba_kernel import BLOCK
from pytest_subnet.scan.torch_kernel import TorchMaskKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pytest_subnet.scan.contracts import MaskKernel

WORD = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "float64": np.uint64}
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}
TOLERANCES = [
    SAME_BITS,
    *(Tolerance(atol=atol) for atol in (0.0, 1e-45, 1e-5, 2**-9, 1.0, 1e30, 1e300)),
    *(Tolerance(rtol=rtol) for rtol in (0.0, 1e-3, 2**-8, 0.5, 1.0, 2.0)),
]
SIZES = [1, 63, 64, 65, 130, 511, 512, 513, 640, 1000, BLOCK - 1, BLOCK + 65]

thorough = settings(derandomize=True, deadline=None, max_examples=250, database=None)


def remarkable(dtype: str) -> np.ndarray:
    """±0, subnormals, powers of two, the largest, Inf, quiet and signalling NaN; both signs."""
    bits, mantissa = WORD[dtype](0).itemsize * 8, MANTISSA[dtype]
    infinity = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    one = (infinity >> mantissa >> 1) << mantissa
    positive = [0, 1, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, infinity - 1, infinity]
    positive += [infinity + 1, infinity + (1 << (mantissa - 1))]
    return np.array([*positive, *(each | 1 << (bits - 1) for each in positive)], WORD[dtype])


def words_of(dtype: str, size: int, seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw words of base and tuned: of weights, any bits at all, or the remarkable ones."""
    random = np.random.default_rng(seed)
    word = WORD[dtype]
    if kind == "weights":
        values = random.normal(0, 0.02, size)
        if dtype == "bfloat16":
            base = (values.astype(np.float32).view(np.uint32) >> 16).astype(word)
        else:
            base = values.astype(dtype).view(word)
    elif kind == "any":
        base = random.integers(0, np.iinfo(word).max, size, word, endpoint=True)
    else:
        base = random.choice(remarkable(dtype), size)
    other = random.choice(remarkable(dtype), size) if kind == "remarkable" else base ^ word(1)
    strange = base ^ word(1 << (word(0).itemsize * 8 - 1))  # the other sign
    which = random.choice(3, size, p=[0.6, 0.3, 0.1])
    return base, np.choose(which, [base, other, strange]).astype(word)


def floats(words: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return words.view(dtype).astype(np.float32 if dtype == "float16" else np.float64)


def by_hand(
    base: np.ndarray, tuned: np.ndarray, dtype: str, tolerance: Tolerance
) -> tuple[np.ndarray, list[list[int]]]:
    """Flags of the entries that are updated, and `[population, members]` by stratum."""
    before, after = floats(base, dtype), floats(tuned, dtype)
    flags = base != tuned
    if not tolerance.same_bits:
        number = before.dtype.type
        with np.errstate(all="ignore"):
            allowed = (
                number(tolerance.atol)
                if tolerance.rtol is None
                else number(tolerance.rtol) * np.maximum(abs(before), abs(after))
            )
            beyond = abs(after - before) > allowed
        flags = np.where(np.isfinite(before) & np.isfinite(after), beyond, flags)
    size = STRATA.get(dtype, 0)
    strata = [[0] * size, [0] * size]
    if size:
        bits = MANTISSA[dtype]
        for word, flag in zip(base.tolist(), flags.tolist(), strict=True):
            exponent = word >> bits & (size // 2 - 1)
            stratum = 2 * exponent + (word & ((1 << bits) - 1) == 0)
            strata[0][stratum] += 1
            strata[1][stratum] += flag
    return flags, strata


def buffer(words: np.ndarray, shift: int = 0) -> np.ndarray:
    """Their bytes, `shift` bytes after an address that any word may have."""
    room = np.empty(words.nbytes + shift, np.uint8)
    room[shift:] = words.view(np.uint8)
    return room[shift:]


def check(
    found: Found,
    counters: Counters,
    sides: tuple[np.ndarray, np.ndarray],
    dtype: str,
    bounds: np.ndarray,
) -> None:
    tolerance = found.tolerance
    for row, (start, end) in enumerate(pairwise(bounds.tolist())):
        flags, strata = by_hand(sides[0][start:end], sides[1][start:end], dtype, tolerance)
        marked = found.words[found.starts[row] : found.starts[row + 1]].view(np.uint8)
        bits = np.unpackbits(marked, bitorder="little")
        np.testing.assert_array_equal(bits[: end - start], flags)
        assert not bits[end - start :].any(), "padding is zero"
        assert [found.population[row].tolist(), found.members[row].tolist()] == strata
        assert counters.integers[row, 0] == np.count_nonzero(
            sides[0][start:end] != sides[1][start:end]
        )
        if not tolerance.same_bits:
            assert counters.integers[row, -1] == np.count_nonzero(flags)


def bounds_of(size: int, cuts: Sequence[int] = ()) -> np.ndarray:
    return np.array([0, *sorted(cut % (size + 1) for cut in cuts), size], np.int64)


def empty(dtype: str, bounds: np.ndarray, tolerance: Tolerance) -> tuple[Counters, Found]:
    asked = () if tolerance.same_bits else (tolerance,)
    return Counters(bounds.size - 1, asked), Found(bounds, dtype, tolerance)


@pytest.fixture(params=[NumbaMaskKernel, TorchMaskKernel], scope="module")
def kernel(request: pytest.FixtureRequest) -> MaskKernel:
    return request.param()


case = {
    "dtype": st.sampled_from(ARITHMETIC),
    "size": st.sampled_from(SIZES),
    "seed": st.integers(0, 999),
    "kind": st.sampled_from(["weights", "any", "remarkable"]),
    "tolerance": st.sampled_from(TOLERANCES),
}


@thorough
@given(**case, cuts=st.lists(st.integers(0, 5000), max_size=4), shift=st.integers(0, 3))
@example(dtype="bfloat16", size=0, seed=0, kind="any", tolerance=SAME_BITS, cuts=[0], shift=0)
def test_buffers_give_the_bits_and_strata_of_the_definition(
    kernel: MaskKernel,
    dtype: str,
    size: int,
    seed: int,
    kind: str,
    tolerance: Tolerance,
    cuts: list[int],
    shift: int,
) -> None:
    sides = words_of(dtype, size, seed, kind)
    bounds = bounds_of(size, cuts)
    counters, found = empty(dtype, bounds, tolerance)
    kernel(buffer(sides[0], shift), buffer(sides[1]), dtype, bounds, counters, found)
    check(found, counters, sides, dtype, bounds)


@thorough
@given(**case, cuts=st.lists(st.integers(0, 60), max_size=3), scratch=st.sampled_from([64, 192]))
def test_files_give_the_bits_and_strata_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    size: int,
    seed: int,
    kind: str,
    tolerance: Tolerance,
    cuts: list[int],
    scratch: int,
) -> None:
    sides = words_of(dtype, size, seed, kind)
    bounds = bounds_of(size, [64 * cut for cut in cuts if 64 * cut <= size])
    counters, found = empty(dtype, bounds, tolerance)
    directory = tmp_path_factory.getbasetemp()
    nbytes = scratch * DTYPES[dtype].itemsize
    rooms = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    with open(directory / "b", "w+b") as base, open(directory / "t", "w+b") as tuned:
        for file, side, offset in zip((base, tuned), sides, (3, 5), strict=True):
            file.write(b"\x7f" * offset + side.tobytes())
            file.flush()
        places = Place(base.fileno(), 3), Place(tuned.fileno(), 5)
        assert NumbaMaskKernel().mask_files(*places, rooms, dtype, bounds, counters, found)
    check(found, counters, sides, dtype, bounds)


@pytest.mark.parametrize("kept", [0, 100, 1000])
def test_a_file_that_ends_early_leaves_nothing_behind(tmp_path: Path, kept: int) -> None:
    base, tuned = words_of("bfloat16", 1000, 0, "weights")
    bounds = bounds_of(1000)
    counters, found = empty("bfloat16", bounds, SAME_BITS)
    (tmp_path / "b").write_bytes(base.tobytes())
    (tmp_path / "t").write_bytes(tuned.tobytes()[:kept])
    rooms = np.empty(256, np.uint8), np.empty(256, np.uint8)
    with open(tmp_path / "b", "rb") as left, open(tmp_path / "t", "rb") as right:
        places = Place(left.fileno(), 0), Place(right.fileno(), 0)
        assert not NumbaMaskKernel().mask_files(*places, rooms, "bfloat16", bounds, counters, found)
    assert not counters.integers.any()
    assert not any(part.any() for part in (found.words, found.population, found.members))


def test_segments_that_would_end_inside_a_word_are_left_to_buffers() -> None:
    bounds = bounds_of(200, [70])
    counters, found = empty("bfloat16", bounds, SAME_BITS)
    rooms = np.empty(256, np.uint8), np.empty(256, np.uint8)
    assert not NumbaMaskKernel().mask_files(
        Place(-1, 0), Place(-1, 0), rooms, "bfloat16", bounds, counters, found
    )


def test_which_kernels_can_read() -> None:
    assert isinstance(NumbaMaskKernel(), FileMaskKernel)
    assert not isinstance(TorchMaskKernel(), FileMaskKernel)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32", "bool", "complex64"])
def test_dtypes_without_arithmetic_are_marked_by_bits(dtype: str) -> None:
    size, itemsize = 131, DTYPES[dtype].itemsize
    random = np.random.default_rng(0)
    base = random.integers(0, 2, (size, itemsize), np.uint8)
    tuned = base.copy()
    changed = np.sort(random.choice(size, 40, replace=False))
    tuned[changed, random.integers(0, itemsize, 40)] ^= 1
    bounds = bounds_of(size, [67])
    counters, found = empty(dtype, bounds, Tolerance(atol=0.5))
    mark_bits(base.reshape(-1), tuned.reshape(-1), dtype, bounds, counters, found)
    flags = np.zeros(size, np.bool_)
    flags[changed] = True
    for row, (start, end) in enumerate(pairwise(bounds.tolist())):
        marked = found.words[found.starts[row] : found.starts[row + 1]].view(np.uint8)
        bits = np.unpackbits(marked, count=end - start, bitorder="little")
        np.testing.assert_array_equal(bits, flags[start:end])
        assert counters.integers[row, 0] == flags[start:end].sum()


def test_the_number_of_strata_is_that_of_the_exponents() -> None:
    assert STRATA == {"bfloat16": 2 * 2**8, "float16": 2 * 2**5}


def test_counts_of_units_add_up_to_those_of_their_tensors() -> None:
    parts = []
    for seed, rows in enumerate([[0], [0, 1], [1, 3]]):
        sides = words_of("bfloat16", 200, seed, "any")
        bounds = bounds_of(200, [70] * (len(rows) - 1))
        counters, found = empty("bfloat16", bounds, SAME_BITS)
        NumbaMaskKernel()(*map(buffer, sides), "bfloat16", bounds, counters, found)
        parts.append((np.array(rows, np.int64), found))
    expected: Callable[[], np.ndarray] = lambda: np.zeros((4, 512), np.int64)  # noqa: E731
    population, members = expected(), expected()
    for rows, found in parts:
        np.add.at(population, rows, found.population)
        np.add.at(members, rows, found.members)
    total = merged([StrataCounts.of(found, rows) for rows, found in parts])
    assert (np.diff(total.rows) >= 0).all()
    dense = expected(), expected()
    dense[0][total.rows, total.strata] = total.population
    dense[1][total.rows, total.strata] = total.members
    np.testing.assert_array_equal(dense[0], population)
    np.testing.assert_array_equal(dense[1], members)
    assert total.population.all(), "no stratum that does not occur"
    assert merged([]).rows.size == 0
