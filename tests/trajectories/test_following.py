"""Following a run: each checkpoint is read once, and every count is that of the definition."""

import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, PairMismatchError, open_pair, progress, update_sparsity
from pytest_subnet.checkpoints import Checkpoint, TensorInfo, files
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance, following, remembering, units
from pytest_subnet.scan.following import declare, diary, follow
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.torch_kernel import TorchKernel
from pytest_subnet.trajectories import open_trajectory, select_everywhere

SHAPES = {"a.weight": (3,), "b.weight": (40, 7), "c.weight": (1,), "d.weight": (33,)}
FLOATS = ["bfloat16", "float16", "float32", "float64"]
BY_BITS = ["float8_e4m3fn", "float8_e5m2"]
RTOL = Tolerance(rtol=1e-2)
TOLERANCES = (SAME_BITS, PAPER, RTOL)


def random_run(dtype, *, seed, checkpoints=5, shapes=SHAPES):
    """Checkpoints of any bit patterns, in which entries come, go, and come back to the start."""
    random = np.random.default_rng(seed)
    size = getattr(torch, dtype).itemsize
    run = []
    for number in range(checkpoints):
        state = {}
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            fresh = random.integers(0, 256, (count, size), np.uint8)
            if number:
                start, last = (run[at][name] for at in (0, -1))
                kind = random.random(count)[:, None]
                small = last ^ (np.arange(size) == 0).astype(np.uint8)  # the lowest bit
                fresh = np.select([kind < 0.1, kind < 0.3, kind < 0.4], [fresh, small, start], last)
            state[name] = fresh
        run.append(state)
    return [
        {
            name: torch.from_numpy(state[name].copy()).view(getattr(torch, dtype)).reshape(shape)
            for name, shape in shapes.items()
        }
        for state in run
    ]


def is_updated(base, tuned, tolerance):
    """The definition in torch, entry by entry."""
    size = base.element_size()
    bits = [side.reshape(-1).view(torch.uint8).reshape(-1, size) for side in (base, tuned)]
    changed = (bits[0] != bits[1]).any(1)
    if tolerance.same_bits or base.dtype.itemsize == 1:
        return changed
    wide = torch.float32 if size == 2 else torch.float64
    before, after = base.reshape(-1).to(wide), tuned.reshape(-1).to(wide)
    allowed = torch.tensor(tolerance.atol or tolerance.rtol, dtype=wide)
    if tolerance.rtol is not None:
        allowed = allowed * torch.maximum(before.abs(), after.abs())
    finite = before.isfinite() & after.isfinite()
    return torch.where(finite, (after - before).abs() > allowed, changed)


def by_definition(run, name, tolerance):
    """Updated, stepped, ever and outside for each step of one tensor."""
    start, final = run[0][name], is_updated(run[0][name], run[-1][name], tolerance)
    ever = torch.zeros_like(final)
    columns = []
    for before, now in itertools.pairwise(run):
        updated = is_updated(start, now[name], tolerance)
        ever = ever | updated
        stepped = is_updated(before[name], now[name], tolerance)
        counts = updated, stepped, ever, ever & ~final
        columns.append([int(mask.sum()) for mask in counts])
    return [list(row) for row in zip(*columns, strict=True)]


def counted(trajectory, tolerance):
    rows = select_everywhere(trajectory).rows
    known = follow(trajectory, rows, tolerance)
    return {
        trajectory.pairs[0].tensors[row].name: [
            each.tolist() for each in known.steps([row], tolerance)[:4]
        ]
        for row in rows
    }


def write(run, directory):
    paths = []
    for number, state in enumerate(run):
        paths.append(str(Path(directory, f"step-{number}.safetensors")))
        save_file(state, paths[-1])
    return paths


@pytest.fixture
def small_units(monkeypatch):
    """Units of a few entries, and pieces smaller than they are."""
    monkeypatch.setattr(units, "UNIT_BYTES", 128)
    monkeypatch.setattr(remembering, "_PIECE", 5)


@pytest.mark.parametrize("dtype", [*FLOATS, *BY_BITS])
@pytest.mark.parametrize("tolerance", TOLERANCES, ids=str)
def test_files_count_as_the_definition_says(tmp_path, small_units, dtype, tolerance):
    run = random_run(dtype, seed=1)
    found = counted(open_trajectory(write(run, tmp_path)), tolerance)
    assert found == {name: by_definition(run, name, tolerance) for name in SHAPES}
    assert found["b.weight"][3][-1] > 0  # something was updated and put back


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_in_memory_count_alike(dtype):
    run = random_run(dtype, seed=2, checkpoints=3)
    found = counted(open_trajectory(run), PAPER)
    assert found == {name: by_definition(run, name, PAPER) for name in SHAPES}


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_kernels_count_alike(monkeypatch, dtype):
    run = random_run(dtype, seed=3, checkpoints=3)
    expected = counted(open_trajectory(run), PAPER)
    assert type(choose_kernel("cpu")) is not TorchKernel
    monkeypatch.setattr(following, "choose_kernel", lambda _: TorchKernel())
    assert counted(open_trajectory(run), PAPER) == expected


@pytest.mark.parametrize("dtype", [*FLOATS, *BY_BITS])
@pytest.mark.parametrize("tolerance", TOLERANCES, ids=str)
def test_the_last_step_counts_what_sparsity_counts(dtype, tolerance):
    run = random_run(dtype, seed=4)
    found = counted(open_trajectory(run), tolerance)
    limits = {"atol": tolerance.atol, "rtol": tolerance.rtol}
    for number, pair in ((-1, (run[0], run[-1])), (1, (run[0], run[2]))):
        measured = update_sparsity(open_pair(*pair), **limits).per_tensor
        assert {each.name: each.updated for each in measured} == {
            name: updated[number] for name, (updated, *_) in found.items()
        }
    measured = update_sparsity(open_pair(run[2], run[3]), **limits).per_tensor
    assert {each.name: each.updated for each in measured} == {
        name: stepped[2] for name, (_, stepped, *_) in found.items()
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 1.0 + 9e-6, 1.0 + 1.8e-5]), min_size=6, max_size=6),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from([SAME_BITS, PAPER]),
)
def test_never_cancelled_and_final_are_all_entries(states, tolerance):
    run = [{"w.weight": torch.tensor(values, dtype=torch.float32)} for values in states]
    ((updated, _, ever, outside),) = counted(open_trajectory(run), tolerance).values()
    assert ever == sorted(ever)
    assert outside == sorted(outside)
    assert outside[-1] == ever[-1] - updated[-1]
    assert max(updated) <= ever[-1] <= 6


def test_a_slow_drift_is_seen_against_the_start_and_in_no_step():
    run = [{"w.weight": torch.full((4,), 1 + step * 0.9e-5)} for step in range(4)]
    ((updated, stepped, ever, _),) = counted(open_trajectory(run), PAPER).values()
    assert (updated, stepped, ever) == ([0, 4, 4], [0, 0, 0], [0, 4, 4])


def test_what_moved_leaves_out_zeros_that_only_changed_sign():
    zeros = torch.zeros(4)
    run = [{"w.weight": each} for each in (zeros, -zeros, torch.tensor([0.0, 1, -0.0, -0.0]))]
    trajectory = open_trajectory(run)
    known = follow(trajectory, [0], SAME_BITS)
    steps = known.steps([0], SAME_BITS)
    assert steps.updated.tolist() == [4, 3]
    assert steps.moved.tolist() == [0, 1]


def test_values_that_are_not_finite_are_counted_in_each_checkpoint():
    nan, inf = float("nan"), float("inf")
    states = [[0.0, nan, 1.0], [inf, nan, 1.0], [inf, nan, -inf], [0.0, 0.0, 1.0]]
    run = [{"w.weight": torch.tensor(values)} for values in states]
    trajectory = open_trajectory(run)
    assert follow(trajectory, [0], PAPER).steps([0], PAPER).nonfinite.tolist() == [1, 2, 3, 0]


def test_more_than_255_checkpoints_are_told_apart():
    run = [{"w.weight": torch.zeros(3)}]
    for step in range(1, 301):
        run.append({"w.weight": torch.tensor([0.0, float(step == 300), float(step in (260, 261))])})
    ((updated, _, ever, outside),) = counted(open_trajectory(run), SAME_BITS).values()
    assert ever == [0] * 259 + [1] * 40 + [2]
    assert outside == [0] * 259 + [1] * 41
    assert updated == [0] * 259 + [1, 1] + [0] * 38 + [1]


class Reads:
    """Every read of a file, as the scan makes it."""

    def __init__(self, monkeypatch):
        self.ranges = {}
        self.lock = threading.Lock()
        read_some = files.read_some

        def counting(handle, buffer, offset):
            got = read_some(handle, buffer, offset)
            with self.lock:
                self.ranges.setdefault(handle.name, []).append((offset, offset + got))
            return got

        monkeypatch.setattr(files, "read_some", counting)


def test_each_byte_of_each_checkpoint_is_read_once(tmp_path, small_units, monkeypatch):
    paths = write(random_run("bfloat16", seed=5, checkpoints=7), tmp_path)
    trajectory = open_trajectory(paths)
    reads = Reads(monkeypatch)
    for tolerance in (SAME_BITS, PAPER, SAME_BITS):
        follow(trajectory, select_everywhere(trajectory).rows, tolerance)
    assert set(reads.ranges) == set(paths)
    nbytes = 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    for path, ranges in reads.ranges.items():
        ends = sorted(ranges)
        size = Path(path).stat().st_size
        assert (ends[0][0], ends[-1][1]) == (size - nbytes, size)
        assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))
        assert len(ends) > 3  # it was cut


class Counting(TensorsCheckpoint):
    """Weights in memory that count how often each is looked at."""

    def __init__(self, tensors):
        super().__init__(tensors, label="counting")
        self.reads = Counter()

    def view(self, name):
        self.reads[name] += 1
        return super().view(name)


@pytest.fixture
def counting():
    run = random_run("float32", seed=6, checkpoints=4)
    return open_trajectory([Counting(state) for state in run])


def reads(trajectory):
    first, *others = [each.reads for each in trajectory.checkpoints]
    assert all(other == first for other in others)
    return dict(first)


def test_what_was_counted_is_not_read_again(counting):
    follow(counting, [1, 2], SAME_BITS)
    follow(counting, [2, 1, 2], PAPER)
    assert reads(counting) == {"b.weight": 1, "c.weight": 1}
    follow(counting, range(4), SAME_BITS)
    assert reads(counting) == dict.fromkeys(SHAPES, 1)
    before = diary(counting).steps([1], SAME_BITS)
    follow(counting, [1], RTOL)
    assert reads(counting) == dict.fromkeys(SHAPES, 1) | {"b.weight": 2}
    for one, other in zip(before, diary(counting).steps([1], SAME_BITS), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("as_dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("in_files", [True, False])
def test_a_cast_run_counts_as_the_cast_tensors_do(tmp_path, small_units, as_dtype, in_files):
    stored = ["bfloat16", "float32", "bfloat16", "float64", "float16", "float32"]
    run = random_run("float32", seed=11, checkpoints=6)
    for state in run:
        for name, tensor in state.items():  # NaN may change its bits in a cast, in either way
            state[name] = torch.nan_to_num(tensor, 0.0)
    run = [
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
        for state, dtype in zip(run, stored, strict=True)
    ]
    run[2]["b.weight"] = run[2]["b.weight"].double()  # neighbours need not be stored alike
    run[4]["d.weight"] = run[4]["d.weight"].bfloat16()
    target = getattr(torch, as_dtype)
    narrow = target if target.itemsize < 4 else torch.float32

    def cast(tensor):  # a 16-bit dtype is reached through float32, as in torch
        return tensor.to(narrow).to(target) if target.itemsize < 4 else tensor.to(target)

    expected = [{name: cast(tensor) for name, tensor in state.items()} for state in run]
    trajectory = open_trajectory(write(run, tmp_path) if in_files else run, as_dtype=as_dtype)
    for tolerance in TOLERANCES:
        assert counted(trajectory, tolerance) == {
            name: by_definition(expected, name, tolerance) for name in SHAPES
        }


@pytest.mark.parametrize("as_dtype", ["bfloat16", "float64"])
def test_a_unit_of_a_cast_run_is_small_in_each_checkpoint(as_dtype, small_units):
    run = random_run("float32", seed=18, checkpoints=4)
    run[1] = {name: tensor.bfloat16() for name, tensor in run[1].items()}
    run[3] = {name: tensor.double() for name, tensor in run[3].items()}
    for unit in following._units(open_trajectory(run, as_dtype=as_dtype), range(4)):
        assert unit[0].count * 8 <= units.UNIT_BYTES
        places = [[each[0], each[3:]] for side in unit for each in side.segments]
        assert places == places[: len(unit[0].segments)] * 3


def test_a_cast_run_is_read_once_too(tmp_path, small_units, monkeypatch):
    run = random_run("float32", seed=12, checkpoints=3)
    run[0] = {name: tensor.bfloat16() for name, tensor in run[0].items()}
    paths = write(run, tmp_path)
    trajectory = open_trajectory(paths, as_dtype="bfloat16")
    reads = Reads(monkeypatch)
    for tolerance in (PAPER, SAME_BITS):
        follow(trajectory, select_everywhere(trajectory).rows, tolerance)
    entries = sum(int(np.prod(shape)) for shape in SHAPES.values())
    for path, size in zip(paths, (2, 4, 4), strict=True):
        assert sum(end - start for start, end in reads.ranges[path]) == size * entries


def test_declared_tolerances_are_counted_in_the_first_pass(counting):
    declare(counting, [RTOL, SAME_BITS])
    for tolerance in TOLERANCES:
        follow(counting, range(4), tolerance)
    assert reads(counting) == dict.fromkeys(SHAPES, 1)


def test_two_threads_that_ask_at_once_read_once(counting):
    threads = [
        threading.Thread(target=follow, args=(counting, range(4), SAME_BITS)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads(counting) == dict.fromkeys(SHAPES, 1)


def test_what_another_thread_counts_meanwhile_is_not_seen_half(counting, monkeypatch):
    known = follow(counting, range(4), SAME_BITS)
    before = [[each.tolist() for each in known.steps([row], SAME_BITS)] for row in range(4)]
    looks = []

    def look():
        for diaries in (known, diary(counting)):
            found = [[each.tolist() for each in diaries.steps([r], SAME_BITS)] for r in range(4)]
            looks.append(found == before)

    class Parts(list):
        def __iter__(self):
            for part in super().__iter__():
                look()
                yield part
                look()

    read = following._read
    monkeypatch.setattr(following, "_read", lambda *args: Parts(read(*args)))
    follow(counting, range(4), RTOL)  # reads again, and counts what was known once more
    look()
    assert len(looks) >= 6
    assert all(looks)


def test_threads_with_questions_of_their_own_all_get_the_right_numbers():
    run = random_run("bfloat16", seed=13, checkpoints=4)
    trajectory = open_trajectory([Counting(state) for state in run])
    names, wrong = list(SHAPES), []

    def ask(number):
        row, tolerance = number % 4, (*TOLERANCES, Tolerance(atol=0.1 * number))[number % 4]
        found = follow(trajectory, [row], tolerance).steps([row], tolerance)[:4]
        if [each.tolist() for each in found] != by_definition(run, names[row], tolerance):
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number * 7,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("seed", range(6))
def test_questions_in_any_order_get_the_numbers_of_the_definition(seed):
    run = random_run("float32", seed=14, checkpoints=4)
    trajectory = open_trajectory([Counting(state) for state in run])
    random = np.random.default_rng(seed)
    for _ in range(12):
        names = random.permutation(list(SHAPES))[: random.integers(1, 5)].tolist()
        tolerance = TOLERANCES[random.integers(3)]
        chosen = {"include": names} if random.integers(2) else {"exclude": names[1:] or None}
        wanted = names if "include" in chosen else sorted(set(SHAPES) - set(names[1:]))
        rows = list(select_everywhere(trajectory, **chosen).rows)
        assert {trajectory.pairs[0].tensors[row].name for row in rows} == set(wanted)
        shuffled = random.permutation(rows).tolist()
        found = follow(trajectory, shuffled, tolerance).steps(shuffled, tolerance)[:4]
        expected = np.sum([by_definition(run, name, tolerance) for name in wanted], axis=0)
        assert [each.tolist() for each in found] == expected.tolist()
    assert max(reads(trajectory).values()) <= 2  # the second time for rtol, which is not declared


@pytest.mark.parametrize("place", range(4))
def test_what_is_live_is_counted_again(place):
    run = random_run("float32", seed=15, checkpoints=4)
    kept = [Counting(state) if at != place else state for at, state in enumerate(run)]
    trajectory = open_trajectory(kept)
    answers = []
    for first in (30, 10):
        run[place]["b.weight"].numpy()[first:] = 1.0  # which torch cannot know of
        for rows in ([1], [0, 1]):
            answers.append((follow(trajectory, rows, SAME_BITS), first))
            found = [each.tolist() for each in answers[-1][0].steps([1], SAME_BITS)[:4]]
            assert found == by_definition(run, "b.weight", SAME_BITS)
    before, after = (
        [each.tolist() for each in answers[at][0].steps([1], SAME_BITS)] for at in (0, 3)
    )
    assert before != after  # an answer stays what it was


def test_a_module_that_was_trained_in_between_is_said():
    model = torch.nn.Linear(3, 2)
    start = {name: each.clone() for name, each in model.state_dict().items()}
    middle = {name: each + 1 for name, each in start.items()}
    trajectory = open_trajectory([start, middle, model])
    follow(trajectory, [0, 1], SAME_BITS)
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(CheckpointError, match="Linear changed after the pair was opened"):
        follow(trajectory, [0], SAME_BITS)


def test_a_checkpoint_that_changes_between_two_questions_is_noticed(tmp_path):
    for at in range(3):
        directory = tmp_path / f"{at}"
        directory.mkdir()
        paths = write(random_run("float32", seed=16, checkpoints=3), directory)
        trajectory = open_trajectory(paths)
        follow(trajectory, range(4), SAME_BITS)
        Path(paths[at]).write_bytes(Path(paths[at]).read_bytes())
        with pytest.raises(CheckpointError, match=rf"step-{at}\.safetensors changed after"):
            follow(trajectory, [2], SAME_BITS)  # though nothing would be read for it


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Tied(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding.from_pretrained(weight, freeze=False)
        self.lm_head = torch.nn.Linear(*reversed(weight.shape), bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight


def test_tied_weights_count_once_however_each_checkpoint_holds_them(tmp_path):
    weights = [state["b.weight"] for state in random_run("float32", seed=17)]
    sources = []
    for number, state in enumerate(
        [
            {EMBED: weights[0], HEAD: weights[0].clone()},  # stored twice
            {EMBED: weights[1]},
            {HEAD: weights[2], EMBED: weights[2].clone()},
            {EMBED: weights[3]},
        ]
    ):
        directory = tmp_path / f"checkpoint-{number}"
        directory.mkdir()
        save_file(state, directory / "model.safetensors")
        (directory / "config.json").write_text('{"tie_word_embeddings": true}')
        sources.append(directory)
    run = [{EMBED: each} for each in weights]
    for tolerance in TOLERANCES:
        trajectory = open_trajectory([*sources, Tied(weights[4])])
        assert counted(trajectory, tolerance) == {EMBED: by_definition(run, EMBED, tolerance)}
    save_file({EMBED: weights[1], HEAD: weights[1] + 1}, sources[1] / "model.safetensors")
    trajectory = open_trajectory(sources)
    for _ in range(2):
        with pytest.raises(PairMismatchError, match=r"checkpoint-1 stores lm_head\.weight with o"):
            follow(trajectory, [0], SAME_BITS)


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path):
    paths = write(random_run("float32", seed=7, checkpoints=3), tmp_path)
    trajectory = open_trajectory(paths)
    whole = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"step-2\.safetensors changed after"):
        follow(trajectory, range(4), SAME_BITS)
    assert diary(trajectory).missing(range(4), SAME_BITS) == [0, 1, 2, 3]


def test_a_checkpoint_that_is_written_to_meanwhile_is_noticed(tmp_path, monkeypatch):
    paths = write(random_run("float32", seed=8, checkpoints=3), tmp_path)
    trajectory = open_trajectory(paths)
    read = following._read

    def change_after(*args):
        parts = read(*args)
        Path(paths[1]).write_bytes(Path(paths[1]).read_bytes())
        return parts

    monkeypatch.setattr(following, "_read", change_after)
    with pytest.raises(CheckpointError, match=r"step-1\.safetensors changed after"):
        follow(trajectory, range(4), SAME_BITS)
    assert diary(trajectory).missing([0], SAME_BITS) == [0]


class Bytes(Checkpoint):
    """The least a checkpoint can be: bytes by name, neither in files nor in memory to look at."""

    def __init__(self, tensors):
        self.label, self.config, self.ties, self.buffers = "bytes", {}, {}, frozenset()
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def info(self, name):
        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(name, tuple(tensor.shape), dtype, tensor.nbytes)

    def read_into(self, name, start, buffer):
        data = self.tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        buffer[:] = data[start : start + len(buffer)]

    def identity(self):
        return id(self)


def test_any_checkpoint_can_be_followed(tmp_path, small_units):
    run = random_run("bfloat16", seed=9, checkpoints=4)
    first, *others = write(run, tmp_path)
    mixed = open_trajectory([first, Bytes(run[1]), run[2], others[2]])
    assert counted(mixed, SAME_BITS) == {
        name: by_definition(run, name, SAME_BITS) for name in SHAPES
    }


def test_a_run_whose_checkpoints_call_tensors_otherwise(tmp_path):
    run = random_run("bfloat16", seed=10, checkpoints=4)
    renamed = [run[0]]
    for number, state in enumerate(run[1:]):
        names = list(state) if number else list(reversed(state))
        prefix = ["module.", "_orig_mod.", ""][number]
        renamed.append({prefix + name: state[name] for name in names})
    assert counted(open_trajectory(renamed), SAME_BITS) == {
        name: by_definition(run, name, SAME_BITS) for name in SHAPES
    }


def test_a_place_that_is_taken_is_said(counting):
    counting.memory["following"] = "something else"
    with pytest.raises(TypeError, match=r"trajectory\.memory\['following'\] is taken by str"):
        diary(counting)


def test_a_person_sees_a_bar_over_all_that_is_read(counting, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, nbytes, what):
            shown.append((what, nbytes))

        def __enter__(self):
            return lambda done: shown.append(done)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(progress, "bar", Bar)
    follow(counting, range(4), SAME_BITS)
    (what, nbytes), *done = shown
    assert what == "following"
    assert sum(done) == nbytes == 4 * 4 * sum(int(np.prod(each)) for each in SHAPES.values())


def states(*changes):
    """A run of two tensors, with each checkpoint after the first changed by a function."""
    run = [{"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(3)}]
    for number, change in enumerate(changes, 1):
        state = {name: each + number for name, each in run[0].items()}
        change(state)
        run.append(state)
    return [TensorsCheckpoint(state, label=f"step-{at}") for at, state in enumerate(run)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("b.weight"), "only base  b.weight"),
        (lambda s: s.update({"x.weight": torch.ones(1)}), "only tuned x.weight"),
        (lambda s: s.update({"b.weight": torch.ones(4)}), "reshaped   b.weight"),
        (lambda s: s.update({"b.weight": torch.ones(3).half()}), "retyped    b.weight"),
    ],
)
def test_a_tensor_that_does_not_align_is_named_with_its_checkpoint(change, problem):
    trajectory = open_trajectory(states(lambda _: None, change, lambda _: None))
    with pytest.raises(PairMismatchError) as caught:
        select_everywhere(trajectory)
    assert "\n  pair       step-0 -> step-2\n" in str(caught.value)
    assert f"\n  {problem}" in str(caught.value)
    assert select_everywhere(trajectory, include="a.weight").rows == (0,)


def test_a_head_that_is_tied_in_some_checkpoints_only_is_an_error():
    embed = [torch.full((4, 2), float(step)) for step in range(3)]
    run = [
        TensorsCheckpoint(
            {"model.embed_tokens.weight": each, "lm_head.weight": each if tied else each + 1},
            label=f"step-{step}",
            shows_ties=True,
        )
        for step, (each, tied) in enumerate(zip(embed, (True, True, False), strict=True))
    ]
    with pytest.raises(PairMismatchError) as caught:
        select_everywhere(open_trajectory(run))
    assert str(caught.value).startswith(
        "lm_head.weight is tied to another tensor in step-1 and one of its own in step-2: it "
        "cannot be counted through the run;"
    )


def test_a_buffer_of_one_checkpoint_only_is_an_error():
    run = states(lambda _: None, lambda _: None)
    run[2].buffers = frozenset({"b.weight"})
    trajectory = open_trajectory(run)
    with pytest.raises(PairMismatchError, match=r"b\.weight is a weight in one of step-1 and st"):
        select_everywhere(trajectory)
    assert select_everywhere(trajectory, exclude="b.*").rows == (0,)
