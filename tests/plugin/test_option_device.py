"""--subnet-device, its ini key, and the fixture subnet_device."""

import pytest

SHOWS_DEVICE = """
    def test_device(subnet_device):
        print("device", subnet_device)
"""
THREE_GPUS = """
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 3
"""
NO_GPU = """
    import torch

    torch.cuda.is_available = lambda: False
"""


@pytest.fixture(autouse=True)
def _real_torch(monkeypatch):
    """Undo what the conftest files below do to torch in this process."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", torch.cuda.is_available)
    monkeypatch.setattr(torch.cuda, "device_count", torch.cuda.device_count)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda 0", "mps"])
def test_an_unknown_device_is_a_usage_error(project, value):
    result = project.runpytest(f"--subnet-device={value}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: --subnet-device (or subnet_device) is '{value}'; it takes cpu, cuda or cuda:N"]
    )


def test_an_unknown_device_in_the_ini_file_is_a_usage_error(project):
    project.makeini("[pytest]\nsubnet_device = tpu")

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --subnet-device (or subnet_device) is 'tpu'; *"])


@pytest.mark.parametrize(
    ("arguments", "conftest", "device"),
    [
        ((), NO_GPU, "cpu"),
        ((), THREE_GPUS, "cuda:0"),
        (("--subnet-device=cpu",), THREE_GPUS, "cpu"),
        (("--subnet-device=cuda",), THREE_GPUS, "cuda:0"),
        (("--subnet-device=cuda:2",), THREE_GPUS, "cuda:2"),
    ],
)
def test_the_fixture_names_a_device(project, arguments, conftest, device):
    project.makeconftest(conftest)
    project.makepyfile(SHOWS_DEVICE)

    project.runpytest("-s", *arguments).stdout.fnmatch_lines([f"*device {device}"])


def test_the_ini_key_names_a_device(project):
    project.makeini("[pytest]\nsubnet_device = cuda:1")
    project.makeconftest(THREE_GPUS)
    project.makepyfile(SHOWS_DEVICE)

    project.runpytest("-s").stdout.fnmatch_lines(["*device cuda:1"])


@pytest.mark.parametrize(
    ("worker", "asked", "device"),
    [
        ("gw1", None, "cuda:1"),
        ("gw4", None, "cuda:1"),
        ("gw4", "cuda", "cuda:1"),
        ("gw4", "cuda:2", "cuda:2"),
    ],
)
def test_workers_share_the_gpus_out(project, monkeypatch, worker, asked, device):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    project.makeconftest(THREE_GPUS)
    project.makepyfile(SHOWS_DEVICE)

    result = project.runpytest("-s", *([f"--subnet-device={asked}"] if asked else []))

    result.stdout.fnmatch_lines([f"*device {device}"])


@pytest.mark.parametrize(
    ("asked", "conftest", "count"), [("cuda", NO_GPU, 0), ("cuda:3", THREE_GPUS, 3)]
)
def test_a_gpu_that_is_not_there_is_a_failure_not_a_skip(project, asked, conftest, count):
    project.makeconftest(conftest)
    project.makepyfile(SHOWS_DEVICE)

    result = project.runpytest(f"--subnet-device={asked}")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            f"--subnet-device {asked}: torch * sees {count} CUDA devices; install a CUDA build of "
            "torch or check CUDA_VISIBLE_DEVICES, or ask for cpu"
        ]
    )
    result.stdout.no_fnmatch_line("*During handling*")


def test_a_pair_is_not_compared_elsewhere_when_the_gpu_is_missing(project, gate, pair_options):
    project.makeconftest(NO_GPU)

    result = project.runpytest(*pair_options, "--subnet-device=cuda")

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["--subnet-device cuda: torch * sees 0 CUDA devices; *"])


def test_a_pair_is_compared_on_the_device_that_was_asked_for(project, pair_options):
    project.makepyfile(
        """
        def test_pair(model_pair):
            assert model_pair.device == "cpu"
        """
    )

    project.runpytest(*pair_options, "--subnet-device=cpu").assert_outcomes(passed=1)


def test_a_driver_that_torch_warns_of_does_not_fail_a_test(project):
    project.makeconftest(
        """
        import warnings
        import torch

        def is_available():
            warnings.warn("CUDA initialization: the driver is too old")
            return False

        torch.cuda.is_available = is_available
        """
    )
    project.makepyfile(SHOWS_DEVICE)

    project.runpytest("-Werror").assert_outcomes(passed=1)
