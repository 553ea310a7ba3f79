"""`Supermasks.save` and `load`: what was learnt comes back; what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_subnet import CheckpointError, Supermasks, UpdateMask, open_checkpoint


def network(seed=0, widths=(6, 10, 3)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(*widths[:2]), torch.nn.ReLU(), torch.nn.Linear(*widths[1:])
        )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Two tasks in `run`, and the masks that were saved."""
    monkeypatch.chdir(tmp_path)
    masks = Supermasks(network(), density=0.3, seed=7)
    for task in ("a/../b\x1b", "ü"):
        with masks.learn_mask(task):
            pass
    masks.save("run")
    return masks


def test_what_comes_back(saved):
    """Masks, exclusive parts, scores and outputs; and the next task starts as it would have."""
    again = Supermasks.load("run", network())
    assert list(again) == list(saved)
    for task in saved:
        assert not (again[task] - saved[task])
        assert not (saved[task] - again[task])
        assert again.exclusive[task].count == saved.exclusive[task].count
        for name, scores in saved._scores[task].items():
            assert torch.equal(again._scores[task][name], scores)
        inputs = torch.randn(4, 6)
        with saved.apply(task) as model:
            before = model(inputs)
        with again.apply(task) as model:
            assert torch.equal(model(inputs), before)
    assert again.used.count == saved.used.count
    for masks in (saved, again):
        with masks.learn_mask("next"):
            pass
    assert not (again["next"] - saved["next"])


def test_masks_are_files_of_their_own(saved, tmp_path):
    """Any mask can be loaded alone; no name of a task becomes a name of a file."""
    assert sorted(each.name for each in tmp_path.rglob("*") if each.is_file()) == [
        "mask-0001.safetensors",
        "mask-0002.safetensors",
        "scores-0001.safetensors",
        "scores-0002.safetensors",
        "supermasks.json",
    ]
    assert UpdateMask.load("run/mask-0002.safetensors").count == saved["ü"].count


def test_without_scores(tmp_path):
    """One bit an entry and task; a start is refused by name."""
    masks = Supermasks(network(), density=0.3, keep_scores=False)
    with masks.learn_mask("one"):
        pass
    masks.save(tmp_path)
    assert not list(tmp_path.glob("scores*"))
    again = Supermasks.load(tmp_path, network())
    with (
        pytest.raises(Exception, match="the scores of 'one' were not kept; build Supermasks with"),
        again.learn_mask("two", start="one"),
    ):
        pass


@pytest.mark.parametrize("kind", ["mask", "scores"])
def test_files_of_two_tasks_exchanged(saved, kind):
    """Each fits the model as well as the other: nothing but what it holds tells them apart."""
    one, other = (Path("run") / f"{kind}-000{number}.safetensors" for number in (1, 2))
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    with pytest.raises(CheckpointError) as caught:
        Supermasks.load("run", network())
    assert str(caught.value) == (
        f"{one} is not the file that was saved; save them again, or copy the directory again"
    )


def test_other_weights_are_refused(saved):
    """Masks on other weights are another network."""
    with pytest.raises(CheckpointError) as caught:
        Supermasks.load("run", network(seed=1))
    assert str(caught.value) == (
        "the supermasks in run were saved with other weights than the model has; load the weights "
        "first that were saved beside them"
    )
    with pytest.raises(CheckpointError, match=r"^the supermasks in run do not fit the model: incl"):
        Supermasks.load("run", torch.nn.Sequential(torch.nn.Linear(6, 3)))


def change(**keys):
    path = Path("run/supermasks.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"format": 1}, "run/supermasks.json is no index of supermasks; pass what save wrote"),
        (
            {"version": 2},
            "run/supermasks.json is of version 2, this pytest-subnet reads version 1; install the "
            "one that wrote it",
        ),
        (
            {"tasks": "ab"},
            "run/supermasks.json is corrupt: a key is missing or wrong; save them again, or copy "
            "the directory again",
        ),
        (
            {"tasks": ["a", "a"]},
            "run/supermasks.json is corrupt: no weights, or a task twice; save them again, or copy "
            "the directory again",
        ),
        (
            {"density": 0.5},
            "run/mask-0001.safetensors is a mask of other tensors, or of another density, than the "
            "supermasks; save them again, or copy the directory again",
        ),
        (
            {"density": 5},
            "the supermasks in run do not fit the model: density=5 is not a share in (0, 1]; 5% is "
            "density=0.05",
        ),
    ],
)
def test_a_damaged_index(saved, keys, text):
    """Each key by itself; nothing is believed."""
    change(**keys)
    with pytest.raises(CheckpointError) as caught:
        Supermasks.load("run", network())
    assert str(caught.value) == text


def test_damaged_files(saved, tmp_path):
    """A mask that is missing, and scores of another shape."""
    scores = load_file("run/scores-0001.safetensors")
    scores["0.weight"] = scores["0.weight"].T.contiguous()
    save_file(scores, "run/scores-0001.safetensors")
    with pytest.raises(CheckpointError, match=r"0001\.safetensors is not the file that was saved"):
        Supermasks.load("run", network())
    files = json.loads(Path("run/supermasks.json").read_text())["files"]
    damaged = open_checkpoint("run/scores-0001.safetensors").fingerprint()
    change(files=files | {"scores-0001.safetensors": damaged})
    with pytest.raises(CheckpointError) as caught:
        Supermasks.load("run", network())
    assert str(caught.value) == (
        "run/scores-0001.safetensors has no float32 scores of 0.weight; save them again, or copy "
        "the directory again"
    )
    (tmp_path / "run" / "mask-0001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"mask-0001\.safetensors"):
        Supermasks.load("run", network())
    with pytest.raises(CheckpointError, match=r"supermasks\.json"):
        Supermasks.load("nowhere", network())


def test_what_cannot_be_written(saved, tmp_path):
    """A file in the place of the directory; a name that is half a character."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        saved.save("file")
    assert str(caught.value) == (
        "cannot write supermasks to file: File exists; give a directory that can be written to and "
        "has room"
    )
    with saved.learn_mask("\ud800"):
        pass
    with pytest.raises(CheckpointError) as caught:
        saved.save("run")
    assert str(caught.value) == r"cannot write the task \ud800: it is not valid Unicode"
