"""Masks are sets: their operators against numpy, their laws, and what they remember."""

from __future__ import annotations

import math
import operator
import tempfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pytest_subnet import CheckpointError, PairMismatchError, UpdateMask, update_mask
from pytest_subnet.masks import bits
from pytest_subnet.masks.algebra import from_words
from pytest_subnet.masks.bits import TemporaryBits, packed_bytes, popcount, room_for_bits
from pytest_subnet.masks.update_mask import MaskTensor, Origin

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_subnet import ModelPair

quick = settings(derandomize=True, deadline=None, database=None, max_examples=40)
SHAPES = [(), (0,), (1,), (63,), (8, 8), (5, 13), (17, 59)]


@st.composite
def same_tensors(draw: st.DrawFn, masks: int = 3) -> list[dict[str, np.ndarray]]:
    """Entries of a few masks over the same tensors."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    return [
        {f"t{i}": draw(arrays(np.bool_, shape)) for i, shape in enumerate(shapes)}
        for _ in range(masks)
    ]


OPERATORS: dict[Callable, Callable] = {
    operator.and_: np.logical_and,
    operator.or_: np.logical_or,
    operator.sub: lambda one, other: one & ~other,
}


def check(mask: UpdateMask, expected: dict[str, np.ndarray]) -> None:
    assert mask.names() == list(expected)
    for name, entries in expected.items():
        np.testing.assert_array_equal(mask[name], entries)
        assert mask.info(name).entries == np.count_nonzero(entries)
        counted = sum(popcount(words) for words in mask.words(name))
        assert counted == np.count_nonzero(entries), "padding is zero"
    assert mask.count == sum(np.count_nonzero(entries) for entries in expected.values())


@quick
@given(entries=same_tensors(2))
@pytest.mark.parametrize("operate", OPERATORS)
def test_operators_are_those_of_sets(operate: Callable, entries: list[dict]) -> None:
    one, other = map(UpdateMask.of, entries)
    expected = {name: OPERATORS[operate](entries[0][name], entries[1][name]) for name in entries[0]}
    check(operate(one, other), expected)


@quick
@given(entries=same_tensors(1))
def test_the_complement_has_no_padding_in_it(entries: list[dict]) -> None:
    check(~UpdateMask.of(entries[0]), {name: ~array for name, array in entries[0].items()})


@quick
@given(entries=same_tensors(3))
def test_laws_of_sets(entries: list[dict]) -> None:
    a, b, c = map(UpdateMask.of, entries)

    def same(one: UpdateMask, other: UpdateMask) -> bool:
        return all(np.array_equal(one[name], other[name]) for name in one.names())

    assert same(~(a & b), ~a | ~b)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a - b, a & ~b)
    assert same(~~a, a)
    assert (a | b).count == a.count + b.count - (a & b).count


def test_1003_entries_leave_725_and_not_730() -> None:
    entries = np.arange(1003) < 278
    assert (~UpdateMask.of({"t": entries})).count == 725


def test_what_a_combination_remembers() -> None:
    tensors = [MaskTensor("t", (2,), "bfloat16", 1)]

    def mask(word: int, what: str, tolerance: str, base: str) -> UpdateMask:
        words = np.array([word], np.uint64)
        return from_words(
            [tensors[0][:3]], lambda _: iter([words]), Origin(what, tolerance, base, "tuned")
        )

    a, b = mask(1, "a", "same bits", "x"), mask(2, "b", "same bits", "x")
    both = a | b
    assert (both.origin.what, both.origin.tolerance) == ("(a | b)", "same bits")
    assert (both.origin.base, both.origin.tuned) == ("x", "")
    assert both.tensors == (MaskTensor("t", (2,), "bfloat16", 2),)
    other = a & mask(2, "c", "atol=1e-05", "y")
    assert (other.origin.tolerance, other.origin.base) == ("", "")
    assert (~a).origin.base == "x"
    given = UpdateMask.of({"t": [True, False]})
    assert (given & a).info("t").dtype == (a & given).info("t").dtype == "bfloat16"


def test_the_complement_keeps_the_strata(pair: ModelPair) -> None:
    mask = update_mask(pair)
    for name in mask.names():
        known, rest = mask.strata(name), (~mask).strata(name)
        np.testing.assert_array_equal(rest.population, known.population)
        np.testing.assert_array_equal(rest.members, known.population - known.members)
        assert (mask & mask).strata(name) is None


@pytest.fixture
def pair() -> ModelPair:
    import torch

    from pytest_subnet import open_pair

    base = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    return open_pair({"w": base}, {"w": base * (1 + (base > 0))})


def test_names_do_not_grow_without_end() -> None:
    mask = UpdateMask.of({"t": [True]})
    for _ in range(12):
        mask = mask & mask
    assert len(mask.origin.what) <= 201


@pytest.mark.parametrize("operate", OPERATORS)
def test_other_tensors_and_other_shapes_are_errors(operate: Callable) -> None:
    mask = UpdateMask.of({"a": [True], "b\x1b": [[True, False]]}, what="one")
    fewer = UpdateMask.of({"a": [True]}, what="two")
    turned = UpdateMask.of({"a": [True], "b\x1b": [[True], [False]]}, what="three")
    message = (
        "the masks of one and of two cover other tensors: only the first has b\\x1b; "
        "make both from the same model, with the same include, exclude and kinds"
    )
    with pytest.raises(PairMismatchError) as failed:
        operate(mask, fewer)
    assert str(failed.value) == message
    with pytest.raises(PairMismatchError, match=r"only the second has b\\x1b"):
        operate(fewer, mask)
    with pytest.raises(PairMismatchError) as failed:
        operate(mask, turned)
    assert str(failed.value) == (
        "the masks of one and of three differ in shape: b\\x1b is [1, 2] in the first and "
        "[2, 1] in the second; make both from the same model, with the same include, exclude "
        "and kinds"
    )
    with pytest.raises(TypeError):
        operate(mask, {"a": [True]})


def test_a_mask_of_nothing_has_no_density() -> None:
    mask = UpdateMask.of({"t": np.empty((0, 3), bool)})
    assert (mask.count, mask.numel) == (0, 0)
    assert math.isnan(mask.density)
    assert math.isnan(mask.info("t").density)
    assert (~mask).count == 0
    full = ~UpdateMask.of({"t": np.zeros(70, bool)})
    assert (full.count, full.density, (~full).count) == (70, 1.0, 0)


@pytest.mark.parametrize("wrong", [[0.5, 1.0], [2, 0], [float("nan")], [-1]])
def test_entries_that_are_no_flags_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^the entries of w are not all 0 or 1; compare them"):
        UpdateMask.of({"w": wrong})


def test_zeros_and_ones_are_flags() -> None:
    assert UpdateMask.of({"w": [0.0, 1.0], "v": [1, 0]}).count == 2


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every mask on disk."""
    monkeypatch.setattr(bits, "_LARGEST_IN_MEMORY", -1)


@pytest.mark.usefixtures("on_disk")
def test_on_disk_it_is_all_the_same(pair: ModelPair) -> None:
    mask = update_mask(pair)
    assert isinstance(mask._store, TemporaryBits)
    flags = mask["w"]
    check(~mask, {"w": ~flags})
    check(mask | ~mask, {"w": np.ones_like(flags)})


def test_large_masks_are_on_disk_and_small_ones_in_memory() -> None:
    assert not isinstance(room_for_bits(1 << 20), TemporaryBits)
    large = room_for_bits(1 << 33)  # a hole: nothing is written
    assert isinstance(large, TemporaryBits)
    large.write(1 << 32, np.full(8, 255, np.uint8))
    assert large.read((1 << 32) - 8, 16).tolist() == [0] * 8 + [255] * 8


def test_bits_are_looked_at_a_piece_at_a_time() -> None:
    """Of 8 B entries never more than 1 MB at once, whatever is done with them."""
    numel = 8_000_000_000
    tensor = MaskTensor("t", (numel,), "bool", 0)

    class Huge:
        nbytes = packed_bytes(numel)
        most = asked = 0

        def read(self, start: int, nbytes: int) -> np.ndarray:
            assert 0 <= start <= start + nbytes <= self.nbytes
            self.most, self.asked = max(self.most, nbytes), self.asked + nbytes
            return zeros[:nbytes]

    zeros = np.zeros(1 << 20, np.uint8)
    store = Huge()
    mask = UpdateMask([tensor], store, Origin("huge"))
    assert sum(words.size for words in mask.words("t")) * 8 == store.asked == 1_000_000_000
    assert store.most == 1 << 20


def test_no_room_for_a_mask_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def close(self) -> None: ...

        def truncate(self, _: int) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch")
    with pytest.raises(CheckpointError) as failed:
        room_for_bits(1 << 30)
    assert str(failed.value) == (
        "cannot keep 1.07 GB of a mask in /scratch: No space left on device; free the space, or "
        "name another directory in TMPDIR"
    )


def test_bits_that_cannot_be_read_back_are_an_error() -> None:
    store = TemporaryBits(64)
    store._file.truncate(8)
    with pytest.raises(CheckpointError, match=r"cannot read a mask back from .*: it ends early"):
        store.read(0, 64)
