"""The laboratory in a user's suite: taken by name, made once for all workers, and kept."""

import shutil
import sys

import pytest

from pytest_subnet.testing import laboratory  # noqa: F401

TAKES = """
    import torch

    def test_trains(laboratory):
        model = laboratory.model()
        model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert model.lm_head.weight.grad.abs().sum() > 0

    def test_has_another(laboratory):
        stored = laboratory.model().state_dict()
        assert all(torch.equal(each, stored[name].float()) for name, each in stored.items())
        assert laboratory.loss < laboratory.uniform_loss - 1.5
        assert laboratory.tokenizer().decode([2]) == "<|im_end|>"
"""
SHOWS = """
    import os

    def test_where(laboratory, pytestconfig):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        print("base", worker, laboratory.base)
        assert (laboratory.base / "model.safetensors").exists()
"""
# What takes long, the training, is replaced by a copy of what it made; who makes it, where, and
# who waits for whom is real.
COPIES = """
    import os
    import shutil
    import time

    import pytest
    from pytest_subnet.testing import laboratories, laboratory

    def copy(directory, sources):
        with open(os.path.join({root!r}, "made"), "a") as file:
            file.write("once ")
        time.sleep(0.3)
        shutil.copytree({base!r}, directory, dirs_exist_ok=True)
        (directory / "contents.json").unlink()

    laboratories._make = copy
"""


@pytest.fixture
def copies(project, laboratory):  # noqa: F811
    project.makeini("[pytest]")
    project.makeconftest(COPIES.format(root=str(project.path), base=str(laboratory.base)))
    project.makepyfile(SHOWS)
    return project


def made(project):
    """How often it was made so far."""
    path = project.path / "made"
    return len(path.read_text().split()) if path.exists() else 0


def places(result):
    """Which worker has it where."""
    lines = [line.split(" ") for line in result.outlines if line.startswith("base ")]
    return {worker: place for _, worker, place in lines}


@pytest.mark.parametrize(
    "conftest",
    [
        "from pytest_subnet.testing import laboratory",
        'pytest_plugins = ["pytest_subnet.testing"]',
    ],
)
def test_a_suite_takes_it(project, laboratory, conftest):  # noqa: F811
    project.makeini("[pytest]\nfilterwarnings = error")
    project.makeconftest(conftest)
    project.makepyfile(TAKES)
    kept = project.path / ".pytest_cache" / "d" / "subnet-laboratory" / laboratory.base.name
    shutil.copytree(laboratory.base, kept)

    result = project.runpytest()

    result.assert_outcomes(passed=2)
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name]


def test_nobody_has_it_who_does_not_ask(project):
    project.makepyfile(SHOWS)
    result = project.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E       fixture 'laboratory' not found"])


@pytest.mark.parametrize(("conftest", "there"), [("", "[]"), ("laboratory", "['{}']")])
def test_it_costs_nothing_until_it_is_used(project, run_apart, conftest, there):
    names = ("pytest_subnet.testing", "torch", "transformers", "tokenizers", "numpy")
    project.makeconftest(
        f"""
        import sys
        {"from pytest_subnet.testing import laboratory" if conftest else ""}

        def pytest_unconfigure(config):
            present = [name for name in {names!r} if name in sys.modules]
            config.get_terminal_writer().line(f"imported: {{present}}")
        """
    )
    project.makepyfile("def test_own(): ...")

    result = run_apart()

    (line,) = [line for line in result.outlines if line.startswith("imported: ")]
    assert line.removeprefix("imported: ") == there.format("pytest_subnet.testing")


def test_a_second_run_opens_what_the_first_made(copies):
    runs = [copies.runpytest("-rP") for _ in range(2)]
    for result in runs:
        result.assert_outcomes(passed=1)
    assert made(copies) == 1
    assert places(runs[0]) == places(runs[1])
    (place,) = places(runs[0]).values()
    assert place.startswith(f"{copies.path}/.pytest_cache/d/subnet-laboratory/base-")

    copies.runpytest("--cache-clear").assert_outcomes(passed=1)
    assert made(copies) == 2


def test_one_that_a_test_wrote_into_is_made_anew_for_the_next_run(copies):
    first = copies.runpytest("-rP")
    (place,) = places(first).values()
    copies.makepyfile(
        test_wrong="""
        def test_wrong(laboratory):
            (laboratory.base / "adapter_config.json").write_text("{}")
        """
    )
    for _ in range(2):
        copies.runpytest().assert_outcomes(passed=2)
    assert made(copies) == 2
    assert place in places(first).values()


def test_a_cache_that_cannot_be_written_is_none(copies):
    (copies.path / ".pytest_cache").write_text("in the way")
    arguments = ("-p", "no:stepwise", "-W", "ignore::pytest.PytestCacheWarning", "-rP")

    result = copies.runpytest(*arguments)

    result.assert_outcomes(passed=1)
    (place,) = places(result).values()
    assert "/subnet-laboratory/base-" in place
    assert ".pytest_cache" not in place


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("-p", "cacheprovider"), True),
        (("-p", "cacheprovider", "--cache-clear"), False),
        pytest.param((), False, marks=pytest.mark.slow),
        pytest.param(("--basetemp=temporary",), False, marks=pytest.mark.slow),
    ],
)
def test_two_workers_share_one(copies, run_apart, options, kept):
    pytest.importorskip("xdist")
    result = run_apart("-n2", "--dist=each", "-rP", *options)

    result.assert_outcomes(passed=2)
    assert made(copies) == 1
    found = places(result)
    assert found.keys() == {"gw0", "gw1"}
    assert len(set(found.values())) == 1
    assert (".pytest_cache" in found["gw0"]) is kept
    if "--basetemp=temporary" in options:
        assert found["gw0"].startswith(f"{copies.path}/temporary/subnet-laboratory/")


def test_without_sources_it_says_so_once_and_without_a_traceback(project):
    project.makeconftest(
        """
        import sysconfig
        from pytest_subnet.testing import laboratory

        sysconfig.get_path = lambda name: "nowhere"
        """
    )
    project.makepyfile(SHOWS)
    before = __import__("sysconfig").get_path

    try:
        result = project.runpytest()
    finally:
        sys.modules["sysconfig"].get_path = before

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "nowhere/argparse.py cannot be read (FileNotFoundError); a laboratory learns from the "
            "source of Python's standard library: use an interpreter that comes with it"
        ]
    )
    result.stdout.no_fnmatch_line("*laboratories.py:*")


@pytest.mark.slow
def test_two_workers_that_train_it_train_it_once(project, run_apart):
    pytest.importorskip("xdist")
    project.makeconftest("from pytest_subnet.testing import laboratory")
    project.makepyfile(TAKES)

    result = run_apart("-n2", "--dist=each", "-p", "cacheprovider")

    result.assert_outcomes(passed=4)
    kept = list(project.path.glob(".pytest_cache/d/subnet-laboratory/base-*/model.safetensors"))
    assert len(kept) == 1
