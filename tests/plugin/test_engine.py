"""--subnet-engine and its ini key."""

import importlib.util

import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray]")

SHOWS_ENGINE = """
    def test_engine(model_pair, open_trajectory):
        run = open_trajectory(["base", "tuned"])
        print("engines", model_pair.engine, run.pairs[0].engine)
"""


@pytest.mark.parametrize("value", ["rays", "RAY", "dask", "thread"])
def test_an_unknown_engine_is_a_usage_error(project, value):
    result = project.runpytest(f"--subnet-engine={value}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: --subnet-engine (or subnet_engine) is '{value}'; it takes threads or ray"]
    )


def test_an_unknown_engine_in_the_ini_file_is_a_usage_error(project):
    project.makeini("[pytest]\nsubnet_engine = spark")

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --subnet-engine (or subnet_engine) is 'spark'; *"])


@pytest.mark.parametrize(
    ("arguments", "ini", "engine"),
    [
        ((), "", None),
        ((), "ray", "ray"),
        (("--subnet-engine=ray",), "", "ray"),
        (("--subnet-engine=threads",), "ray", "threads"),
    ],
)
def test_pairs_and_runs_have_the_engine_that_was_asked_for(
    project, pair_options, arguments, ini, engine
):
    project.makeini(f"[pytest]\nsubnet_engine = {ini}")
    project.makepyfile(SHOWS_ENGINE)

    result = project.runpytest("-s", *pair_options, *arguments)

    result.stdout.fnmatch_lines([f"*engines {engine} {engine}"])


def test_the_engine_is_shown(project):
    result = project.runpytest("--subnet-device=cpu", "--subnet-engine=ray")

    assert "subnet: device cpu, engine ray" in result.outlines


def test_threads_is_what_there_is_without_it(project, gate, pair_options):
    result = project.runpytest(*pair_options, "--subnet-engine=threads")

    result.assert_outcomes(passed=1, failed=1)


def test_the_gpus_of_a_cluster_need_not_be_here(project, pair_options, monkeypatch):
    project.makeconftest("import torch\ntorch.cuda.is_available = lambda: False")
    project.makepyfile(
        """
        def test_pair(model_pair):
            assert (model_pair.device, model_pair.engine) == ("cuda", "ray")
        """
    )
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", torch.cuda.is_available)

    result = project.runpytest(*pair_options, "--subnet-device=cuda", "--subnet-engine=ray")

    result.assert_outcomes(passed=1)


def test_without_ray_the_gate_is_an_error_that_says_what_to_install(run_apart, gate, pair_options):
    gate.with_name("conftest.py").write_text("import sys\nsys.modules['ray'] = None\n")

    result = run_apart(*pair_options, "--subnet-engine=ray")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            'E*SubnetError: engine="ray" (--subnet-engine ray) needs Ray, which cannot be imported '
            "(import of ray halted; None in sys.modules); install it with pip install "
            'pytest-subnet[[]ray], or take engine="threads" (--subnet-engine threads)'
        ]
    )


@needs_ray
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "[[]Errno *] Connection refused"),
        ("ray://127.0.0.1:1", "[[]Errno *] Connection refused"),
        ("somewhere", "it takes HOST:PORT, ray://HOST:PORT, auto or local"),
        ("127.0.0.1:99999", "*"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_an_error(
    run_apart, gate, pair_options, monkeypatch, address, reason
):
    monkeypatch.setenv("RAY_ADDRESS", address)

    result = run_apart(*pair_options, "--subnet-engine=ray")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            f"E*SubnetError: no Ray cluster at RAY_ADDRESS={address}: {reason}; start it (ray "
            'start --head), correct or unset RAY_ADDRESS, or take engine="threads" '
            "(--subnet-engine threads)"
        ]
    )


@needs_ray
def test_weights_in_memory_are_refused(run_apart, project):
    project.makepyfile(
        """
        import torch
        from pytest_subnet import assert_update_sparsity

        def test_memory(open_model_pair):
            pair = open_model_pair({"a": torch.zeros(3)}, {"a": torch.ones(3)})
            assert_update_sparsity(pair, at_least=0.5)
        """
    )

    result = run_apart("--subnet-engine=ray")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(['E*CheckpointError: engine="ray" (--subnet-engine ray) reads *'])


@needs_ray
@pytest.mark.slow
def test_a_local_cluster_gives_the_verdicts_of_threads_and_is_stopped(
    run_apart, gate, pair_options, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gate.with_name("conftest.py").write_text(
        """
import sys

def pytest_unconfigure():
    ray = sys.modules["ray"]
    print("still connected:", ray.is_initialized())
"""
    )

    result = run_apart("-Werror", "-Wignore::ResourceWarning", *pair_options, "--subnet-engine=ray")

    result.assert_outcomes(passed=1, failed=1)
    assert "still connected: False" in result.outlines
