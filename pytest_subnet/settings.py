"""What the command line and the ini file ask for, read and checked once at the start."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.text import safe

if TYPE_CHECKING:
    from pytest_subnet.scan.tolerance import Tolerance

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_TOLERANCE = re.compile(r"(?P<kind>atol|rtol)=(?P<value>\S+)")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings for one run.

    Attributes:
        base: where `model_pair` finds the base.
        tuned: where it finds the tuned checkpoint.
        device: the device that was asked for by name; None leaves the choice.
        tolerances: counted in every scan, besides same bits and 1e-5.
    """

    base: str | None
    tuned: str | None
    device: str | None
    tolerances: tuple[str, ...]

    def parsed_tolerances(self) -> tuple[Tolerance, ...]:
        """The tolerances as the scan takes them."""
        from pytest_subnet.scan.tolerance import Tolerance

        return tuple(Tolerance(**_split_tolerance(text)) for text in self.tolerances)

    def header(self) -> str | None:
        """One line on what changes a verdict; None when nothing was set."""
        named = {"base": self.base, "tuned": self.tuned, "device": self.device}
        parts = [f"{name} {safe(value)}" for name, value in named.items() if value]
        if self.tolerances:
            parts.append("also counting " + ", ".join(map(safe, self.tolerances)))
        return f"subnet: {', '.join(parts)}" if parts else None


settings_key = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare the options and their ini keys."""
    group = parser.getgroup("subnet", "weights of fine-tuned models (pytest-subnet)")
    for name, metavar, what in (
        ("base", "PATH_OR_HUB_ID", "the model before fine-tuning, for the fixture model_pair"),
        ("tuned", "PATH_OR_HUB_ID", "the model after fine-tuning"),
        ("device", "DEVICE", "where to compare: cpu, cuda or cuda:N (fails where there is none)"),
    ):
        group.addoption(f"--subnet-{name}", metavar=metavar, help=what)
        parser.addini(f"subnet_{name}", what, type="string", default="")
    parser.addini(
        "subnet_tolerances",
        "tolerances to count in every scan besides same bits and atol=1e-5, one a line: "
        "atol=1e-6 or rtol=1e-3",
        type="linelist",
        default=[],
    )


def read_settings(config: pytest.Config) -> Settings:
    """Read every option and ini key; a wrong one is a `UsageError` that names it."""
    device = _read(config, "device")
    if device is not None and not _DEVICE.fullmatch(device):
        raise pytest.UsageError(
            f"--subnet-device (or subnet_device) is {safe(device)!r}; "
            "it takes cpu, cuda or cuda:N"
        )
    tolerances = tuple(config.getini("subnet_tolerances"))
    for text in tolerances:
        try:
            _split_tolerance(text)
        except ValueError as error:
            raise pytest.UsageError(f"{config.inipath}: subnet_tolerances: {error}") from None
    return Settings(
        base=_read_source(config, "base"),
        tuned=_read_source(config, "tuned"),
        device=device,
        tolerances=tolerances,
    )


def _read(config: pytest.Config, name: str) -> str | None:
    return config.getoption(f"subnet_{name}") or config.getini(f"subnet_{name}") or None


def _read_source(config: pytest.Config, name: str) -> str | None:
    option = config.getoption(f"subnet_{name}")
    if option:
        return locate(option, config.invocation_params.dir)
    ini = config.getini(f"subnet_{name}")
    return locate(ini, config.rootpath) if ini else None


def locate(source: str, start: Path) -> str:
    """A source as seen from `start`: a path that exists there, else as it was written."""
    path = start / Path(source).expanduser()
    if not path.exists():
        return source
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _split_tolerance(text: str) -> dict[str, float]:
    match = _TOLERANCE.fullmatch(text.strip())
    try:
        value = float(match["value"]) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or not 0 <= value < float("inf"):
        raise ValueError(f"{safe(text)!r} is not atol=NUMBER or rtol=NUMBER")
    return {match["kind"]: value}
