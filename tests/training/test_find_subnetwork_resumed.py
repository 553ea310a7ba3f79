"""A search that was killed goes on, and gives to the bit what one gives that was not."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_subnet import CheckpointError, find_subnetwork

PROGRAM = """
import os, signal, sys
import torch
from pytest_subnet import find_subnetwork

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(8, 4)
)
killed_at, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
asked = 0

def batches(number):
    global asked
    asked += 1
    if asked == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.rand(16, 4) + number % 2

def loss(model, batch):
    return (model(batch) - batch).square().mean()

def score(model):
    model.eval()
    inputs = torch.linspace(-1, 1, 16).reshape(4, 4)
    value = -float((model(inputs) - inputs).square().mean())
    model.train()
    return value

found = find_subnetwork(
    model, loss, batches=batches, lambdas=(0, 1), score=score, learning_rate=0.05,
    temperature_growth=1.05, max_steps=25, attempts=2, checkpoint=path, checkpoint_every=4,
)
for run in found.runs:
    print(run.score, run.retrained, run.stopped, [each.loss.hex() for each in run.history])
    print([each.tobytes().hex() for name in run.mask for each in run.mask.words(name)])
print(asked, file=sys.stderr)
"""


def run(folder, killed_at, *path):
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(program), str(killed_at), *map(str, path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_killed_twice_it_gives_the_same_to_the_bit(tmp_path):
    whole = run(tmp_path, 0)
    assert whole.returncode == 0, whole.stderr
    path = tmp_path / "search.safetensors"
    assert run(tmp_path, 10, path).returncode == -signal.SIGKILL
    assert path.exists()
    assert run(tmp_path, 30, path).returncode == -signal.SIGKILL
    last = run(tmp_path, 0, path)
    assert last.stdout == whole.stdout
    assert int(last.stderr) < int(whole.stderr)
    again = run(tmp_path, 0, path)
    assert (again.stdout, again.stderr) == (whole.stdout, "0\n")
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


class InterruptedSearchError(Exception):
    """In the place of a kill."""


@pytest.fixture
def search(tmp_path):
    """Searches, a batch at a time, and stops where it is told to."""

    def search(stop_at=None, path=tmp_path / "search.safetensors", **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        asked = []

        def batches(number):
            asked.append(number)
            if number == stop_at:
                raise InterruptedSearchError
            return torch.rand(8, 4)

        def loss(model, batch):
            return (model(batch) - batch).square().mean()

        settings = {"lambdas": 0.1, "learning_rate": 0.05, "max_steps": 12, "attempts": 1}
        found = find_subnetwork(
            model, loss, batches=batches, checkpoint=path, checkpoint_every=3, **settings | options
        )
        return found, asked

    return search


@pytest.mark.parametrize("stop_at", range(12))
def test_wherever_it_stops_it_goes_on(search, stop_at):
    whole, _ = search(path=None)
    with pytest.raises(InterruptedSearchError):
        search(stop_at)
    found, asked = search()
    assert asked == list(range(stop_at // 3 * 3, 12))
    assert found.history == whole.history
    assert np.array_equal(found.mask["weight"], whole.mask["weight"])


def test_a_search_that_has_ended_is_read_back(search):
    whole, _ = search()
    found, asked = search()
    assert asked == []
    assert (found.history, repr(found)) == (whole.history, repr(whole))
    assert found.mask.origin.base == whole.mask.origin.base != ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rate": 0.1}, "learning_rate (0.05 there, 0.1 here)"),
        ({"lambdas": 2}, "lambdas ([0.1] there, [2.0] here)"),
        ({"max_steps": 13, "seed": 1}, "max_steps (12 there, 13 here), seed (0 there, 1 here)"),
    ],
)
def test_a_file_of_another_search(search, tmp_path, options, told):
    search()
    with pytest.raises(CheckpointError) as caught:
        search(**options)
    path = tmp_path / "search.safetensors"
    assert str(caught.value) == (
        f"{path} is of another search, which differs in {told}; delete it to begin anew, or name "
        "another file for checkpoint"
    )


def test_a_file_of_another_model(search, tmp_path):
    path = tmp_path / "search.safetensors"
    search()
    with pytest.raises(CheckpointError) as caught:
        find_subnetwork(
            torch.nn.Linear(4, 4),
            lambda model, batch: model(batch).sum(),
            batches=[torch.ones(4)],
            checkpoint=path,
            lambdas=0.1,
            learning_rate=0.05,
            max_steps=12,
            attempts=1,
        )
    assert str(caught.value) == (
        f"{path} is of another search, which differs in the model; delete it to begin anew, or "
        "name another file for checkpoint"
    )


def test_files_that_are_none(search, tmp_path):
    path = tmp_path / "search.safetensors"
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="is no search that can be continued: "):
        search()
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError) as caught:
        search()
    assert str(caught.value) == (
        f"{path} is a safetensors file, and none that a search for a subnetwork wrote in this "
        "version; name another for checkpoint"
    )
    with pytest.raises(CheckpointError, match="cannot write the search to"):
        search(path=tmp_path / "nowhere" / "search.safetensors")


@pytest.mark.parametrize("lost", ["numbers.0", "exp_avg.0", "exp_avg_sq.0", "history"])
def test_a_file_that_lost_a_tensor_or_its_shape(search, tmp_path, lost):
    from safetensors import safe_open

    path = tmp_path / "search.safetensors"
    with pytest.raises(InterruptedSearchError):
        search(7)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["attempt"]) == [0, True]
    for change in ("lost", "reshaped"):
        tensors = load_file(path)
        whole = tensors.pop(lost)
        if change == "reshaped":
            tensors[lost] = whole.flatten()[:3].clone()
        damaged = tmp_path / f"{change}.safetensors"
        save_file(tensors, damaged, metadata)
        with pytest.raises(CheckpointError, match=f"{change}.safetensors is no search that can"):
            search(path=damaged)
