"""For all tests: pytest inside pytest, and the documentation's code blocks as tests.

Each page of the documentation, and each docstring, runs in a directory of its own which holds the
checkpoints `base` and `tuned`, and `adapter`, one on `base`. In a page, blocks of Python run one
after the other; a block whose first line names a file (`# test_release.py`) becomes that file; a
console block runs its commands and holds what they print to the lines below each, in which `*`
stands for anything.
"""

from __future__ import annotations

import atexit
import contextlib
import doctest
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser
from sybil.parsers.rest import DocTestParser

pytest_plugins = ["pytester"]

_TOOLS = {
    "python": sys.executable,
    "pytest": f"{sys.executable} -m pytest -p no:cacheprovider",
    "pytest-subnet": f"{sys.executable} -m pytest_subnet.cli",
}
_TOOL = re.compile(rf"^({'|'.join(_TOOLS)})(?= )")
_HERE = re.compile(r"(pytest|python \w+\.py)( [^|&;<>$]*)?")
# The second would collect garbage five times at the end of each run.
_HERE_WITHOUT = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
_UNNEEDED = "-p no:hypothesispytest -p no:anyio"  # plugins that take long to import
# Pages record baselines, and show failures that are none of the run that executes them.
_ENVIRONMENT = {"COLUMNS": "200", "CI": "", "GITHUB_ACTIONS": ""}
_TRAINS = ("laboratories.py",)  # docstrings that do
_STARTS = {"run_apart"}  # fixtures that start a process each time
_FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|toml|ini))\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--inside", default="", help="options of each pytest that runs inside pytest")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow by themselves: pages, which run whole programs, and tests that start processes."""
    for item in items:
        a_page = item.path.suffix == ".md" or item.path.name in _TRAINS
        if a_page or _STARTS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def make_pair(root: Path) -> None:
    """Write a tiny Llama as `base`, and with 5 % of its projections moved as `tuned`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, vocab_size=256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(root / "base")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("_proj.weight"):
                    weight += (torch.rand_like(weight) < 0.05) * 0.01
        model.save_pretrained(root / "tuned")


def make_adapter(root: Path) -> None:
    """Write `adapter` for the `base` that `make_pair` writes: LoRA of rank 4, as peft saves it."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for module, width in (("self_attn.q_proj", 64), ("mlp.down_proj", 128)):
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, width, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.0002 * torch.randn(64, 4, generator=generator)
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, root / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the checkpoints `base` and `tuned`; not to be written to."""
    root = tmp_path_factory.mktemp("llama")
    make_pair(root)
    return root


@functools.cache
def _checkpoints() -> Path:
    """The checkpoints that pages and docstrings speak of, written once in a process."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)  # on busy cores, models this small take five times as long with two
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    make_pair(root)
    make_adapter(root)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    model.save_pretrained(root / "tied_base")
    with torch.no_grad():
        model.transformer.wte.weight += 1
    model.save_pretrained(root / "tied_tuned")
    return root


@functools.cache
def _laboratory() -> Path:
    """Where pages and docstrings keep the laboratory, which takes seconds to train."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return root


class _Page:
    """The directory in which the examples of one page run."""

    def setup(self, namespace: dict[str, object]) -> None:
        self.before = Path.cwd()
        self.directory = Path(tempfile.mkdtemp())
        os.chdir(self.directory)
        shutil.copytree(_checkpoints(), self.directory, dirs_exist_ok=True)
        Path(".laboratory").symlink_to(_laboratory())
        namespace["__name__"] = "__main__"

    def teardown(self, namespace: dict[str, object]) -> None:
        os.chdir(self.before)
        shutil.rmtree(self.directory)


class _Docstring(_Page):
    """The same, with the pair and the model that docstrings speak of."""

    def setup(self, namespace: dict[str, object]) -> None:
        super().setup(namespace)
        import torch

        import pytest_subnet
        from pytest_subnet import open_pair

        base = {
            "model.embed_tokens.weight": torch.ones(4, 4, dtype=torch.bfloat16),
            "model.layers.0.mlp.up_proj.weight": torch.ones(5, 8, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
        }
        tuned = {name: tensor.clone() for name, tensor in base.items()}
        tuned["model.layers.0.mlp.up_proj.weight"][0, :4] += 0.25
        model = torch.nn.Linear(4, 4)

        def train_one_step(model: torch.nn.Module) -> None:
            model(torch.ones(1, 4)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()

        # What a user imports from the package; a module's own names come first.
        public = {name: getattr(pytest_subnet, name) for name in pytest_subnet.__all__}
        namespace.update({**public, **namespace})
        namespace.update(
            torch=torch,
            pair=open_pair(base, tuned),
            tied_pair=open_pair("tied_base", "tied_tuned"),
            model=model,
            train_one_step=train_one_step,
        )


def _run_python(example: Example) -> None:
    source = example.parsed
    named = _FILE_NAME.match(source)
    if named:
        Path(named[1]).write_text(source, encoding="utf-8")
        return
    line = example.line + example.parsed.line_offset
    exec(compile("\n" * line + source, example.path, "exec"), example.namespace)


def _write_file(example: Example) -> None:
    named = _FILE_NAME.match(example.parsed)
    assert named, "a block of settings starts with the name of its file"
    Path(named[1]).write_text(example.parsed, encoding="utf-8")


def _run_console(example: Example) -> None:
    for part in example.parsed.strip().split("$ ")[1:]:
        first, *expected = part.strip().splitlines()
        command = first.removesuffix("  # fails")
        run = _run_here if _HERE.fullmatch(command) else _run_apart
        status, printed = run(command)
        assert (status != 0) == (first != command), printed
        lines = iter(printed.splitlines())
        for line in expected:
            assert any(fnmatchcase(each, _pattern(line)) for each in lines), (
                f"{line!r}\n\n{printed}"
            )


def _run_here(command: str) -> tuple[int, str]:
    """`pytest …` or `python file.py` in this process, which has imported all that takes long."""
    tool, *arguments = shlex.split(command)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    modules, paths, argv = set(sys.modules), sys.path[:], sys.argv
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr("pytest_subnet.testing.fixture._of_this_run", lambda *_: _laboratory())
        warnings.resetwarnings()
        try:
            if tool == "pytest":
                status = int(pytest.main([*_HERE_WITHOUT, *arguments]))
            else:
                sys.argv = arguments
                sys.path.insert(0, str(Path.cwd()))
                runpy.run_path(arguments[0], run_name="__main__")
                status = 0
        finally:
            sys.path[:], sys.argv = paths, argv
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None)
                if file and Path(file).is_relative_to(Path.cwd()):
                    del sys.modules[name]
    printed.seek(0)
    return status, printed.read()


def _run_apart(command: str) -> tuple[int, str]:
    finished = subprocess.run(
        _TOOL.sub(lambda tool: _TOOLS[tool[1]], command),
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, **_ENVIRONMENT, "PYTEST_ADDOPTS": _UNNEEDED},
    )
    return finished.returncode, finished.stdout + finished.stderr


def _pattern(line: str) -> str:
    return line.replace("[", "[[]")


pages = Sybil(
    parsers=[
        CodeBlockParser("python", _run_python),
        CodeBlockParser("toml", _write_file),
        CodeBlockParser("console", _run_console),
    ],
    patterns=["*.md"],
    setup=(page := _Page()).setup,
    teardown=page.teardown,
)
docstrings = Sybil(
    parsers=[DocTestParser(doctest.ELLIPSIS)],
    patterns=["*.py"],
    path="pytest_subnet",
    setup=(docstring := _Docstring()).setup,
    teardown=docstring.teardown,
)
pytest_collect_file = (pages + docstrings).pytest()
