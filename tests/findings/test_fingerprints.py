"""Every result says which checkpoints it is of, by their content."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import (
    CheckpointError,
    UpdateMask,
    assert_same_structure,
    assert_subnetwork_recovers,
    assert_tied,
    assert_updated,
    magnitude_mask,
    mask_overlap,
    open_checkpoint,
    open_pair,
    open_trajectory,
    update_dynamics,
    update_movement,
    update_rank,
    update_sparsity,
)
from pytest_subnet.checkpoints import base as checkpoints


@pytest.fixture
def save(tmp_path):
    def write(name, tensors):
        (tmp_path / name).mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    return write


@pytest.fixture
def three(save):
    """`base`, and two that moved other entries."""
    base = {"w": torch.ones(4, 4), "norm": torch.ones(4)}
    first, second = ({name: each.clone() for name, each in base.items()} for _ in range(2))
    first["w"][0] += 1
    second["w"][:2] += 1
    return save("base", base), save("first", first), save("second", second)


@pytest.fixture
def hashed(monkeypatch):
    """Counts how often a tensor is hashed."""
    names = []
    fingerprint = checkpoints.Checkpoint.fingerprint

    def counted(self, name=None):
        if name is not None:
            names.append(name)
        return fingerprint(self, name)

    monkeypatch.setattr(checkpoints.Checkpoint, "fingerprint", counted)
    return names


def prints(*paths):
    return [open_checkpoint(path).fingerprint() for path in paths]


def test_findings_on_a_pair(three):
    pair = open_pair(*three[:2])
    base, tuned = prints(*three[:2])
    for measure in (
        update_sparsity,
        update_movement,
        update_rank,
        assert_same_structure,
        lambda pair: assert_updated(pair, "w"),
    ):
        assert dict(measure(pair).fingerprints) == {"base": base, "tuned": tuned}


def test_ties(save):
    tensors = {"model.embed_tokens.weight": torch.ones(4, 4), "lm_head.weight": torch.ones(4, 4)}
    paths = save("base", tensors), save("tuned", {n: each + 1 for n, each in tensors.items()})
    for path in paths:
        (path / "config.json").write_text('{"tie_word_embeddings": true}')
    result = assert_tied(open_pair(*paths))
    assert dict(result.fingerprints) == dict(zip(("base", "tuned"), prints(*paths), strict=True))


def test_an_overlap_has_two_bases(three):
    base, first, second = prints(*three)
    pairs = open_pair(three[0], three[1]), open_pair(three[0], three[2])
    assert dict(mask_overlap(*pairs).fingerprints) == {
        "base_a": base,
        "base_b": base,
        "tuned_a": first,
        "tuned_b": second,
    }
    mask = UpdateMask.of({"w": torch.eye(4, dtype=torch.bool)})
    largest = magnitude_mask(open_checkpoint(three[0]), 0.5)
    assert dict(mask_overlap(mask, largest).fingerprints) == {
        "base_a": "",
        "base_b": base,
        "tuned_a": "",
        "tuned_b": "",
    }


def test_dynamics_and_recovery(three):
    base, first, second = prints(*three)
    run = update_dynamics(open_trajectory(list(three)))
    assert dict(run.fingerprints) == {"base": base, "tuned": second}
    result = assert_subnetwork_recovers(
        three[2], three[1], base=three[0], match_at_least=0.1, atol=1e-5
    )
    assert dict(result.fingerprints) == {"base": base, "full": second, "sub": first}


def test_nothing_is_hashed_before_it_is_asked_for_and_then_once(three, hashed):
    pair = open_pair(*three[:2])
    results = [update_sparsity(pair), update_movement(pair)]
    assert hashed == []
    assert pair.base.known_fingerprint is None

    found = {result.fingerprints["base"] for result in results}

    assert hashed == ["norm", "w"]
    assert found == {pair.base.known_fingerprint}
    assert pair.tuned.known_fingerprint is None


def test_what_was_written_to_since_has_no_fingerprint(three, save):
    pair = open_pair(*three[:2])
    result, unasked = update_sparsity(pair), update_movement(pair)
    base = result.fingerprints["base"]
    assert pair.base.known_fingerprint == base

    save("base", {"w": torch.zeros(4, 4), "norm": torch.ones(4)})

    assert pair.base.known_fingerprint is None
    assert result.fingerprints["base"] == base  # taken while it was there
    with pytest.raises(CheckpointError, match="base changed after the pair was opened"):
        unasked.fingerprints["tuned"]
    assert open_checkpoint(three[0]).fingerprint() != base


def test_a_file_that_is_gone_has_no_known_fingerprint(three):
    checkpoint = open_checkpoint(three[0])
    checkpoint.fingerprint()
    (three[0] / "model.safetensors").unlink()
    assert checkpoint.known_fingerprint is None


def test_a_live_model_is_hashed_every_time(hashed):
    model = torch.nn.Linear(2, 2)
    checkpoint = open_checkpoint(model)
    before = checkpoint.fingerprint()
    model.weight.data += 1  # which leaves no trace but the content
    assert checkpoint.fingerprint() != before
    assert checkpoint.known_fingerprint is None
    assert hashed == ["bias", "weight"] * 2


def test_fingerprints_are_no_part_of_equality_or_repr(three):
    one, other = (update_rank(open_pair(*three[:2])) for _ in range(2))
    assert one == other
    coverage = update_sparsity(open_pair(*three[:2])).coverage
    assert "fingerprints=" not in repr(one) + repr(coverage)


def test_a_result_of_masks_keeps_no_masks_alive(three):
    mask = magnitude_mask(open_checkpoint(three[0]), 0.5)
    watched = weakref.ref(mask)
    other = UpdateMask.of({"w": torch.eye(4, dtype=torch.bool)})
    result = mask_overlap(mask, other)
    del mask
    gc.collect()
    assert watched() is None
    assert result.fingerprints["base_a"] == prints(three[0])[0]
