import math

import numpy as np
import pytest
import torch

from pytest_subnet import PairMismatchError, SelectionError, open_pair
from pytest_subnet.findings.geometry import cosine as geometry_cosine
from pytest_subnet.findings.geometry.cosine import task_vector_cosine


def model(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "layers.0.up_proj.weight": (24, 16),
        "layers.0.experts.down_proj": (3, 8, 8),
        "norm.weight": (16,),
        "scale": (),
    }
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }


def moved(base, step, seed):
    generator = torch.Generator().manual_seed(seed + 1000)
    return {
        name: (each.double() + step * torch.randn(each.shape, generator=generator)).to(each.dtype)
        for name, each in base.items()
    }


def flat(tuned, base):
    return torch.cat([(tuned[name].double() - base[name].double()).reshape(-1) for name in base])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [1 << 20, 37])
def test_it_is_the_cosine_of_the_two_updates(dtype, entries, monkeypatch):
    monkeypatch.setattr(geometry_cosine, "_ENTRIES", entries)
    base = model(dtype)
    tuned = moved(base, 1e-2, 1), moved(base, 1e-2, 2)
    result = task_vector_cosine(*(open_pair(base, each) for each in tuned))
    a, b = (flat(each, base) for each in tuned)
    assert result.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)
    assert result.sd_even == pytest.approx(a.numel() ** -0.5)
    assert result.z == pytest.approx(float(a @ b / (a**2 @ b**2).sqrt()))
    assert [each.name for each in result.per_tensor] == list(base)
    for row in result.per_tensor:
        a, b = (flat({row.name: each[row.name]}, {row.name: base[row.name]}) for each in tuned)
        assert row.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)


def test_one_direction_the_opposite_and_an_orthogonal_one():
    base = {"w.weight": torch.zeros(4, 4)}
    step = torch.eye(4)

    def cosine(other):
        pairs = open_pair(base, {"w.weight": step}), open_pair(base, {"w.weight": other})
        return task_vector_cosine(*pairs)

    assert cosine(3 * step).cosine == 1
    assert cosine(-step).cosine == -1
    apart = cosine(step.roll(1, 0))
    assert (apart.cosine, apart.z) == (0, None)  # no entry in both
    assert "z=None" in repr(apart)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-6)])
def test_z_of_unrelated_updates_has_deviation_1_also_where_few_entries_are_in_both(dtype, step):
    generator = torch.Generator().manual_seed(3)
    base = {"w.weight": (torch.randn(128, 128, generator=generator) * 0.02).to(dtype)}
    pairs = [open_pair(base, moved(base, step, seed)) for seed in range(80)]
    found = [task_vector_cosine(pairs[n], pairs[n + 40]) for n in range(40)]
    z = [each.z for each in found]
    assert abs(np.mean(z)) < 0.5
    assert np.std(z) == pytest.approx(1, abs=0.3)
    even = np.std([each.cosine / each.sd_even for each in found])
    if dtype == torch.bfloat16:  # 1 / √n is for updates that are spread evenly
        assert even > 2
    else:
        assert even == pytest.approx(1, abs=0.3)


def test_what_one_run_did_not_move_has_no_direction():
    base = model()
    tuned = [moved(base, 1e-2, seed) for seed in (1, 2)]
    tuned[0]["norm.weight"] = base["norm.weight"].clone()
    a, b = (open_pair(base, each) for each in tuned)
    rows = {each.name: each.cosine for each in task_vector_cosine(a, b).per_tensor}
    assert rows["norm.weight"] is None
    with pytest.raises(SelectionError) as error:
        task_vector_cosine(a, b, include="norm*")
    assert str(error.value) == (
        "run a did not move in 1 selected tensor and has no direction there; did it save its base "
        "again?"
    )


def test_runs_that_cannot_be_compared():
    base, other = model(), model(seed=9)
    a = open_pair(base, moved(base, 1e-2, 1))
    with pytest.raises(
        PairMismatchError, match=r"^a and b are the same run: .*Was one given twice"
    ):
        task_vector_cosine(a, a)
    with pytest.raises(PairMismatchError, match=r"are the same run"):
        task_vector_cosine(a, open_pair(base, a.tuned))
    with pytest.raises(PairMismatchError) as error:
        task_vector_cosine(a, open_pair(other, moved(other, 1e-2, 1)))
    prints = [open_pair(each, moved(each, 1, 1)).base.fingerprint() for each in (base, other)]
    assert str(error.value) == (
        "dict of tensors -> dict of tensors and dict of tensors -> dict of tensors are runs from "
        f"different bases (fingerprints {prints[0]} and {prints[1]}), and the difference of the "
        "bases is in one of the vectors; compare runs from one base"
    )
    same = {name: each.clone() for name, each in base.items()}  # by content, not by object
    b = open_pair(same, moved(same, 1e-2, 2))
    assert math.isfinite(task_vector_cosine(a, b).cosine)
    less = {name: each for name, each in base.items() if name != "norm.weight"}
    with pytest.raises(PairMismatchError, match=r"norm\.weight"):
        task_vector_cosine(a, open_pair(less, moved(less, 1e-2, 2)))
    with pytest.raises(TypeError, match="a ModelPair is needed, got dict"):
        task_vector_cosine(a, base)


def test_what_has_no_direction():
    base = model(torch.float32)
    broken = moved(base, 1e-2, 1)
    broken["norm.weight"][3] = float("inf")
    pairs = open_pair(base, broken), open_pair(base, moved(base, 1e-2, 2))
    with pytest.raises(SelectionError, match=r"norm\.weight of .* holds NaN or Inf, and its upd"):
        task_vector_cosine(*pairs)
    assert task_vector_cosine(*pairs, exclude="norm*").numel == 24 * 16 + 3 * 64 + 1


def test_what_reports_store(recorded):
    base = model()
    result = task_vector_cosine(*(open_pair(base, moved(base, 1e-2, seed)) for seed in (1, 2)))
    assert recorded == [result]
    assert result.to_dict()["finding"] == "task_vector_cosine"
    assert set(result.fingerprints) == {"base", "tuned_a", "tuned_b"}
    assert "norm.weight" in result.table()
