"""What the command line and the ini file ask for, read and checked once at the start."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.devices import is_device
from pytest_subnet.text import redacted, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.scan.tolerance import Tolerance

_TOLERANCE = re.compile(r"(?P<kind>atol|rtol)=(?P<value>\S+)")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings for one run.

    Attributes:
        base: where `model_pair` finds the base: an absolute path or a hub id.
        tuned: where it finds the tuned checkpoint.
        device: the device that was asked for by name; None leaves the choice.
        engine: who does the work, `"threads"` or `"ray"`; None is threads.
        tolerances: counted in every scan, besides same bits and 1e-5.
        root: pytest's rootdir, from which paths are shown.
        from_ini: a sentence on which of the two sources the ini file names; empty for none.
        report: the file to write the run's report to: an absolute path; None writes none.
        write_baselines: record results instead of comparing them with those recorded.
        strict: fail for what would only be skipped or warned of.
    """

    base: str | None
    tuned: str | None
    device: str | None
    engine: str | None
    tolerances: tuple[str, ...]
    root: Path
    from_ini: str = ""
    report: Path | None = None
    write_baselines: bool = False
    strict: bool = False

    def parsed_tolerances(self) -> tuple[Tolerance, ...]:
        """The tolerances as the scan takes them."""
        from pytest_subnet.scan.tolerance import Tolerance

        return tuple(Tolerance(**_split_tolerance(text)) for text in self.tolerances)

    def header(self) -> str | None:
        """One line on what changes a verdict; None when nothing was set."""
        sources = {"base": self.base, "tuned": self.tuned}
        parts = [
            f"{name} {safe(redacted(shown(path, self.root)))}"
            for name, path in sources.items()
            if path
        ]
        if self.device:
            parts.append(f"device {self.device}")
        if self.engine:
            parts.append(f"engine {self.engine}")
        if self.tolerances:
            parts.append("also counting " + ", ".join(map(safe, self.tolerances)))
        if self.strict:
            parts.append("strict")
        if self.write_baselines:
            parts.append("writing baselines, comparing with none")
        return f"subnet: {', '.join(parts)}" if parts else None

    def missing(self) -> str:
        """What to set where a source is not named."""
        if self.base is None and self.tuned is None:
            return (
                "model_pair has no checkpoints: pass --subnet-base and --subnet-tuned on the "
                "command line, set subnet_base and subnet_tuned in the ini file, or mark the test "
                "with @pytest.mark.model_pair(base=…, tuned=…)"
            )
        side = "base" if self.base is None else "tuned"
        return (
            f"model_pair has no {side} checkpoint: pass --subnet-{side} on the command line, or "
            f"set subnet_{side} in the ini file"
        )


settings_key = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare the options and their ini keys."""
    group = parser.getgroup("subnet", "weights of fine-tuned models (pytest-subnet)")
    for name, metavar, what in (
        ("base", "PATH_ID_OR_URL", "the model before fine-tuning, for model_pair and policies"),
        ("tuned", "PATH_ID_OR_URL", "the model after fine-tuning"),
        ("device", "DEVICE", "where to compare: cpu, cuda or cuda:N (fails where there is none)"),
        ("engine", "ENGINE", "who works: threads, or ray (RAY_ADDRESS or a local cluster)"),
    ):
        group.addoption(f"--subnet-{name}", metavar=metavar, help=what)
        parser.addini(f"subnet_{name}", what, type="string", default="")
    group.addoption(
        "--subnet-report",
        metavar="FILE",
        help="write a report of the run: FILE ends in .html, .json or .md",
    )
    parser.addini(
        "subnet_report", "as --subnet-report; relative to rootdir", type="string", default=""
    )
    group.addoption(
        "--subnet-write-baselines",
        action="store_true",
        help="record the results that subnet_baseline checks, instead of comparing them",
    )
    group.addoption(
        "--subnet-strict",
        action="store_true",
        help="fail for what would be skipped (a missing GPU, checkpoint, extra or baseline), for "
        "baselines that no test used and for bounds that nothing can fail",
    )
    parser.addini("subnet_strict", "as --subnet-strict", type="bool", default=False)
    parser.addini(
        "subnet_tolerances",
        "tolerances to count in every scan besides same bits and atol=1e-5, one a line: "
        "atol=1e-6 or rtol=1e-3",
        type="linelist",
        default=[],
    )


def read_settings(config: pytest.Config) -> Settings:
    """Read every option and ini key; a wrong one is a `UsageError` that names it."""
    names = ("base", "tuned", "device", "engine", "tolerances", "strict")
    ini = {name: _read_ini(config, name) for name in names}
    device = _option(config, "device") or str(ini["device"]) or None
    if device is not None and not is_device(device):
        raise pytest.UsageError(
            f"--subnet-device (or subnet_device) is {safe(device)!r}; it takes cpu, cuda or cuda:N"
        )
    engine = _option(config, "engine") or str(ini["engine"]) or None
    if engine not in (None, "threads", "ray"):
        raise pytest.UsageError(
            f"--subnet-engine (or subnet_engine) is {safe(engine)!r}; it takes threads or ray"
        )
    listed = ini["tolerances"]
    tolerances = tuple(listed) if isinstance(listed, list) else ()
    for text in tolerances:
        try:
            _split_tolerance(str(text))  # in TOML it may be a number
        except ValueError as error:
            raise pytest.UsageError(f"{_inifile(config)}: subnet_tolerances: {error}") from None
    return Settings(
        base=_source(config, "base", str(ini["base"])),
        tuned=_source(config, "tuned", str(ini["tuned"])),
        device=device,
        engine=engine,
        tolerances=tolerances,
        root=config.rootpath,
        from_ini=_named_by_ini(config, ini),
        report=report_path(config),
        write_baselines=bool(config.getoption("subnet_write_baselines")),
        strict=bool(config.getoption("subnet_strict")) or bool(ini["strict"]),
    )


def report_path(config: pytest.Config) -> Path | None:
    """The file that the report is to be written to, before any other setting is looked at."""
    option, ini = _option(config, "report"), _read_ini(config, "report")
    start = config.invocation_params.dir if option else config.rootpath
    name = option or str(ini)
    return start / os.path.expanduser(name) if name else None  # noqa: PTH111 - as in locate


def _named_by_ini(config: pytest.Config, ini: Mapping[str, object]) -> str:
    keys = [
        f"subnet_{side}" for side in ("base", "tuned") if ini[side] and not _option(config, side)
    ]
    if not keys:
        return ""
    return f"{' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} set in {_inifile(config)}"


def _inifile(config: pytest.Config) -> str:
    # Where there is no file, a value can only come from the command line.
    return safe(shown(str(config.inipath), config.rootpath)) if config.inipath else "-o"


def _read_ini(config: pytest.Config, name: str) -> str | bool | list[str]:
    # pytest checks the type of a value when it is read, and names the key not in every case.
    try:
        value: str | bool | list[str] = config.getini(f"subnet_{name}")
    except (TypeError, ValueError, pytest.UsageError) as error:
        raise pytest.UsageError(f"{_inifile(config)}: subnet_{name}: {error}") from None
    return value


def _option(config: pytest.Config, name: str) -> str | None:
    value: str | None = config.getoption(f"subnet_{name}")
    if value == "":
        raise pytest.UsageError(f"--subnet-{name} is empty; is the variable for it not set?")
    return value


def _source(config: pytest.Config, name: str, ini: str) -> str | None:
    option = _option(config, name)
    if option:
        return locate(option, config.invocation_params.dir)
    return locate(ini, config.rootpath) if ini else None


def locate(source: str, start: Path) -> str:
    """The absolute path of `source` as seen from `start`, or the hub id or address that it is.

    A path stays good when a test changes the working directory.
    """
    from pytest_subnet.checkpoints.remote.urls import is_url

    if is_url(source):
        return source
    path = start / os.path.expanduser(source)  # noqa: PTH111 - pathlib's raises for "~nobody"
    if os.path.exists(path):  # noqa: PTH110 - pathlib's raises for a name that is too long
        plain = os.path.normpath(path)  # but "link/.." is not where it seems to be
        same = os.path.exists(plain) and os.path.samefile(plain, path)  # noqa: PTH110, PTH121
        return plain if same else str(path)
    from pytest_subnet.checkpoints.hub import parse_hub_id

    return source if parse_hub_id(source) else str(path)


def shown(source: str, root: Path) -> str:
    """How messages name what `locate` found: below `root` relative to it, else as it is."""
    from pytest_subnet.checkpoints.remote.urls import is_url, masked

    if is_url(source):
        return masked(source)
    path = Path(os.path.normpath(source))
    return str(path.relative_to(root)) if path.is_relative_to(root) else source


def _split_tolerance(text: str) -> dict[str, float]:
    match = _TOLERANCE.fullmatch(text.strip())
    try:
        value = float(match["value"]) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or not 0 <= value < float("inf"):
        raise ValueError(f"{safe(text)!r} is not atol=NUMBER or rtol=NUMBER, one a line")
    return {match["kind"]: value}
