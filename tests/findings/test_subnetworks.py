"""`subnetwork_sufficiency` and `subnetwork_necessity`: closed forms, fills, weights put back."""

import copy
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    UpdateMask,
    subnetwork_necessity,
    subnetwork_sufficiency,
)
from pytest_subnet.findings.subnetworks.controls import drawn

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Blocks(torch.nn.Module):
    """Two linear layers of two blocks each, that share nothing."""

    def __init__(self, seed):
        super().__init__()
        self.first = torch.nn.Linear(6, 6, bias=False)
        self.second = torch.nn.Linear(6, 6, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.first, self.second):
                blocks = [torch.randn(3, 3, generator=generator) for _ in range(2)]
                layer.weight.copy_(torch.block_diag(*blocks))

    def forward(self, inputs):
        return self.second(self.first(inputs))


INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(9))


def block_mask(block):
    flags = torch.zeros(6, 6, dtype=torch.bool)
    flags[3 * block : 3 * block + 3, 3 * block : 3 * block + 3] = True
    return UpdateMask.of({"first.weight": flags, "second.weight": flags})


def like_block(wanted, block):
    """Scores 0 where the block's outputs are the wanted ones to the bit, and below otherwise."""

    def evaluate(model):
        found = model(INPUTS)[:, 3 * block : 3 * block + 3]
        return -(found - wanted[:, 3 * block : 3 * block + 3]).abs().max()

    return evaluate


def words(tensor):
    return tensor.detach().view(WORDS[tensor.element_size()])


def copies(model):
    return {name: words(each).clone() for name, each in model.state_dict().items()}


def same(model, kept):
    now = copies(model)
    return now.keys() == kept.keys() and all(torch.equal(now[each], kept[each]) for each in kept)


@pytest.mark.parametrize("measure", [subnetwork_sufficiency, subnetwork_necessity])
def test_in_a_callers_autocast_each_score_is_of_its_own_weights(measure):
    """Autocast keeps what it cast; without that, the numbers are those of a fresh block a call."""

    def evaluate(model):
        with torch.no_grad():
            return model(INPUTS).double().abs().mean()

    base, tuned = Blocks(0), Blocks(1)
    found = []
    for kept in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=kept):
            found.append(measure((base, tuned), block_mask(0), evaluate, controls=4))
    assert found[0] == found[1]
    assert found[0].full != found[0].complement


@pytest.mark.parametrize("fill", ["zero", "base"])
def test_a_block_alone_gives_its_outputs_exactly(fill):
    base, tuned = Blocks(0), Blocks(1)
    wanted = tuned(INPUTS).detach()
    kept = copies(tuned)
    for block in (0, 1):
        result = subnetwork_sufficiency(
            (base, tuned), block_mask(block), like_block(wanted, block), fill=fill, controls=4
        )
        assert result.full == result.subnetwork == 0
        filled = base(INPUTS)[:, 3 * block :][:, :3] if fill == "base" else torch.zeros(16, 3)
        gap = -(filled - wanted[:, 3 * block :][:, :3]).abs().max().item()
        assert result.complement == result.filled == gap
        assert max(result.random) < 0
        assert result.p_value == 1 / 5
    assert same(tuned, kept)
    assert result.restored


def test_the_complement_is_what_the_rest_gives_without_it():
    base, tuned = Blocks(0), Blocks(1)
    wanted = tuned(INPUTS).detach()
    result = subnetwork_necessity(
        (base, tuned), block_mask(0), like_block(wanted, 0), fill="zero", controls=3
    )
    assert result.drop == pytest.approx(wanted[:, :3].abs().max().item(), abs=0)
    other = subnetwork_necessity(
        (base, tuned), block_mask(0), like_block(wanted, 1), fill="zero", controls=3
    )
    assert other.drop == 0


def hand_filled(tuned, base, mask, fill, *, outside):
    """The same in numpy, on a copy."""
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        for name in mask:
            weight = other.get_parameter(name)
            goes = torch.from_numpy(mask[name])
            goes = ~goes if outside else goes
            value = {
                "base": base.get_parameter(name),
                "zero": torch.zeros(()),
                "mean": tuned.get_parameter(name).double().mean().float(),
            }[fill]
            weight.copy_(torch.where(goes, value, weight))
    return other


@pytest.mark.parametrize("fill", ["base", "zero", "mean"])
def test_what_is_scored_is_a_copy_that_was_filled_by_hand(fill):
    base, tuned = Blocks(0), Blocks(1)
    mask = UpdateMask.of({"first.weight": torch.rand(6, 6) < 0.4})
    seen = []

    def evaluate(model):
        seen.append(copies(model))
        return 0.0

    subnetwork_sufficiency((base, tuned), mask, evaluate, fill=fill, controls=0)
    full, again, subnetwork, complement, _ = seen
    assert same(tuned, full)
    assert same(tuned, again)
    assert same(hand_filled(tuned, base, mask, fill, outside=True), subnetwork)
    assert same(hand_filled(tuned, base, mask, fill, outside=False), complement)


@pytest.mark.parametrize("outside", [True, False])
def test_controls_keep_the_count_of_each_matrix_and_the_p_value_is_their_rank(outside):
    base, tuned = torch.nn.Linear(9, 7), torch.nn.Linear(9, 7)
    mask = UpdateMask.of({"weight": np.arange(63).reshape(7, 9) % 3 == 0})
    weights, zero = [], torch.zeros(())

    def evaluate(model):
        weights.append(model.weight.detach().clone())
        return model.weight.square().sum()

    measure = subnetwork_sufficiency if outside else subnetwork_necessity
    result = measure((base, tuned), mask, evaluate, fill="zero", controls=30)
    drawn_weights = weights[5:]
    assert len(drawn_weights) == 30
    for each in drawn_weights:
        assert int((each != zero).sum()) == (21 if outside else 42)
    assert len({tuple(each.flatten().tolist()) for each in drawn_weights}) == 30
    scores = [each.square().sum().item() for each in drawn_weights]
    assert list(result.random) == scores
    full = weights[0].square().sum().item()
    if outside:
        reached = sum(score >= result.subnetwork for score in scores)
    else:
        reached = sum(full - score >= full - result.complement for score in scores)
        assert result.random_drops == tuple(full - score for score in scores)
    assert result.p_value == (1 + reached) / 31
    assert result.random_mean == pytest.approx(np.mean(scores))
    assert result.random_sd == pytest.approx(np.std(scores, ddof=1))


def test_random_masks_are_the_same_for_a_seed_and_need_no_global_state():
    base, tuned = torch.nn.Linear(9, 7), torch.nn.Linear(9, 7)
    mask = UpdateMask.of({"weight": np.eye(7, 9)})
    states = torch.get_rng_state(), np.random.get_state()[1].copy()

    def random(seed):
        def evaluate(model):
            return model.weight.square().sum()

        return subnetwork_sufficiency((base, tuned), mask, evaluate, controls=5, seed=seed).random

    assert random(3) == random(3) != random(4)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


@settings(deadline=None, max_examples=60)
@given(numel=st.integers(0, 700), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_draw_has_the_count_and_no_bit_behind_the_last_entry(numel, share, seed):
    count = round(share * numel)
    bits = np.unpackbits(drawn(numel, count, (seed, 0), "w").view(np.uint8), bitorder="little")
    assert bits.sum() == bits[:numel].sum() == count


@pytest.mark.parametrize(("numel", "count"), [(5, 2), (6, 3), (6, 5), (130, 1), (70, 69)])
def test_every_set_of_entries_is_as_likely(numel, count):
    draws = 1500
    found = {}
    for number in range(draws):
        bits = np.unpackbits(
            drawn(numel, count, (0, number), "w").view(np.uint8), bitorder="little"
        )
        key = tuple(np.flatnonzero(bits))
        found[key] = found.get(key, 0) + 1
    sets = list(combinations(range(numel), count))
    expected = draws / len(sets)
    chi2 = sum((found.get(each, 0) - expected) ** 2 / expected for each in sets)
    assert sum(found.values()) == draws
    freedom = len(sets) - 1
    assert abs(chi2 - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_entries_of_a_larger_draw_are_as_likely_and_independent():
    numel, count = 1000, 370
    flags = np.stack(
        [
            np.unpackbits(drawn(numel, count, (1, number), "w").view(np.uint8), bitorder="little")
            for number in range(400)
        ]
    )[:, :numel]
    each = flags.mean(axis=0)
    assert abs(each - 0.37).max() < 4.5 * math.sqrt(0.37 * 0.63 / 400)
    overlaps = [int((flags[i] & flags[i + 1]).sum()) for i in range(0, 400, 2)]
    variance = 370 * 370 * 630 * 630 / (1000**2 * 999)
    assert abs(np.mean(overlaps) - 136.9) < 4.5 * math.sqrt(variance / 200)
    assert 0.6 < np.var(overlaps) / variance < 1.5


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    fill=st.sampled_from(["base", "zero"]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
    fails=st.booleans(),
    transposed=st.booleans(),
)
def test_weights_are_put_back_to_the_bit_whatever_they_are(
    dtype, fill, shape, seed, fails, transposed
):
    random = np.random.default_rng(seed)

    def raw():
        data = random.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        tensor = torch.from_numpy(data).view(dtype).reshape(shape)
        module = torch.nn.Module()
        whole = tensor.T if transposed else tensor
        module.weight = torch.nn.Parameter(whole, requires_grad=False)
        return module

    base, tuned = raw(), raw()  # NaN payloads, infinities and subnormals among them
    flags = random.random(tuple(tuned.weight.shape)) < random.random()
    flags.flat[0], flags.flat[-1] = True, False
    if flags.size == 1:
        return
    mask = UpdateMask.of({"weight": flags})
    kept = words(tuned.weight).clone()
    inside = torch.from_numpy(flags)
    filler = words(base.weight) if fill == "base" else torch.zeros_like(kept)
    calls = []

    def evaluate(model):
        calls.append(words(model.weight).clone())
        if fails and len(calls) == 4:
            raise KeyboardInterrupt
        return 0

    options = {"fill": fill, "controls": 0}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            subnetwork_sufficiency((base, tuned), mask, evaluate, **options)
    else:
        subnetwork_sufficiency((base, tuned), mask, evaluate, **options)
    assert torch.equal(words(tuned.weight), kept)
    assert torch.equal(calls[0], kept)
    assert torch.equal(calls[2], torch.where(inside, kept, filler))
    assert torch.equal(calls[3], torch.where(inside, filler, kept))
