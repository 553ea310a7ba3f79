"""`update_rank`: ranks, stable, resolved and effective ranks, and what it refuses."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from pytest_subnet import (
    CheckpointError,
    PairMismatchError,
    SelectionError,
    SubnetError,
    open_pair,
    record_update,
    update_rank,
)
from pytest_subnet.findings.matrices import spectra
from pytest_subnet.findings.matrices import updates as update_matrices

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOCS = Path(__file__).parents[2] / "docs" / "findings"
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rank, shape, seed=1):
    """Of the given rank, with entries of about 1."""
    left, right = random(shape[0], rank, seed=seed), random(rank, shape[1], seed=seed + 1)
    return left @ right / rank**0.5


def moved(update, dtype=torch.float32, size=0.02):
    """A pair whose base is normal and which moved by `update`, stored in `dtype`."""
    weight = (random(*update.shape, seed=9) * size).to(dtype)
    return open_pair({"w.weight": weight}, {"w.weight": (weight.float() + update).to(dtype)})


def only(pair, **options):
    (row,) = update_rank(pair, **options).per_tensor
    return row


# The rank


@pytest.mark.parametrize("shape", [(64, 64), (24, 90), (90, 24), (1, 50), (50, 1), (300, 320)])
@pytest.mark.parametrize("rank", [1, 5, 10_000])
def test_a_planted_rank_is_found(shape, rank):
    rank = min(rank, *shape)
    row = only(moved(low_rank(rank, shape) * 1e-3, size=0.0))
    assert (row.rank, row.max_rank, row.shape, row.numel) == (rank, min(shape), shape, row.numel)
    assert row.ratio == rank / min(shape)


@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64])
def test_it_is_the_rank_that_torch_and_the_papers_script_find(dtype, through_gram, monkeypatch):
    monkeypatch.setattr(spectra, "SMALL", 0 if through_gram else 256)
    weight = (random(200, 120) * 0.02).to(dtype)
    update = low_rank(3, (200, 120)) * 1e-4 + random(200, 120, seed=5) * 2e-6
    tuned = (weight.double() + update.double()).to(dtype)
    row = only(open_pair({"w.weight": weight}, {"w.weight": tuned}))
    assert row.rank == int(torch.linalg.matrix_rank((tuned - weight).float()))
    values = np.linalg.svd((tuned.double() - weight.double()).numpy(), compute_uv=False)
    assert row.largest == pytest.approx(values[0], rel=1e-6)
    assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)


@pytest.mark.parametrize("off", [0.99, 1.01])
def test_the_tolerance_is_that_of_the_whole_matrix_also_where_rows_are_zero(off):
    """Rows of zeros are dropped before counting, and still widen the tolerance."""
    limit = 4096 * 2.0**-23
    update = torch.zeros(4096, 8, dtype=torch.float64)
    update[0, 0], update[1, 1], update[2, 2] = 1.0, 0.5, limit * off
    base = torch.zeros(4096, 8, dtype=torch.float64)
    assert only(open_pair({"w.weight": base}, {"w.weight": update})).rank == 2 + (off > 1)


@pytest.mark.parametrize("through_gram", [False, True])
def test_the_stable_rank_of_noise_is_as_theory_has_it(through_gram, monkeypatch):
    monkeypatch.setattr(spectra, "SMALL", 0 if through_gram else 256)
    row = only(moved(random(150, 250) * 1e-3))
    expected = 150 * 250 / (math.sqrt(150) + math.sqrt(250)) ** 2
    assert row.stable_rank == pytest.approx(expected, rel=0.08)


def test_a_matrix_that_did_not_move_has_rank_zero():
    base = {"w.weight": random(8, 9), "v.weight": random(9, 8)}
    tuned = {"w.weight": base["w.weight"] + 1, "v.weight": base["v.weight"].clone()}
    result = update_rank(open_pair(base, tuned))
    assert [(each.rank, each.stable_rank) for each in result.per_tensor] == [
        (result.per_tensor[0].rank, result.per_tensor[0].stable_rank),
        (0, 0.0),
    ]
    assert not result.nothing_moved
    same = {name: each.clone() for name, each in base.items()}
    assert update_rank(open_pair(base, same)).nothing_moved


def test_the_effective_rank_is_known_on_request():
    update = torch.zeros(20, 30)
    update[range(5), range(5)] = 0.25
    pair = moved(update, size=0.0)
    assert only(pair).effective_rank is None
    assert only(pair, effective=True).effective_rank == pytest.approx(5)
    assert only(pair).effective_rank is None


def test_the_mean_counts_each_matrix_once_however_large():
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(100, 100)}
    tuned = {"a.weight": torch.eye(4), "b.weight": torch.zeros(100, 100)}
    tuned["b.weight"][0] = 1
    result = update_rank(open_pair(base, tuned))
    assert result.ratio == (1 + 0.01) / 2
    assert (result.rank, result.max_rank, result.numel) == (5, 104, 10_016)
    assert result.stable_rank == pytest.approx((4 + 1) / 2)


# Rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_is_made_of_the_gaps_above_the_larger_side(dtype):
    base, tuned = (random(40, 50, seed=seed).to(dtype) for seed in (1, 2))
    base[0, 0], tuned[0, 0] = 0.0, -0.0
    larger = torch.maximum(base.abs(), tuned.abs())
    next_up = (larger.view(torch.int16) + 1).view(dtype)
    gaps = next_up.double() - larger.double()
    assert torch.equal(update_matrices._gaps(base, tuned), gaps)
    row = only(open_pair({"w.weight": base}, {"w.weight": tuned}))
    by_row, by_column = (float(gaps.square().sum(dim=dim).max()) for dim in (1, 0))
    expected = (by_row**0.5 + by_column**0.5) / 12**0.5
    assert row.floor == pytest.approx(expected, rel=1e-12)


def test_the_gap_of_subnormals_is_that_of_the_smallest_normal():
    tiny = torch.tensor([[0.0, 1.0], [5.0, 100.0]]) * 2.0**-133
    gaps = update_matrices._gaps(tiny.bfloat16(), tiny.bfloat16())
    assert gaps.tolist() == [[2.0**-133] * 2] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_even_gaps_the_floor_is_that_of_noise_of_one_size(dtype):
    base = torch.full((40, 50), 0.75).to(dtype)
    row = only(open_pair({"w.weight": base}, {"w.weight": base * -1}))
    gap = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert row.floor == pytest.approx((40**0.5 + 50**0.5) * gap / 12**0.5, rel=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_other_sizes_do_not_hide_their_rounding(transposed):
    """Of rank 1, its entries in proportion to weights of which some rows are 1,000 times larger."""
    scale = torch.ones(400, 1)
    scale[:20] = 1000
    base = (random(400, 400) * 0.02 * scale).bfloat16()
    tuned = (base.float() + low_rank(1, (400, 400)) * 1e-3 * scale).bfloat16()
    if transposed:
        base, tuned = base.T.contiguous(), tuned.T.contiguous()
    row = only(open_pair({"w.weight": base}, {"w.weight": tuned}))
    assert (row.rank, row.resolved_rank) == (20, 1)


def test_the_floor_is_never_below_the_noise_that_storing_makes():
    """With gaps of any size in any place; twice the floor is what must not be exceeded."""
    for seed in range(4):
        sizes = torch.exp2(random(90, 1, seed=seed) * 3) * torch.exp2(random(1, 60, seed=9) * 3)
        exact = random(90, 60, seed=seed + 20).double() * sizes
        stored = exact.bfloat16()
        row = only(open_pair({"w.weight": stored}, {"w.weight": stored * -1}))
        noise = float(torch.linalg.matrix_norm(stored.double() - exact, 2))
        assert 0.3 * row.floor < noise < 1.1 * row.floor


@pytest.mark.parametrize(("stored", "compared"), [(0, "float16"), (1, "bfloat16")])
def test_a_cast_to_another_16_bit_dtype_keeps_the_wider_of_both_gaps(stored, compared):
    size = 0.02 if stored == 0 else 1e-3  # float16 is the coarser one of tiny weights
    scale = 1e-5 if stored == 0 else 1e-7
    base = {"w.weight": (random(64, 64) * size).to(DTYPES[stored])}
    tuned = {"w.weight": (base["w.weight"].float() + random(64, 64, seed=3) * scale)}
    tuned = {"w.weight": tuned["w.weight"].to(DTYPES[stored])}
    as_stored = only(open_pair(base, tuned))
    cast = only(open_pair(base, tuned, as_dtype=compared))
    assert cast.dtype == compared
    assert cast.floor >= as_stored.floor
    assert (as_stored.resolved_rank, cast.resolved_rank) == (0, 0)
    sides = base["w.weight"], tuned["w.weight"]
    gaps = [update_matrices._gaps(*(side.to(dtype) for side in sides)) for dtype in DTYPES]
    squares = torch.maximum(*gaps).square()
    by_row, by_column = (float(squares.sum(dim=dim).max()) for dim in (1, 0))
    assert cast.floor == pytest.approx((by_row**0.5 + by_column**0.5) / 12**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("rank", "rms", "resolved"),
    [
        (1, 1e-6, 0),
        (1, 1e-5, 0),
        (1, 1e-4, 1),
        (1, 1e-3, 1),
        (8, 1e-5, 0),
        (8, 1e-4, 8),
        (8, 1e-3, 8),
    ],
)
def test_a_dense_update_of_low_rank_stored_in_bfloat16_looks_full_and_is_resolved(
    rank, rms, resolved
):
    """The table of docs/findings/rank.md, at 512 x 512."""
    row = only(moved(low_rank(rank, (512, 512)) * rms, torch.bfloat16))
    assert row.ratio > (0.75 if rank == 1 else 0.95)
    assert row.resolved_rank == resolved
    assert row.explained_by_rounding


@pytest.mark.parametrize(("rms", "resolved"), [(1e-6, 0), (1e-5, 0)])
def test_noise_below_the_resolution_is_not_resolved(rms, resolved):
    row = only(moved(random(512, 512) * rms, torch.bfloat16))
    assert row.ratio > 0.95
    assert row.resolved_rank == resolved


def test_an_update_far_above_rounding_is_resolved_and_never_beyond_its_rank():
    row = only(moved(low_rank(40, (100, 90)) * 10.0, torch.bfloat16, size=1e-6))
    assert row.resolved_rank <= row.rank
    row = only(moved(random(60, 50), torch.bfloat16, size=1e-3))
    assert row.resolved_rank == row.rank == 50
    assert not row.explained_by_rounding


def test_float32_is_not_rounded_and_has_no_resolved_rank():
    result = update_rank(moved(low_rank(2, (30, 40)) * 1e-3))
    assert (result.resolved_rank, result.resolved_ratio, result.explained_by_rounding) == (
        None,
        None,
        False,
    )
    assert result.per_tensor[0].floor is None


def test_without_the_null_nothing_is_resolved():
    pair = moved(random(64, 64) * 1e-5, torch.bfloat16)
    bare = update_rank(pair, null=None)
    assert (bare.null, bare.resolved_rank, bare.explained_by_rounding) == (None, None, False)
    held = update_rank(pair)
    assert (held.null, held.resolved_rank, held.explained_by_rounding) == ("rounding", 0, True)
    assert bare.ratio == held.ratio


def test_matrices_that_are_not_rounded_count_with_their_rank():
    base = {"a.weight": torch.zeros(4, 4), "b.weight": random(64, 64).bfloat16()}
    tuned = {"a.weight": torch.eye(4)}
    tuned["b.weight"] = (base["b.weight"].float() + random(64, 64, seed=4) * 1e-4).bfloat16()
    result = update_rank(open_pair(base, tuned))
    assert [each.resolved_rank for each in result.per_tensor] == [None, 0]
    assert (result.resolved_rank, result.resolved_ratio) == (4, 0.5)


# How it reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_rows_make_the_whole(dtype, monkeypatch):
    pair = moved(random(50, 30) * 1e-3, dtype)
    whole = only(pair)
    monkeypatch.setattr(update_matrices, "_ENTRIES", 100)
    monkeypatch.setattr(update_matrices, "_WIDE", 70)
    assert only(pair)._replace(floor=0) == whole._replace(floor=0)
    assert only(pair).floor == pytest.approx(whole.floor)


def test_files_are_read_once_and_what_is_known_is_not_ranked_again(pair_of, base, tuned):
    tuned[UP] += random(4, 8).bfloat16()
    pair = pair_of(base, tuned)
    first = update_rank(pair)
    reads = []
    read = pair.base.read
    pair.base.read = lambda name, rows=None: reads.append(name) or read(name, rows)
    assert update_rank(pair) == first
    assert update_rank(pair, include="*up_proj*").rank == 4
    assert update_rank(pair, null=None).ratio == first.ratio
    assert reads == []
    update_rank(pair, include="*up_proj*", effective=True)
    assert reads == [UP]


def test_weights_that_someone_else_holds_are_ranked_again():
    base, tuned = {"w.weight": torch.zeros(8, 8)}, {"w.weight": torch.eye(8)}
    pair = open_pair(base, tuned)
    assert update_rank(pair).rank == 8
    tuned["w.weight"].data[4:] = 0
    assert update_rank(pair).rank == 4


def test_a_recorded_update_is_ranked_until_the_model_moves_on():
    model = torch.nn.Linear(6, 5, bias=False)
    with record_update(model) as update:
        model.weight.data[:2] += 1
    assert update_rank(update).rank == 1
    with torch.no_grad():
        model.weight[3, 3] += 1
    with pytest.raises(CheckpointError, match="has changed since the recorded block ended"):
        update_rank(update, effective=True)


def test_a_cast_side_is_ranked_in_the_dtype_compared():
    weight, update = random(40, 40) * 0.02, random(40, 40, seed=3) * 1e-3
    base, tuned = {"w.weight": weight.bfloat16()}, {"w.weight": weight.bfloat16() + update}
    row = only(open_pair(base, tuned, as_dtype="bfloat16"))
    stored = tuned["w.weight"].bfloat16().float() - base["w.weight"].float()
    assert row.dtype == "bfloat16"
    assert row.largest == pytest.approx(float(torch.linalg.matrix_norm(stored, 2)), rel=1e-6)


def test_of_a_resized_vocabulary_the_common_rows_are_ranked(pair_of):
    base, tuned = random(10, 4), random(12, 4, seed=2)
    pair = pair_of(
        {"model.embed_tokens.weight": base},
        {"model.embed_tokens.weight": tuned},
        vocab="common",
    )
    row = only(pair)
    assert row.shape == (10, 4)
    assert row.largest == pytest.approx(float(torch.linalg.matrix_norm(tuned[:10] - base, 2)))


def test_a_device_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    pair = open_pair({"w.weight": torch.zeros(2, 2)}, {"w.weight": torch.eye(2)}, device="cuda")
    with pytest.raises(SubnetError, match="there is no device cuda"):
        update_rank(pair)
    assert update_rank(
        open_pair({"w.weight": torch.zeros(2, 2)}, {"w.weight": torch.eye(2)}, device="cpu")
    ).rank


# Selection


def test_tensors_that_are_no_matrices_are_left_out_and_counted():
    shapes = {"w.weight": (4, 4), "conv2d": (8, 4, 3, 3), "conv1d": (8, 1, 3), "norm": (4,)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = {name: each + 1 for name, each in base.items()}
    result = update_rank(open_pair(base, tuned))
    assert [each.name for each in result.per_tensor] == ["w.weight"]
    assert result.matrices_total == 1
    assert result.notes == (
        "2 tensors left out (convolutions, no matrices), 312 entries: 93.98% of the "
        "selected weights",
    )
    assert update_rank(open_pair(base, tuned), exclude="conv*").notes == ()
    with pytest.raises(SelectionError, match="none of 3 selected tensors is a weight of two dim"):
        update_rank(open_pair(base, tuned), exclude="w.weight")


@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("moe.input_linear.weight", (4, 8, 4), 4),
        ("moe.input_linear.weight", (5, 8, 4), 0),
        ("mlp.experts.gate_up_proj", (9, 8, 4), 9),
        ("mixer.conv1d.weight", (16, 1, 4), 0),
        ("experts", (4, 2, 3, 3), 0),
    ],
)
def test_what_is_a_stack(name, shape, matrices):
    base = {"w.weight": torch.zeros(4, 4), name: torch.zeros(shape)}
    result = update_rank(open_pair(base, {key: each + 1 for key, each in base.items()}))
    assert (len(result.per_tensor), result.matrices_total) == (1 + matrices, 1 + matrices)
    assert bool(result.notes) == (not matrices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_matrix_of_a_stack_is_ranked_by_itself(pair_of, dtype):
    name = "model.layers.3.mlp.experts.down_proj"
    shapes = [(5, 12, 9), (12, 9)]
    base = {key: random(*shape) for key, shape in zip((name, "w.weight"), shapes, strict=True)}
    base = {key: each.to(dtype) for key, each in base.items()}
    tuned = {key: each.clone() for key, each in base.items()}
    for index in range(5):
        tuned[name][index] += (low_rank(index, (12, 9)) if index else torch.zeros(12, 9)).to(dtype)
    pair = pair_of(base, tuned)
    reads = []
    read = pair.tuned.read
    pair.tuned.read = lambda each, rows=None: reads.append((each, rows)) or read(each, rows)
    result = update_rank(pair, effective=True)
    rows = {each.name: each for each in result.per_tensor}
    assert list(rows) == [*(f"{name}[{index}]" for index in range(5)), "w.weight"]
    assert [at for each, at in reads if each == name] == [slice(i, i + 1) for i in range(5)]
    for index in range(5):
        alone = update_rank(
            open_pair({name: base[name][index]}, {name: tuned[name][index]}), effective=True
        )
        assert rows[f"{name}[{index}]"] == alone.per_tensor[0]._replace(name=f"{name}[{index}]")
    if dtype == torch.float32:
        assert [rows[f"{name}[{index}]"].rank for index in range(5)] == [0, 1, 2, 3, 4]
    assert (result.matrices_total, result.notes, result.numel) == (6, (), 6 * 108)
    assert update_rank(pair, include="*experts*", effective=True).max_rank == 45
    assert len(reads) == 6
    assert (rows[f"{name}[2]"].layer, rows[f"{name}[2]"].shape) == (3, (12, 9))


def test_buffers_and_integers_have_no_rank():
    base = {"m.table": torch.zeros(4, 4, dtype=torch.int32)}
    with pytest.raises(SelectionError, match="none of 1 selected tensor is a weight of two dim"):
        update_rank(open_pair(base, {"m.table": torch.ones(4, 4, dtype=torch.int32)}))


def test_float8_has_no_differences():
    base = {"w\x1b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    tuned = {"w\x1b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(SelectionError) as caught:
        update_rank(open_pair(base, tuned))
    assert str(caught.value) == (
        "no arithmetic is known for 1 selected matrix: w\\x1b.weight (float8_e4m3fn); leave them "
        "out with exclude="
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_that_is_not_finite_has_no_rank(value, dtype):
    base = {"w\n.weight": torch.zeros(4, 4, dtype=dtype)}
    tuned = {"w\n.weight": torch.zeros(4, 4, dtype=dtype)}
    tuned["w\n.weight"][1, 1] = value
    with pytest.raises(SelectionError) as caught:
        update_rank(open_pair(base, tuned))
    assert str(caught.value) == (
        "w\\n.weight holds NaN, Inf or changes beyond float32 in dict of tensors -> dict of "
        "tensors, and has no singular values; leave it out with exclude="
    )


def test_changes_beyond_float32_are_refused():
    side = torch.full((2, 2), 3e38)
    with pytest.raises(SelectionError, match="changes beyond float32"):
        update_rank(open_pair({"w.weight": side}, {"w.weight": -side}))


def test_changes_beyond_float64_are_refused_by_that_name():
    side = torch.full((2, 2), 1.7e308, dtype=torch.float64)
    with pytest.raises(SelectionError, match="holds NaN, Inf or changes beyond float64 in"):
        update_rank(open_pair({"w.weight": side}, {"w.weight": -side}))


@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-20, 1.0, 1e160, 1e200, 1e300])
def test_float64_updates_of_any_size_are_ranked(size, through_gram, monkeypatch):
    monkeypatch.setattr(spectra, "SMALL", 0 if through_gram else 256)
    update = low_rank(5, (40, 30)).double()
    base = torch.zeros(40, 30, dtype=torch.float64)
    row = only(open_pair({"w.weight": base}, {"w.weight": update * size}), effective=True)
    unit = only(open_pair({"w.weight": base}, {"w.weight": update}), effective=True)
    assert row.rank == 5
    assert row.largest == pytest.approx(unit.largest * size)
    assert row.stable_rank == pytest.approx(unit.stable_rank)
    assert row.effective_rank == pytest.approx(unit.effective_rank, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"null": "exponent"}, ValueError, "null='exponent' is not one of 'rounding', None"),
        ({"include": "*nothing*"}, SelectionError, "matches none"),
        ({"kinds": "router"}, SelectionError, "is no kind"),
    ],
)
def test_misuse_is_an_error(pair_of, base, tuned, options, error, text):
    with pytest.raises(error, match=text):
        update_rank(pair_of(base, tuned), **options)


def test_a_tensor_that_does_not_align_is_an_error(pair_of, base, tuned):
    del tuned[DOWN]
    pair = pair_of(base, tuned)
    with pytest.raises(PairMismatchError):
        update_rank(pair)
    assert update_rank(pair, exclude=DOWN).notes == ("1 tensor left out that cannot be compared",)


# The result


def test_the_result_is_frozen_plain_and_one_line(pair_of, base, tuned, recorded):
    tuned[UP][0] = 2
    result = update_rank(pair_of(base, tuned), effective=True)
    assert recorded == [result]
    assert repr(result) == (
        "UpdateRank(ratio=0.08333, resolved_ratio=0.08333, stable_rank=0.3333, 3 matrices, bf16)"
    )
    with pytest.raises(AttributeError):
        result.pair = ""
    with pytest.raises(AttributeError):
        result.per_tensor[0].rank = 0
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "finding": "update_rank",
        "ratio": 0.25 / 3,
        "rank": 1,
        "max_rank": 12,
        "stable_rank": pytest.approx(1 / 3),
        "resolved_rank": 1,
        "resolved_ratio": 0.25 / 3,
        "explained_by_rounding": False,
        "null": "rounding",
        "pair": "base -> tuned",
        "dtype": "bf16",
        "tensors": 3,
        "tensors_total": 3,
        "numel": 96,
        "notes": [],
    }
    by_name = {row["tensor"]: row for row in result.rows()}
    assert by_name[UP] == {
        "tensor": UP,
        "kind": "up_proj",
        "layer": 0,
        "shape": "bf16[4,8]",
        "rank": "1",
        "of": "4",
        "share": "25.00%",
        "stable": "1.0",
        "resolved": "1",
        "effective": "1.0",
    }
    lines = result.table().splitlines()
    assert lines[0] == repr(result)
    assert lines[1] == "  pair       base -> tuned   (bf16, 3/3 matrices, 96 entries)"
    assert lines[2] == "  tolerance  singular values above σ1 · max(m, n) · 2^-23"


@pytest.mark.slow
def test_the_picture_of_the_page_is_what_its_script_measures():
    drawn = runpy.run_path(str(DOCS / "draw_rank.py"))["draw"]()
    assert drawn == (DOCS / "rank.svg").read_text(encoding="utf-8")
