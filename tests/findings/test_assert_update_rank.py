"""`assert_update_rank`: its verdict and every word of its failures."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_update_rank,
    open_pair,
    update_rank,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def noisy(pair_of):
    """Two bfloat16 matrices that learnt one direction each, below what bfloat16 resolves."""
    base = {UP: (random(64, 96) * 0.02).bfloat16(), DOWN: (random(96, 64) * 0.02).bfloat16()}
    tuned = {
        name: (each.float() + 4e-6 * random(len(each), 1) @ random(1, each.shape[1])).bfloat16()
        for name, each in base.items()
    }
    return pair_of(base, tuned)


@pytest.fixture
def exact(pair_of):
    """Two float32 matrices: one moved in all 8 directions, one in 2 of 8."""
    base = {UP: torch.zeros(8, 16), DOWN: torch.zeros(16, 8)}
    tuned = {UP: torch.eye(8, 16), DOWN: torch.zeros(16, 8)}
    tuned[DOWN][0, 0], tuned[DOWN][1, 1] = 2, 1
    return pair_of(base, tuned)


def test_it_holds_and_returns_what_was_measured(exact):
    assert assert_update_rank(exact, at_least=0.625) == update_rank(exact)
    assert assert_update_rank(exact, at_least=1, include=UP).rank == 8


@pytest.mark.parametrize("as_dtype", ["float32", "float64"])
def test_a_cast_to_wider_floats_does_not_switch_the_null_off(noisy, as_dtype):
    cast = open_pair("base", "tuned", as_dtype=as_dtype)
    with pytest.raises(AssertionError, match=r"update rank 0\.00% beyond rounding is below"):
        assert_update_rank(cast, at_least=0.8)
    stored, wide = update_rank(noisy), update_rank(cast)
    assert wide.explained_by_rounding
    assert [each.floor for each in wide.per_tensor] == pytest.approx(
        [each.floor for each in stored.per_tensor]
    )
    assert update_rank(cast, null=None).resolved_rank is None
    assert update_rank(cast) == wide


def test_float32_files_of_rounded_weights_are_noted(noisy, pair_of):
    base, tuned = (
        {each.name: side.read(each.name).float() for each in noisy.tensors}
        for side in (noisy.base, noisy.tuned)
    )
    wide = pair_of(base, tuned)
    result = assert_update_rank(wide, at_least=0.8)
    assert result.notes == (
        "2 matrices stored as float32 hold values of bfloat16 alone: rounded before, and no null "
        'applies; as_dtype="bfloat16" applies it',
    )
    with pytest.raises(AssertionError, match="beyond rounding"):
        assert_update_rank(open_pair("base", "tuned", as_dtype="bfloat16"), at_least=0.8)
    tuned[UP][0, 0] += 1e-6
    assert update_rank(pair_of(base, tuned)).notes == (
        result.notes[0].replace("2 matrices", "1 matrix"),
    )


def test_an_update_kept_in_float32_of_a_base_in_16_bits_is_not_rounded():
    base = {UP: (random(64, 96) * 0.02).bfloat16()}
    tuned = {UP: base[UP].float() + 1e-6 * random(64, 96, seed=1)}
    pair = open_pair(base, tuned, as_dtype="float32")
    assert assert_update_rank(pair, at_least=1).resolved_rank is None


def test_the_bare_number_holds_on_a_16_bit_pair_only_when_the_null_is_off(noisy, fails_with):
    result = assert_update_rank(noisy, at_least=0.8, null=None)
    assert (result.null, result.resolved_ratio) == (None, None)
    with fails_with(f"""
        update rank 0.00% beyond rounding is below the required 80.00%
          pair       base -> tuned   (bf16, 2/2 matrices, 12,288 entries)
          tolerance  singular values above σ1 · max(m, n) · 2^-23
          rank       {100 * result.ratio:.2f}% of min(m, n), stable rank {result.stable_rank:.1f} \
(means over the matrices)
          null       rounding: 0.00% stand out of its noise; rounding alone explains the rest
          worst      {DOWN}  0 of 64 resolved, rank {result.per_tensor[0].rank}  (bf16[96,64])
                     {UP}    0 of 64 resolved, rank {result.per_tensor[1].rank}  (bf16[64,96])
          usually    steps too small for the dtype: its rounding alone has full rank, whatever
                     was learnt; compare float32 checkpoints, or more steps, to know
          to accept  null=None to assert the bare number
    """):
        assert_update_rank(noisy, at_least=0.8)
    assert update_rank(noisy).explained_by_rounding


def test_a_rank_that_is_too_low_says_where(exact, fails_with):
    with fails_with("""
        update rank 62.50% is below the required 99.00%
          pair       base -> tuned   (f32, 2/2 matrices, 256 entries)
          tolerance  singular values above σ1 · max(m, n) · 2^-23
          rank       62.50% of min(m, n), stable rank 4.6 (means over the matrices)
          worst      model.layers.0.mlp.down_proj.weight  rank 2 of 8  (f32[16,8])
                     model.layers.0.mlp.up_proj.weight    rank 8 of 8  (f32[8,16])
          usually    an adapter of low rank (LoRA), or matrices and rows that did not train
          to accept  at_least=0.62
    """):
        assert_update_rank(exact, at_least=0.99)
    assert_update_rank(exact, at_least=0.62)


def test_experts_that_did_not_train_fail_and_what_was_left_out_is_said(pair_of, fails_with):
    """Fused experts are most of such a model, whatever its attention did."""
    base = {"q.weight": torch.zeros(8, 8), "experts": torch.zeros(3, 8, 8)}
    base["conv"] = torch.zeros(2, 2, 4, 4)
    tuned = {name: each.clone() for name, each in base.items()}
    tuned["q.weight"] += torch.eye(8)
    tuned["experts"][1, 0, 0] = tuned["experts"][1, 1, 1] = 1
    with fails_with("""
        update rank 31.25% is below the required 90.00%
          pair       base -> tuned   (f32, 4/4 matrices, 256 entries)
          tolerance  singular values above σ1 · max(m, n) · 2^-23
          note       1 tensor left out (convolutions, no matrices), 64 entries: 20.00% of \
the selected weights
          rank       31.25% of min(m, n), stable rank 2.5 (means over the matrices)
          worst      experts[0]  rank 0 of 8  (f32[8,8])
                     experts[2]  rank 0 of 8  (f32[8,8])
                     experts[1]  rank 2 of 8  (f32[8,8])
                     … 1 more
          usually    an adapter of low rank (LoRA), or matrices and rows that did not train
          to accept  at_least=0.31
    """):
        assert_update_rank(pair_of(base, tuned), at_least=0.9)


def test_without_the_null_the_message_says_so(pair_of, base, tuned):
    tuned[UP][0] = 2
    with pytest.raises(AssertionError) as caught:
        assert_update_rank(pair_of(base, tuned), at_least=0.99, null=None)
    lines = str(caught.value).splitlines()
    assert "  null       none: what rounding produces by itself is counted too" in lines


def test_what_stands_out_of_rounding_holds_up_to_its_share(pair_of):
    """Half of the directions moved far, the others by what rounding does."""
    update = torch.zeros(64, 64)
    update[:32] = random(32, 64)
    base = {"w.weight": (random(64, 64, seed=1) * 0.02).bfloat16()}
    tuned = {"w.weight": (base["w.weight"].float() + update).bfloat16()}
    tuned["w.weight"][32:].view(torch.int16).add_(random(32, 64, seed=2).gt(0).short())
    pair = pair_of(base, tuned)
    result = assert_update_rank(pair, at_least=0.5)
    assert result.rank > 55
    assert (result.resolved_rank, result.explained_by_rounding) == (32, False)
    with pytest.raises(AssertionError) as caught:
        assert_update_rank(pair, at_least=0.9)
    lines = str(caught.value).splitlines()
    assert lines[0] == "update rank 50.00% beyond rounding is below the required 90.00%"
    assert "  null       rounding: 50.00% stand out of its noise" in lines
    assert lines[-1] == "  to accept  null=None to assert the bare number, or at_least=0.5"


def test_a_pair_in_which_no_matrix_moved_fails_whatever_the_bound(pair_of, base, tuned, fails_with):
    tuned["model.norm.weight"] += 1
    with fails_with("""
        no matrix moved: the update has rank 0
          pair       base -> tuned   (bf16, 3/3 matrices, 96 entries)
          tolerance  singular values above σ1 · max(m, n) · 2^-23
          usually    the base was saved again, or no step was as large as the dtype resolves
    """):
        assert_update_rank(pair_of(base, tuned), at_least=0, null=None)


def test_names_from_the_checkpoint_are_escaped_and_the_rest_counted(pair_of):
    base = {f"w\x1b[31m{i}.weight": torch.zeros(4, 4) for i in range(5)}
    tuned = {name: each + 1 for name, each in base.items()}
    with pytest.raises(AssertionError) as caught:
        assert_update_rank(pair_of(base, tuned), at_least=0.5)
    assert "\x1b" not in str(caught.value)
    assert "  worst      w\\x1b[31m0.weight  rank 1 of 4  (f32[4,4])" in str(caught.value)
    assert "             … 2 more" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, TypeError, "at_least"),
        ({"at_least": 99}, ValueError, "at_least=99 is not a fraction.*99% is at_least=0.99"),
        ({"at_least": float("nan")}, ValueError, "not a fraction"),
        ({"at_least": "0.9"}, TypeError, "not a number"),
        ({"at_least": 0.9, "null": "matrix"}, ValueError, "null='matrix' is not one of"),
        ({"at_least": 0.9, "message": "text"}, TypeError, "message='text'"),
        ({"at_least": 0.9, "include": "*nothing*"}, SelectionError, "matches none"),
        ({"at_least": 0.9, "include": "*norm*"}, SelectionError, "only these have a rank"),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error, text):
    with pytest.raises(error, match=text):
        assert_update_rank(pair_of(base, tuned), **options)


def test_a_tensor_that_was_dropped_is_an_error(pair_of, base, tuned):
    del tuned[UP]
    with pytest.raises(PairMismatchError):
        assert_update_rank(pair_of(base, tuned), at_least=0.9)


def test_a_message_can_be_reworded_and_the_result_is_recorded(exact, recorded):
    with pytest.raises(AssertionError, match=r"\Astep 3: update rank 62\.50% is below"):
        assert_update_rank(exact, at_least=0.99, message=lambda text: "step 3: " + text)
    assert [each.to_dict()["finding"] for each in recorded] == ["update_rank"]
