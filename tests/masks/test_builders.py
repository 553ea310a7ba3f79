"""Masks to compare with: the largest weights, the principal ones, and those drawn at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    CheckpointError,
    SelectionError,
    UpdateMask,
    magnitude_mask,
    open_checkpoint,
    open_pair,
    principal_mask,
    random_mask_like,
    update_mask,
)
from pytest_subnet.masks import builders
from pytest_subnet.masks.update_mask import MaskTensor, Origin

quick = settings(derandomize=True, deadline=None, database=None, max_examples=60)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random, dtype=torch.float64) * 0.02).to(dtype)


def largest_by_sorting(magnitudes: np.ndarray, count: int, sign: int = -1) -> np.ndarray:
    """Flags of the first `count` in a stable sort."""
    flags = np.zeros(magnitudes.size, bool)
    flags[np.argsort(sign * magnitudes.reshape(-1), kind="stable")[:count]] = True
    return flags.reshape(magnitudes.shape)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_are_those_of_a_stable_sort(
    dtype: torch.dtype, fraction: float, largest: bool
) -> None:
    tensors = {"a": weights((31, 17), dtype), "b": weights((4, 3, 5), dtype, 1)}
    tensors["a"][3] = tensors["a"][5].neg()  # ties, of either sign
    tensors["a"][7] = 0.0
    mask = magnitude_mask(tensors, fraction, largest=largest)
    for name, tensor in tensors.items():
        count = round(fraction * tensor.numel())
        expected = largest_by_sorting(
            tensor.double().abs().numpy(), count, sign=-1 if largest else 1
        )
        np.testing.assert_array_equal(mask[name], expected)
        assert mask.info(name).entries == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_the_largest_and_nan_an_error(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -float("inf"), 3.0, 2.0]]).to(dtype)
    assert magnitude_mask({"w": tensor}, 0.25)["w"].tolist() == [[False, True, False, False]]
    assert magnitude_mask({"w": tensor}, 0.5)["w"].tolist() == [[False, True, True, False]]
    tensor[0, 3] = float("nan")
    for largest in (True, False):
        with pytest.raises(CheckpointError) as failed:
            magnitude_mask({"w\x1b": tensor}, 0.25, largest=largest)
        assert str(failed.value) == (
            f"w\\x1b of {open_checkpoint({'w': tensor}).label} holds NaN, which is neither large "
            "nor small; save the checkpoint without it"
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strata_are_those_of_an_update_mask_of_the_same_entries(dtype: torch.dtype) -> None:
    base = {"w": weights((40, 50), dtype)}
    mask = magnitude_mask(base, 0.2)
    touched = torch.where(torch.from_numpy(mask["w"]), base["w"] * 2, base["w"])
    update = update_mask(open_pair(base, {"w": touched}))
    np.testing.assert_array_equal(update["w"], mask["w"])
    assert (mask.strata("w") is None) == (dtype.itemsize > 2)
    for one, other in zip(mask.strata("w") or (), update.strata("w") or (), strict=True):
        np.testing.assert_array_equal(one, other)
    assert mask.origin.base == update.origin.base == open_checkpoint(base).fingerprint()
    assert (mask.origin.tuned, mask.origin.tolerance) == ("", "")


def test_strata_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": weights((40, 50), torch.bfloat16)}
    whole = magnitude_mask(base, 0.3).strata("w")
    monkeypatch.setattr(builders, "_DRAWN", 192)
    for one, other in zip(whole, magnitude_mask(base, 0.3).strata("w"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_weights_of_two_dimensions_and_tied_ones_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8, bias=True)
            self.head.weight = self.embed.weight
            self.register_buffer("table", torch.ones(3, 3))
            self.steps = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int64), False)

    assert magnitude_mask(Tied(), 0.5).names() == ["embed.weight"]


def test_what_it_was_made_from_is_said() -> None:
    mask = magnitude_mask({"w": weights((4, 5), torch.float32)}, 0.1, largest=False)
    assert mask.origin.what.startswith("the smallest 0.1 of ")
    principal = principal_mask({"w": weights((4, 5), torch.float32)}, 0.25, rank=2)
    assert principal.origin.what.startswith("the principal 0.25 (rank 2) of ")


@pytest.mark.parametrize("build", [magnitude_mask, lambda c, f: principal_mask(c, f, rank=2)])
def test_what_cannot_be_built_is_an_error(build: object) -> None:
    matrix = {"w": torch.ones(2, 2)}
    for fraction in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"is not between 0 and 1, both excluded"):
            build(matrix, fraction)
    with pytest.raises(SelectionError, match="has no weight of two or more dimensions to choose"):
        build({"norm": torch.ones(3)}, 0.5)
    with pytest.raises(CheckpointError, match=r"is float8_e4m3fn, whose entries mean nothing with"):
        build({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, 0.5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_without_singular_values_is_an_error(dtype: torch.dtype, broken: float) -> None:
    tensor = weights((5, 6), dtype)
    tensor[2, 3] = broken
    with pytest.raises(CheckpointError, match=r"^w\\x1b of .* holds NaN or Inf, and has no sing"):
        principal_mask({"w\x1b": tensor}, 0.5, rank=1)


def exact(matrix: torch.Tensor, rank: int) -> np.ndarray:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).abs().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_principal_entries_are_those_of_the_exact_svd(dtype: torch.dtype, rank: int) -> None:
    """A spectrum with a gap, where the leading directions are certain."""
    random = torch.Generator().manual_seed(rank)
    left = torch.randn(90, rank, generator=random, dtype=torch.float64)
    right = torch.randn(rank, 60, generator=random, dtype=torch.float64)
    matrix = (left @ right + 0.01 * weights((90, 60), torch.float64)).to(dtype)
    mask = principal_mask({"w": matrix}, 0.2, rank=rank)["w"]
    expected = largest_by_sorting(exact(matrix, rank), round(0.2 * matrix.numel()))
    assert (mask == expected).mean() > 0.998


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / other.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank"), [((128, 512), 16), ((200, 200), 8), ((300, 200), 1)])
def test_principal_entries_without_a_gap_are_those_of_the_exact_svd(
    shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    """Noise: the singular values around the rank differ by a percent or less."""
    matrix = weights(shape, dtype)
    masks = [principal_mask({"w": matrix}, 0.1, rank=rank, seed=seed)["w"] for seed in range(2)]
    np.testing.assert_array_equal(*masks)
    expected = largest_by_sorting(exact(matrix, rank), masks[0].sum())
    assert agreement(masks[0], expected) > 0.999


def test_outliers_do_not_hide_the_directions_behind_them() -> None:
    """Squares of singular values a thousand times apart: too far for a float32 Gram matrix."""
    matrix = weights((150, 150), torch.float32)
    matrix[:, 0] = 20.0
    mask = principal_mask({"w": matrix}, 0.3, rank=12)["w"]
    assert agreement(mask, largest_by_sorting(exact(matrix, 12), mask.sum())) > 0.999


@pytest.mark.parametrize(("shape", "rank"), [((128, 512), 16), ((512, 128), 16), ((300, 200), 1)])
def test_large_matrices_are_iterated_until_they_settle(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    monkeypatch.setattr(builders, "_LARGEST_EXACT", 8)
    matrix = weights(shape, torch.float32)
    expected = largest_by_sorting(exact(matrix, rank), round(0.1 * matrix.numel()))
    masks = [principal_mask({"w": matrix}, 0.1, rank=rank, seed=seed)["w"] for seed in range(2)]
    assert agreement(*masks) > 0.98
    assert all(agreement(mask, expected) > 0.98 for mask in masks)


def test_a_rank_that_covers_the_matrix_leaves_its_magnitudes() -> None:
    tensors = {"w": weights((6, 9), torch.bfloat16), "c": weights((4, 2, 2), torch.float64)}
    principal, magnitude = principal_mask(tensors, 0.3, rank=6), magnitude_mask(tensors, 0.3)
    for name in tensors:
        np.testing.assert_array_equal(principal[name], magnitude[name])


def test_a_mask_depends_on_its_seed_alone() -> None:
    tensors = {name: weights((64, 48), torch.bfloat16, i) for i, name in enumerate("ab")}
    first, again = (principal_mask(tensors, 0.3, rank=4) for _ in range(2))
    alone = principal_mask({"b": tensors["b"]}, 0.3, rank=4)
    np.testing.assert_array_equal(first["b"], again["b"])
    np.testing.assert_array_equal(first["b"], alone["b"])
    with pytest.raises(ValueError, match=r"^rank=0 is not a whole number of at least 1$"):
        principal_mask(tensors, 0.3, rank=0)
    with pytest.raises(ValueError, match=r"^seed=-1 is not a whole number of at least 0"):
        principal_mask(tensors, 0.3, rank=1, seed=-1)


def like(counts: dict[str, tuple[int, int]]) -> UpdateMask:
    return UpdateMask.of({name: np.arange(size) < k for name, (size, k) in counts.items()})


@quick
@given(
    counts=st.dictionaries(
        st.text(max_size=4),
        st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**70),
)
def test_counts_are_exact_in_every_tensor(counts: dict[str, tuple[int, int]], seed: int) -> None:
    given_mask = like(counts)
    drawn = random_mask_like(given_mask, seed=seed)
    assert drawn.tensors == given_mask.tensors
    assert [int(drawn[name].sum()) for name in counts] == [k for _, k in counts.values()]
    again = random_mask_like(given_mask, seed=seed)
    for name in counts:
        np.testing.assert_array_equal(drawn[name], again[name])


def test_a_tensor_is_drawn_for_itself_alone() -> None:
    both = random_mask_like(like({"a": (500, 40), "b": (300, 30)}), seed=3)
    alone = random_mask_like(like({"b": (300, 30)}), seed=3)
    np.testing.assert_array_equal(both["b"], alone["b"])
    other = random_mask_like(like({"b": (300, 30)}), seed=4)
    assert (both["b"] != other["b"]).any()
    renamed = random_mask_like(like({"c": (300, 30)}), seed=3)
    assert (both["b"] != renamed["c"]).any()


def test_every_set_of_so_many_is_equally_likely() -> None:
    """Chi-square over all 10 pairs of 5 entries: 9 degrees of freedom, p = 1e-4 at 33.7."""
    seen = np.zeros(32)
    mask = like({"w": (5, 2)})
    for seed in range(2000):
        seen[np.packbits(random_mask_like(mask, seed=seed)["w"], bitorder="little")[0]] += 1
    seen = seen[seen > 0]
    assert seen.size == 10
    assert ((seen - 200) ** 2 / 200).sum() < 33.7


def test_entries_are_drawn_evenly_and_apart_from_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over many pieces: means, variances and overlaps are those of the hypergeometric law."""
    monkeypatch.setattr(builders, "_DRAWN", 1024)
    numel, count = 20_000, 3_000
    mask = like({"w": (numel, count)})
    drawn = np.array([random_mask_like(mask, seed=seed)["w"] for seed in range(60)])
    halves = drawn[:, : numel // 2].sum(axis=1)
    density = count / numel
    deviation = np.sqrt(count * (1 - density) / 4)
    assert abs(halves.mean() - count / 2) < 4 * deviation / np.sqrt(60)
    assert 0.7 < halves.std() / deviation < 1.35
    overlaps = [(one & other).sum() for one, other in zip(drawn[::2], drawn[1::2], strict=True)]
    assert abs(np.mean(overlaps) / (numel * density**2) - 1) < 0.05


def test_a_huge_tensor_is_drawn_in_pieces() -> None:
    """Its bits come in runs of 1 M entries; none of them is asked of the mask it is like."""

    class Untouched:
        nbytes = 1 << 40

        def read(self, start: int, nbytes: int) -> np.ndarray:
            raise AssertionError("bits were read")

    numel = (1 << 22) + 77
    tensor = MaskTensor("w", (numel,), "bfloat16", 12_345)
    drawn = random_mask_like(UpdateMask([tensor], Untouched(), Origin("given")), seed=0)
    assert drawn.tensors == (tensor,)
    assert drawn.origin.what == "random like given (seed 0)"
    assert drawn.origin.base == ""


def test_a_seed_that_is_no_seed_is_refused() -> None:
    mask = like({"w": (4, 2)})
    with pytest.raises(ValueError, match=r"^seed=-1 is not a whole number of at least 0"):
        random_mask_like(mask, seed=-1)


@pytest.mark.parametrize("wrong", [None, "2", 1.5, True, torch.tensor(2)])
def test_seeds_and_ranks_are_whole_numbers(wrong: object) -> None:
    matrix = {"w": weights((4, 5), torch.float32)}
    for name, build in (
        ("seed", lambda: random_mask_like(like({"w": (4, 2)}), seed=wrong)),
        ("seed", lambda: principal_mask(matrix, 0.5, rank=1, seed=wrong)),
        ("rank", lambda: principal_mask(matrix, 0.5, rank=wrong)),
    ):
        with pytest.raises(TypeError) as failed:
            build()
        least = 1 if name == "rank" else 0
        assert str(failed.value) == (
            f"{name}={wrong!r} is not a whole number; pass one of at least {least}, as in "
            f"{name}={least}"
        )


def test_a_numpy_integer_is_a_whole_number() -> None:
    mask = like({"w": (400, 20)})
    one, other = (random_mask_like(mask, seed=kind(7)) for kind in (int, np.int64))
    np.testing.assert_array_equal(one["w"], other["w"])


@pytest.mark.parametrize("wrong", ["0.5", None, torch.tensor(0.5), True])
def test_a_fraction_is_a_number(wrong: object) -> None:
    for build in (magnitude_mask, lambda c, f: principal_mask(c, f, rank=1)):
        with pytest.raises(TypeError) as failed:
            build({"w": torch.ones(2, 2)}, wrong)
        assert str(failed.value) == (
            f"fraction={wrong!r} is not a number; pass the share of each matrix's entries, as in "
            "0.1"
        )


def test_a_fraction_that_chooses_nothing_is_refused() -> None:
    tensors = {"small": weights((2, 3), torch.float32), "w\x1b": weights((40, 50), torch.float32)}
    for build in (magnitude_mask, lambda c, f: principal_mask(c, f, rank=1)):
        with pytest.raises(SelectionError) as failed:
            build(tensors, 0.5 / 2000)
        assert str(failed.value) == (
            f"fraction=0.00025 chooses no entry of {open_checkpoint(tensors).label}: its largest "
            "matrix, w\\x1b, has 2,000; pass more than 0.5 / 2000"
        )
        assert build(tensors, 0.5001 / 2000).count == 1


@pytest.mark.parametrize("wrong", ["mask.safetensors", {"w": [True]}, None])
def test_what_is_no_mask_cannot_be_drawn_like(wrong: object) -> None:
    with pytest.raises(TypeError) as failed:
        random_mask_like(wrong, seed=0)
    assert str(failed.value) == (
        f"mask is an UpdateMask, not {type(wrong).__name__}; pass UpdateMask.load(path) of a file, "
        "or update_mask(pair) of a pair"
    )
