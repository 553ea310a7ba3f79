"""The program as a whole: exit codes, what it imports, interruptions, outputs that close."""

import errno
import io
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from pytest_subnet import __version__
from pytest_subnet.cli import main

COMMANDS = ("diff", "mask", "overlap", "suggest")
HELP = """\
usage: pytest-subnet [-h] [--version] COMMAND ...

What fine-tuning did to a model's weights.

positional arguments:
  COMMAND
    diff      show what moved between two checkpoints
    mask      save which entries an update touched
    overlap   compare two masks, or the updates of two runs
    suggest   print a policy with bounds around what a pair shows

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

BASE and TUNED are a file, a directory, a hub id (org/name[@revision]) or an address (hf://,
https://, s3://, gs://). Exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted.
"""


def test_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    assert run("--help") == (0, HELP, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    code, shown, _ = run(command, "--help")

    assert code == 0
    assert shown.startswith(f"usage: pytest-subnet {command} [-h]")


def test_version(run):
    assert run("--version") == (0, f"pytest-subnet {__version__}\n", "")


def test_the_script_is_this_program():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))

    assert pkgutil.resolve_name(project["project"]["scripts"]["pytest-subnet"]) is main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pytest-subnet: error: the following arguments are required: COMMAND"),
        (
            ["diff", "base"],
            "pytest-subnet diff: error: the following arguments are required: TUNED",
        ),
        (
            ["mask", "base", "tuned"],
            "pytest-subnet mask: error: the following arguments are required: -o/--output",
        ),
        (
            ["mask", "a", "b", "-o", "m", "--atol", "much"],
            "pytest-subnet mask: error: argument --atol: 'much' is not a finite number of at least "
            "0",
        ),
        (
            ["mask", "a", "b", "-o", "m", "--atol", "nan"],
            "pytest-subnet mask: error: argument --atol: 'nan' is not a finite number of at least "
            "0",
        ),
        (
            ["mask", "a", "b", "-o", "m", "--atol", "1", "--rtol", "1"],
            "pytest-subnet mask: error: argument --rtol: not allowed with argument --atol",
        ),
        (
            ["diff", "a", "b", "--device", "gpu"],
            "pytest-subnet diff: error: argument --device: 'gpu' is none of cpu, cuda, cuda:N",
        ),
        (
            ["diff", "a", "b", "--device", "cuda:99999999999999999999"],
            "pytest-subnet diff: error: argument --device: 'cuda:99999999999999999999' is none of "
            "cpu, cuda, cuda:N",
        ),
        (
            ["overlap", "a", "b", "--as-dtype", "float32"],
            "pytest-subnet overlap: error: --as-dtype says how checkpoints are compared, and masks "
            "have their entries already; give --base and two tuned models",
        ),
    ],
)
def test_wrong_usage_exits_with_2(run, arguments, message):
    code, shown, complaint = run(*arguments)

    assert (code, shown) == (2, "")
    assert complaint.splitlines()[-1] == message


def test_what_cannot_be_done_is_one_line_and_exits_with_1(run_apart):
    found = run_apart("diff", "nowhere\x1b[31m", "tuned")

    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("pytest-subnet: no checkpoint at nowhere\\x1b[31m: there is no")
    assert len(found.stderr.splitlines()) == 1


def test_no_token_is_shown_in_an_error(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, _, complaint = run("diff", "./hf_AbCdEfGhIjKlMnOpQrStUvWx/base", "tuned")

    assert code == 1
    assert complaint.startswith("pytest-subnet: ")
    assert "hf_…/base" in complaint
    assert "AbCdEf" not in complaint


def imported(found):
    """The modules that a process with `-X importtime` imported."""
    lines = re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", found.stderr, re.MULTILINE)
    return {name.partition(".")[0] for name in lines}


def test_help_imports_nothing_heavy(run_apart, environment):
    # What measures coverage imports much itself.
    bare = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    found = run_apart("--help", python=["-X", "importtime"], env=bare)

    modules = imported(found)
    assert "argparse" in modules
    assert modules.isdisjoint({"pytest", "numpy", "torch", "numba", "dataclasses", "pathlib"})


@pytest.mark.usefixtures("pair")
def test_diff_imports_neither_torch_nor_pytest(run_apart):
    found = run_apart("diff", "base", "tuned", python=["-X", "importtime"])

    modules = imported(found)
    assert found.returncode == 0
    assert "numba" in modules
    assert modules.isdisjoint({"torch", "transformers", "pytest", "_pytest", "jinja2", "plotly"})


@pytest.mark.parametrize("arguments", [["--help"], ["diff", "base", "tuned"]])
@pytest.mark.usefixtures("pair")
def test_a_reader_that_has_left_is_no_error(run_apart, arguments):
    reader, writer = os.pipe()
    os.close(reader)

    found = run_apart(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)

    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")


@pytest.mark.usefixtures("pair")
def test_head_takes_the_first_line(bash, tmp_path, environment):
    program = shlex.join([sys.executable, "-m", "pytest_subnet.cli"])
    script = f"{program} diff -v base tuned | head -1; echo ${{PIPESTATUS[0]}}"

    found = subprocess.run(
        [bash, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    first, code = found.stdout.splitlines()
    assert first == "base -> tuned"
    assert int(code) in (0, 141)
    assert found.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["diff", "base", "tuned"]])
@pytest.mark.usefixtures("pair")
def test_a_full_disk_is_one_line(run_apart, arguments):
    with open("/dev/full", "w") as full:
        found = run_apart(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)

    reason = os.strerror(errno.ENOSPC)
    assert found.returncode == 1
    assert found.stderr == f"pytest-subnet: cannot write the output: {reason}\n"


def test_an_output_that_was_closed_before_takes_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)

    assert main(["diff", *pair, "--json", "out.json"]) == 0

    sys.stdout.close()
    assert json.loads((tmp_path / "out.json").read_text())["version"] == 1


def test_a_terminal_without_blocks_gets_digits(pair, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))

    assert main(["diff", *pair]) == 0

    assert b"layers 0-1  88" in shown.getvalue()


def write_sparse(directory, gigabytes):
    """A checkpoint of zeros that takes no room on the disk."""
    directory.mkdir()
    rows = gigabytes * 1024
    tensor = {"dtype": "BF16", "shape": [rows, 2**19], "data_offsets": [0, rows * 2**20]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 2**20)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_scan(tmp_path, environment):
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    for name in ("base", "tuned"):
        write_sparse(tmp_path / name, gigabytes=100)
    ours, theirs = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, 100))
    running = subprocess.Popen(
        [sys.executable, "-m", "pytest_subnet.cli", "diff", "base", "tuned"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        # Where these tests run in the background, the signal is ignored, and so it would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    # Where something is wrong it would read for an hour.
    deadline = threading.Timer(60, running.kill)
    deadline.start()
    seen = b""
    try:
        while part := os.read(ours, 4096):
            if b"comparing" in part and b"comparing" not in seen:  # the bar: it is in the middle
                running.send_signal(signal.SIGINT)
            seen += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    shown, _ = running.communicate()
    deadline.cancel()

    assert running.returncode == 130, seen.decode()
    assert shown == b""
    assert seen.decode().splitlines()[-1].endswith("pytest-subnet: interrupted")
    assert b"Traceback" not in seen
    assert b"Exception ignored" not in seen
