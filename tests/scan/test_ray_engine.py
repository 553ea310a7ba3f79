"""A real Ray cluster of two nodes: the same integers as threads, whoever dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import (
    CheckpointError,
    SelectionError,
    SubnetError,
    open_pair,
    open_trajectory,
    update_dynamics,
    update_mask,
    update_rank,
    update_sparsity,
)
from pytest_subnet.findings.displacement.finding import displacement_rank
from pytest_subnet.findings.rotation.finding import singular_rotation
from pytest_subnet.findings.spectrum.finding import singular_shift
from pytest_subnet.scan import PAPER, gathering, ray_cluster, ray_engine, units
from pytest_subnet.scan.engines import ThreadEngine
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.ray_cluster import Node, Survey, connect, disconnect, nodes_of
from pytest_subnet.scan.ray_engine import RayEngine

from ..checkpoints.servers import FileServer, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    # Ray's own: pipes to processes of a cluster that is taken down.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def works() -> Iterator[Any]:
    """The module `ray_works`, which workers can import too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        import ray_works

        yield ray_works


@pytest.fixture(scope="module")
def cluster(works: Any) -> Iterator[Any]:
    """A head and one more node, a CPU each; `RAY_ADDRESS` leads there."""
    from ray.cluster_utils import Cluster

    disconnect()
    started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    started.add_node(**NODE)
    started.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        disconnect()
    started.shutdown()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `step-1` and `step-2` of a run, 16-bit and 32-bit matrices and a vector."""
    root = tmp_path_factory.mktemp("pair")
    random = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    base = {f"model.layers.{i}.mlp.up_proj.weight": weights(96, 300).bfloat16() for i in range(40)}
    base |= {"model.layers.0.self_attn.q_proj.weight": weights(300, 300)}
    base |= {"model.norm.weight": weights(300)}
    moved = {name: nudged(tensor, random) for name, tensor in base.items()}
    again = {name: nudged(tensor, random) for name, tensor in moved.items()}
    for name, side in {"base": base, "step-1": moved, "step-2": again}.items():
        (root / name).mkdir()
        save_file(side, root / name / "model.safetensors")
    return root


def nudged(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    moves = torch.rand(tensor.shape, generator=random) < 0.2
    return (tensor.float() + moves * 0.02).to(tensor.dtype)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """About thirty units of that pair, with matrices in more than one."""
    monkeypatch.setattr(units, "UNIT_BYTES", 131_072)


def pair_of(checkpoints: Path, engine: str | None) -> Any:
    return open_pair(checkpoints / "base", checkpoints / "step-2", engine=engine)


def assert_same(one: Any, other: Any) -> None:
    assert np.array_equal(one.integers, other.integers)
    assert one.sums.tobytes() == other.sums.tobytes()
    assert one.peaks.tobytes() == other.peaks.tobytes()


def test_a_scan_gives_the_same_numbers(cluster: Any, checkpoints: Path, small_units: None) -> None:
    pairs = [pair_of(checkpoints, engine) for engine in ("ray", "threads")]
    there, here = (scan(pair, range(len(pair.tensors)), (PAPER,)) for pair in pairs)
    assert_same(there, here)
    assert here.integers[:, 0].min() > 0
    assert update_sparsity(pairs[0]).to_dict() == update_sparsity(pairs[1]).to_dict()


def test_a_mask_has_the_same_bits(
    cluster: Any, checkpoints: Path, small_units: None, tmp_path: Path
) -> None:
    for engine in ("ray", "threads"):
        update_mask(pair_of(checkpoints, engine)).save(tmp_path / engine)
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "threads").read_bytes()


def test_a_run_is_followed_with_the_same_numbers(
    cluster: Any, checkpoints: Path, small_units: None
) -> None:
    found = []
    for engine in ("ray", "threads"):
        run = open_trajectory([checkpoints / name for name in ("base", "step-1", "step-2")])
        for pair in run.pairs:
            pair.engine = engine
        found.append(update_dynamics(run).to_dict())
    assert found[0] == found[1]


def test_ranks_are_the_same(cluster: Any, checkpoints: Path) -> None:
    there, here = (
        update_rank(pair_of(checkpoints, engine), effective=True, include="*.[0-3].*")
        for engine in ("ray", "threads")
    )
    assert len(there.per_tensor) == 5
    for one, other in zip(there.per_tensor, here.per_tensor, strict=True):
        assert one[:7] == other[:7]  # name to max_rank
        assert one.resolved_rank == other.resolved_rank
        assert one.largest == pytest.approx(other.largest, rel=1e-6)
        assert one.effective_rank == pytest.approx(other.effective_rank, rel=1e-6)


def test_spectra_are_the_same(cluster: Any, tmp_path: Path) -> None:
    """Also of a fused matrix, which the config takes apart where it is measured."""
    random = torch.Generator().manual_seed(1)
    base = {
        f"layers.{i}.{kind}.weight": torch.randn(*shape, generator=random)
        for i in range(2)
        for kind, shape in (("qkv_proj", (48, 30)), ("up_proj", (40, 60)), ("experts", (3, 20, 24)))
    }
    tuned = {name: nudged(tensor, random) for name, tensor in base.items()}
    for name, side in {"base": base, "tuned": tuned}.items():
        (tmp_path / name).mkdir()
        save_file(side, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"num_attention_heads": 4}')
    for rows, measure in (
        (10, singular_shift),
        (10, displacement_rank),
        (10, partial(displacement_rank, of="update", operator="hankel", form="stein")),
        (14, partial(singular_rotation, k=3, null="support")),
    ):
        there, here = (
            measure(open_pair(tmp_path / "base", tmp_path / "tuned", engine=engine)).per_tensor
            for engine in ("ray", "threads")
        )
        assert len(there) == len(here) == rows
        for one, other in zip(there, here, strict=True):
            for mine, theirs in zip(one, other, strict=True):
                numbers = isinstance(theirs, float | tuple) and theirs
                assert mine == (pytest.approx(theirs, rel=1e-5, abs=1e-9) if numbers else theirs)


def test_a_matrix_without_singular_values_is_named_as_by_threads(
    cluster: Any, tmp_path: Path
) -> None:
    for side, value in (("b", 0.0), ("t", float("nan"))):
        save_file({"q_proj.weight": torch.full((4, 4), value)}, tmp_path / f"{side}.safetensors")
    pair = open_pair(*(tmp_path / f"{side}.safetensors" for side in "bt"), engine="ray")
    with pytest.raises(SelectionError, match=r"^q_proj\.weight holds NaN, Inf or changes beyond"):
        update_rank(pair)


class Watched:
    """The engine, with something to do to the cluster in mid-scan and slower workers."""

    def __init__(self, works: Any, diary: Path, after_first: Callable[[], None]) -> None:
        self.works, self.diary, self.after_first = works, diary, after_first

    def __call__(self, pair: Any, paths_of: Callable[[Any], set[str]]) -> Watched:
        self.paths_of = paths_of
        return self

    def map(self, work: Any, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        self.units = units
        slow = self.works.Slow(work, str(self.diary))
        results = RayEngine(self.paths_of, together=1).map(slow, units)
        yield next(results)
        self.after_first()
        yield from results


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    (tmp_path / "diary").mkdir()
    return tmp_path / "diary"


def entries(diary: Path) -> list[str]:
    """The node of each unit that was begun."""
    return [entry.name.partition("-")[0] for entry in diary.iterdir()]


def test_a_node_that_dies_in_mid_scan_does_not_change_a_number(
    cluster: Any,
    checkpoints: Path,
    small_units: None,
    works: Any,
    diary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = pair_of(checkpoints, "ray")
    doomed = cluster.add_node(**NODE)
    cluster.wait_for_nodes()

    def kill() -> None:
        while doomed.node_id not in entries(diary):  # at work, then
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)

    engine = Watched(works, diary, kill)
    monkeypatch.setattr(gathering, "engine_of", engine)
    there = scan(pair, range(len(pair.tensors)), (PAPER,))
    monkeypatch.undo()
    monkeypatch.setattr(units, "UNIT_BYTES", 131_072)
    assert_same(there, scan(pair_of(checkpoints, None), range(len(pair.tensors)), (PAPER,)))
    assert len(entries(diary)) > len(engine.units)  # what it had was done again


@pytest.fixture
def lives(tmp_path: Path) -> Callable[[int], str]:
    def make(count: int) -> str:
        (tmp_path / "lives").mkdir()
        for life in range(count):
            (tmp_path / "lives" / str(life)).touch()
        return str(tmp_path / "lives")

    return make


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_RETRY_SECONDS", 0.1)


def nowhere(_: object) -> set[str]:
    return set()


@pytest.mark.usefixtures("cluster", "no_delay")
def test_what_a_dead_worker_had_is_done_again_and_comes_back_once(
    works: Any, lives: Callable[[int], str]
) -> None:
    results = list(RayEngine(nowhere).map(works.Deadly(lives(2)), range(40)))
    assert sorted(results) == [(n, 2 * n) for n in range(40)]


@pytest.mark.usefixtures("cluster", "no_delay")
def test_work_that_kills_every_worker_is_given_up(works: Any, lives: Callable[[int], str]) -> None:
    with pytest.raises(SubnetError) as caught:
        list(RayEngine(nowhere).map(works.Deadly(lives(100)), range(40)))
    text = str(caught.value)
    assert text.startswith(
        "a worker of the Ray cluster died 4 times over the same work: WorkerCrashedError: "
    )
    assert text.endswith(
        '; look into the logs of its workers (ray logs), or take engine="threads" '
        "(--subnet-engine threads)"
    )


@pytest.mark.usefixtures("cluster")
def test_work_that_cannot_arrive_is_an_error(works: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "no_such_module_on_the_worker", sys)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_on_the_worker") as caught:
        list(RayEngine(nowhere).map(works.Unpicklable(), range(3)))
    assert caught.value.__notes__[0].startswith("on the Ray node ")


def test_an_error_of_the_work_is_raised_as_itself(
    cluster: Any, checkpoints: Path, tmp_path: Path
) -> None:
    for name in ("base", "step-1"):
        (tmp_path / name).write_bytes((checkpoints / name / "model.safetensors").read_bytes())
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    cut = tmp_path / "step-1.safetensors"
    pair = open_pair(tmp_path / "base.safetensors", cut, engine="ray")
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(CheckpointError) as caught:
        scan(pair, range(len(pair.tensors)), ())
    assert type(caught.value) is CheckpointError
    assert str(caught.value) == (
        f"{cut} ends at byte {cut.stat().st_size:,}, before the data its header lists; it was cut "
        "short, save or download it again"
    )
    assert caught.value.__notes__[0].startswith("on the Ray node ")


def test_a_file_that_is_gone_is_named(cluster: Any, checkpoints: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes((checkpoints / "step-1" / "model.safetensors").read_bytes())
    pair = open_pair(checkpoints / "base", gone, engine="ray")
    gone.unlink()
    with pytest.raises(CheckpointError) as caught:
        scan(pair, [0], ())
    assert str(caught.value) == (
        f"cannot read {gone}: No such file or directory; is the disk still there?"
    )


def test_what_is_at_an_address_is_fetched_by_the_workers(
    cluster: Any, checkpoints: Path, small_units: None
) -> None:
    files = {
        f"/{name}/model.safetensors": (checkpoints / name / "model.safetensors").read_bytes()
        for name in ("base", "step-2")
    }
    here = pair_of(checkpoints, "threads")
    expected, bits = scan(here, range(42), ()), update_mask(here)
    ranks = update_rank(here, include="*.[0-3].*")
    with running(FileServer(files)) as server:
        address = f"{server.address}/step-2?token=s3cret"  # a query that the server does without
        for base in (f"{server.address}/base", checkpoints / "base"):
            there = open_pair(base, address, engine="ray")
            assert_same(scan(there, range(42), ()), expected)
            mask = update_mask(there)
            assert all(np.array_equal(mask[name], bits[name]) for name in bits)
            found = update_rank(there, include="*.[0-3].*")
            assert [each[:7] for each in found.per_tensor] == [e[:7] for e in ranks.per_tensor]
        server.files["/step-2/model.safetensors"] = files["/base/model.safetensors"]
        with pytest.raises(CheckpointError) as caught:
            update_mask(there, atol=1e-3)
    assert str(caught.value) == (
        f"{server.address}/step-2 changed after the pair was opened; wait until it is written, "
        "then open the pair again"
    )


def test_what_is_in_memory_does_not_travel(checkpoints: Path) -> None:
    weights = {"a.weight": torch.zeros(4, 4)}
    pair = open_pair(weights, {"a.weight": torch.ones(4, 4)}, engine="ray")
    for measure in (update_sparsity, update_mask, update_rank):
        with pytest.raises(CheckpointError) as caught:
            measure(pair)
        assert str(caught.value) == (
            'engine="ray" (--subnet-engine ray) reads files where its workers are, and a.weight of '
            "dict of tensors is in no file as it is compared: it is in memory, compressed or "
            'computed; save the model first, or take engine="threads"'
        )


def test_work_goes_only_where_the_files_are(
    cluster: Any,
    checkpoints: Path,
    small_units: None,
    works: Any,
    diary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = nodes_of(connect(), gpus=False)[1].id

    def survey(_: Any, nodes: Sequence[Node], paths: Sequence[str]) -> Survey:
        seen = {node.id: frozenset(paths if node.id == only else ()) for node in nodes}
        return Survey(seen, ())

    monkeypatch.setattr(ray_engine, "survey", survey)
    monkeypatch.setattr(gathering, "engine_of", Watched(works, diary, lambda: None))
    pair = pair_of(checkpoints, "ray")
    scan(pair, range(0, 40, 8), ())
    assert set(entries(diary)) == {only}


def test_at_most_two_tasks_a_slot_are_under_way(
    cluster: Any, works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = []
    submit = ray_engine._Run._submit

    def watched(run: Any, nodes: Sequence[Node]) -> None:
        submit(run, nodes)
        under_way.append(len(run._running))

    monkeypatch.setattr(ray_engine._Run, "_submit", watched)
    slots = sum(node.slots for node in nodes_of(connect(), gpus=False))
    list(RayEngine(nowhere, together=1).map(works.Deadly("nowhere"), [1] * 30))
    assert max(under_way) == 2 * slots


def interrupt(results: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())


@pytest.mark.parametrize("end", [lambda results: results.close(), interrupt])
def test_the_end_stops_the_workers(
    cluster: Any, works: Any, diary: Path, end: Callable[[Any], None]
) -> None:
    engine = RayEngine(nowhere, together=8)
    results = engine.map(works.Slow(works.Deadly("nowhere"), str(diary)), [1] * 1000)
    next(results)  # of four tasks, one at least is done and two at least are not
    end(results)
    time.sleep(1.5)
    begun = len(entries(diary))
    time.sleep(1.5)
    assert len(entries(diary)) == begun < 4 * 8


def test_a_gpu_that_no_node_has_is_an_error(cluster: Any, checkpoints: Path) -> None:
    pair = open_pair(checkpoints / "base", checkpoints / "step-1", device="cuda:3", engine="ray")
    with pytest.raises(SubnetError) as caught:
        update_sparsity(pair)
    names = ", ".join(node.name for node in nodes_of(connect(), gpus=False))
    assert str(caught.value) == (
        f"no node of the Ray cluster has a GPU to work on (2 alive: {names}); add one, compare on "
        'the CPU with device="cpu" (--subnet-device cpu), or take engine="threads" '
        "(--subnet-engine threads)"
    )


def test_a_connection_that_was_there_is_left_alone(cluster: Any, checkpoints: Path) -> None:
    disconnect()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert update_sparsity(pair_of(checkpoints, "ray")).updated > 0
        disconnect()
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_two_threads_share_a_connection(cluster: Any) -> None:
    disconnect()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(connect())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ray] * 3
    disconnect()
    assert not ray.is_initialized()


LOCALLY = """
import sys, threading
from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.scan.ray_cluster import disconnect

pair = open_pair("base", "step-2", engine="ray")
print(update_sparsity(pair).updated)
import ray
print(ray.cluster_resources()["CPU"] >= 1)
disconnect()
print(ray.is_initialized())
"""


def test_without_an_address_a_cluster_is_started_and_stopped(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", LOCALLY],
        cwd=checkpoints,
        capture_output=True,
        text=True,
        timeout=120,
    )
    updated = update_sparsity(pair_of(checkpoints, None)).updated
    assert done.stdout.splitlines() == [str(updated), "True", "False"]
    assert done.stderr == ""


def test_no_file_of_a_pair_on_any_node_is_an_error_that_says_where() -> None:
    survey = Survey(
        {"1": frozenset(["/b"]), "2": frozenset(["/t"])},
        [
            ("10.0.0.1", {"/t": "cannot be read there (No such file or directory)"}),
            ("10.0.0.2", {"/b": "is another file there (other size or modification time)"}),
            ("10.0.0.3", "gave no answer within 60 seconds"),
            *((f"10.0.0.{n}", {"/b": "cannot be read there (x)"}) for n in (4, 5)),
        ],
    )
    assert survey.nodes_with(["/b"]) == {"1"}
    assert survey.nodes_with([]) == {"1", "2"}  # what is at an address only
    with pytest.raises(CheckpointError) as caught:
        survey.nodes_with(["/b", "/t"])
    assert str(caught.value) == (
        "no node of the Ray cluster can read all that is compared: 10.0.0.1: /t cannot be read "
        "there (No such file or directory); 10.0.0.2: /b is another file there (other size or "
        "modification time); 10.0.0.3: gave no answer within 60 seconds (and 2 more nodes); put "
        'both checkpoints on a file system that the nodes share, or take engine="threads" '
        "(--subnet-engine threads)"
    )


def test_no_node_that_can_work_is_an_error_that_says_why() -> None:
    survey = Survey({}, [("10.0.0.1", "has pytest-subnet 0.1, which is 0.2 here")])
    with pytest.raises(CheckpointError) as caught:
        survey.nodes_with([])
    assert str(caught.value) == (
        "no node of the Ray cluster can read all that is compared: 10.0.0.1: has pytest-subnet "
        "0.1, which is 0.2 here; have a node that answers, with the same pytest-subnet as here, or "
        'take engine="threads" (--subnet-engine threads)'
    )


def test_a_copy_is_told_from_another_file_of_that_name(tmp_path: Path) -> None:
    import os
    import shutil

    here, copy, other = (tmp_path / name for name in ("here", "copy", "other"))
    here.write_bytes(b"x" * 10)
    shutil.copy2(here, copy)
    other.write_bytes(b"y" * 10)
    os.utime(other, (1, 1))
    found = ray_cluster.look([str(each) for each in (here, copy, other, tmp_path / "none")])[1]
    assert found[str(here)] == found[str(copy)] != found[str(other)]
    assert found[str(tmp_path / "none")] == "No such file or directory"


def test_the_engine_is_a_thread_engine_by_default(checkpoints: Path) -> None:
    for engine in (None, "threads"):
        pair = pair_of(checkpoints, engine)
        assert isinstance(gathering.engine_of(pair, nowhere), ThreadEngine)
