"""The scan cache: a second run, and every worker but the first, reads nothing."""

import os
import shutil
import subprocess
import time

import pytest

from pytest_subnet.scan.cache import _TICK_NS

MEASURES = """
    import pytest
    from pytest_subnet import assert_frozen, assert_update_sparsity, update_sparsity

    @pytest.mark.parametrize("atol", [None, 1e-5, 0.25])
    def test_holds(model_pair, atol):
        assert_update_sparsity(model_pair, at_least=0.8, atol=atol)

    def test_fails(model_pair):
        assert_frozen(model_pair, "*up_proj*")
"""
ALL_TAKEN = "scan cache: nothing read, 4 tensors taken from it"


@pytest.fixture
def ready(project):
    """The project with tests that measure its pair, whose files are older than a tick."""
    project.makeini("[pytest]\nsubnet_tolerances =\n    atol=0.25")
    project.makepyfile(MEASURES)
    time.sleep(_TICK_NS / 1e9 + 0.02)


@pytest.fixture
def run(ready, project, pair_options):
    """Runs pytest with its cache."""
    return lambda *more: project.runpytest(*pair_options, *more)


@pytest.fixture
def run_on_two_workers(ready, run_apart, pair_options):
    """The same under xdist, in processes of their own."""
    pytest.importorskip("xdist")
    return lambda *more: run_apart("-n2", "-p", "cacheprovider", *pair_options, *more)


def hits(result):
    """What the run says of the scan cache."""
    return [line for line in result.outlines if line.startswith("scan cache")]


def shown(result):
    """All else that it says, without how long it took."""
    said = [line for line in result.outlines if not line.startswith("scan cache")]
    return [line for line in said if not line.startswith("====") or " in " not in line]


def test_a_second_run_reads_nothing_and_says_so(run):
    first, second = run(), run()

    first.assert_outcomes(passed=3, failed=1)
    second.assert_outcomes(passed=3, failed=1)
    assert (hits(first), hits(second)) == ([], [ALL_TAKEN])
    assert shown(first) == shown(second)


def test_without_pytests_cache_every_run_reads(run, project):
    runs = [run("-p", "no:cacheprovider") for _ in range(2)]

    for result in runs:
        result.assert_outcomes(passed=3, failed=1)
        assert hits(result) == []
    assert shown(runs[0]) == shown(runs[1])
    assert not (project.path / ".pytest_cache").exists()


def test_cache_clear_clears_it(run, project):
    run()
    kept = list(project.path.glob(".pytest_cache/d/subnet/*.counts"))
    assert len(kept) == 1

    assert hits(run("--cache-clear")) == []
    assert hits(run()) == [ALL_TAKEN]


def test_files_that_were_written_to_are_read_again(run, project):
    run()
    weights = project.path / "tuned" / "model.safetensors"
    shutil.copy(weights, project.path / "copy")
    subprocess.run(["cp", "-p", project.path / "copy", weights], check=True)
    time.sleep(_TICK_NS / 1e9 + 0.02)

    assert hits(run()) == []
    assert hits(run()) == [ALL_TAKEN]


def test_another_model_of_the_same_size_in_the_same_place_is_judged_by_itself(run, project):
    run().assert_outcomes(passed=3, failed=1)
    weights = project.path / "tuned" / "model.safetensors"
    before = weights.stat()
    shutil.copyfile(project.path / "base" / "model.safetensors", weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size

    result = run()
    result.assert_outcomes(passed=1, failed=3)
    assert hits(result) == []
    result.stdout.fnmatch_lines(["*nothing moved*"])


def test_a_damaged_cache_is_read_past(run, project):
    run()
    (kept,) = project.path.glob(".pytest_cache/d/subnet/*.counts")
    kept.write_bytes(b"damaged")

    result = run("-Werror")
    result.assert_outcomes(passed=3, failed=1)
    assert hits(result) == []
    assert hits(run()) == [ALL_TAKEN]


def test_a_cache_that_cannot_be_written_is_none(run, project):
    (project.path / ".pytest_cache").write_text("in the way")

    result = run("-p", "no:stepwise", "-W", "ignore::pytest.PytestCacheWarning")
    result.assert_outcomes(passed=3, failed=1)
    assert hits(result) == []


def test_a_pair_in_memory_is_measured_each_time(run, project):
    project.makepyfile(
        """
        import torch
        from pytest_subnet import update_sparsity

        def test_memory(open_model_pair):
            base = {"w": torch.zeros(4)}
            assert update_sparsity(open_model_pair(base, {"w": torch.ones(4)})).updated == 4
        """
    )
    for _ in range(2):
        result = run()
        result.assert_outcomes(passed=1)
        assert hits(result) == []


def test_workers_share_one_scan(run_on_two_workers, run):
    first = run_on_two_workers("--dist=each")  # every worker runs every test
    first.assert_outcomes(passed=6, failed=2)
    assert hits(first) == ["scan cache: 4 tensors read, 4 tensors taken from it"]

    assert hits(run()) == [ALL_TAKEN]


def test_what_each_worker_read_is_put_together(run_on_two_workers, run, project):
    project.makepyfile(
        """
        import pytest
        from pytest_subnet import update_sparsity

        @pytest.mark.parametrize("layer", [0, 1])
        def test_layer(model_pair, layer):
            assert update_sparsity(model_pair, include=f"*.{layer}.*").updated == 4 * (layer + 1)
        """
    )
    first, second = run_on_two_workers(), run()

    first.assert_outcomes(passed=2)
    assert hits(first) == []
    second.assert_outcomes(passed=2)
    assert hits(second) == ["scan cache: nothing read, 2 tensors taken from it"]


def test_a_worker_that_dies_in_its_scan_is_not_waited_for(run_on_two_workers, project):
    project.makepyfile(
        """
        import os
        import time
        from pytest_subnet import update_sparsity
        from pytest_subnet.scan import gathering

        def test_dies(model_pair, pytestconfig, monkeypatch):
            scans = pytestconfig.rootpath / "scans"

            def die(*_):
                scans.touch()
                os._exit(9)

            if pytestconfig.workerinput["workerid"] == "gw0":
                monkeypatch.setattr(gathering, "scan", die)
            while pytestconfig.workerinput["workerid"] == "gw1" and not scans.exists():
                time.sleep(0.01)
            update_sparsity(model_pair)
        """
    )
    result = run_on_two_workers("--dist=each", "--max-worker-restart=0")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*worker 'gw0' crashed*"])


def test_what_was_measured_of_matrices_is_not_measured_again(run, project):
    project.makepyfile(
        """
        from pytest_subnet import displacement_rank, singular_rotation, update_sparsity

        def test_matrices(model_pair):
            assert update_sparsity(model_pair).updated
            assert displacement_rank(model_pair).per_tensor
            assert singular_rotation(model_pair, k=1, null=None).per_tensor
        """
    )
    runs = [run() for _ in range(2)]

    for result in runs:
        result.assert_outcomes(passed=1)
    assert [hits(result) for result in runs] == [
        [],
        ["scan cache: nothing read, 10 tensors taken from it"],  # 4, and twice the matrices
    ]
    assert hits(run("--cache-clear")) == []
