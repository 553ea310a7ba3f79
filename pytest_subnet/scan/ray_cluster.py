"""A Ray cluster: reaching one or starting one, and which of its nodes see which files."""

from __future__ import annotations

import logging
import os
import socket
import threading
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.scan.engines import cores
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_CONNECT_SECONDS = 10.0
_SURVEY_SECONDS = 60.0

_OBJECT_STORE_BYTES = 512 * 1024 * 1024
"""Of a cluster that is started here: the results that are on their way."""

_OTHERWISE = 'or take engine="threads" (--subnet-engine threads)'

_SHARE = "put both checkpoints on a file system that the nodes share"
_REPAIR = "have a node that answers, with the same pytest-subnet as here"

_lock = threading.Lock()
_connected: list[Any] = []
"""Ray itself, when it was connected here."""


def connect() -> Any:
    """The module `ray`, connected to a cluster.

    To the one that this process is part of already, else to that of `RAY_ADDRESS`, else to a local
    one, which is started and stays until `disconnect` or the end of the process.

    Raises:
        SubnetError: Ray is missing, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise SubnetError(
            'engine="ray" (--subnet-engine ray) needs Ray, which cannot be imported '
            f"({safe(str(error))}); install it with pip install pytest-subnet[ray], {_OTHERWISE}"
        ) from error
    with _lock:
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS") or "local"
            if address == "local":
                _start(ray)
            else:
                _attach(ray, address)
            _connected.append(ray)
    return ray


def disconnect() -> None:
    """Undo `connect`: what it started is shut down, what it attached to goes on without us.

    A connection that was there before is left alone.
    """
    with _lock:
        while _connected:
            ray = _connected.pop()
            with _quiet():
                ray.shutdown()


def _start(ray: Any) -> None:
    with _quiet():
        try:
            ray.init(
                address="local",
                num_cpus=cores(),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, RuntimeError, ValueError) as error:  # no room, no port, no permission
            raise SubnetError(
                f"no local Ray cluster could be started: {one_line(error)}; start one with `ray "
                f"start --head` and set RAY_ADDRESS, {_OTHERWISE}"
            ) from error


def _attach(ray: Any, address: str) -> None:
    """Connect to a cluster; Ray itself, where nobody answers, ends the process after minutes."""
    remedy = f"start it (ray start --head), correct or unset RAY_ADDRESS, {_OTHERWISE}"
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if address != "auto":
        try:
            if not colon or not port.isdecimal():
                raise OSError("it takes HOST:PORT, ray://HOST:PORT, auto or local")
            # OverflowError: there is no such port.
            with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
                pass
        except (OSError, OverflowError, UnicodeError) as error:
            raise SubnetError(
                f"no Ray cluster at RAY_ADDRESS={safe(address)}: {one_line(error)}; {remedy}"
            ) from error
    with _quiet():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise SubnetError(
                f"cannot attach to the Ray cluster at RAY_ADDRESS={safe(address)}: "
                f"{one_line(error)}; {remedy}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray warns its own callers of, and without reports to its makers."""
    known = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if known is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        else:
            os.environ["RAY_USAGE_STATS_ENABLED"] = known


def one_line(error: BaseException) -> str:
    """What an error says, shortened: of a traceback the last line, which has it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_traceback = any("Traceback" in line or line.startswith("File ") for line in lines)
    return safe((lines[-1 if is_traceback else 0] if lines else type(error).__name__)[:300])


class Node(NamedTuple):
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        name: its address, as messages call it.
        slots: how many tasks it runs at once.
    """

    id: str
    name: str
    slots: int


def nodes_of(ray: Any, *, gpus: bool) -> list[Node]:
    """The nodes that are alive and have anything to work with.

    Raises:
        SubnetError: there is none.
    """
    resource = "GPU" if gpus else "CPU"
    found = [
        Node(each["NodeID"], each["NodeManagerAddress"], int(each["Resources"].get(resource, 0)))
        for each in ray.nodes()
        if each["Alive"]
    ]
    able = [node for node in found if node.slots]
    if not able:
        on_cpu = 'compare on the CPU with device="cpu" (--subnet-device cpu), ' if gpus else ""
        raise SubnetError(
            f"no node of the Ray cluster has a {resource} to work on "
            f"({len(found)} alive: {first_few([node.name for node in found])}); add one, "
            f"{on_cpu}{_OTHERWISE}"
        )
    return able


class _File(NamedTuple):
    """What tells a copy of a file from another file of that name on another machine."""

    size: int
    mtime: int


def look(paths: Sequence[str]) -> tuple[str, dict[str, _File | str]]:
    """The version of this package here, and each file, or why it cannot be read here."""
    found: dict[str, _File | str] = {}
    for path in paths:
        try:
            with open(path, "rb") as handle:
                status = os.fstat(handle.fileno())
            found[path] = _File(status.st_size, int(status.st_mtime))
        except OSError as error:
            found[path] = error.strerror or type(error).__name__
    return _version(), found


def _version() -> str:
    try:
        return version("pytest-subnet")
    except PackageNotFoundError:
        return "a checkout"


class Survey(NamedTuple):
    """Which nodes see which files.

    Attributes:
        seen: the files that each node has as they are here, by its id; no node that cannot work.
        trouble: of the other nodes, the name and what is wrong with it, or with which file.
    """

    seen: Mapping[str, frozenset[str]]
    trouble: Sequence[tuple[str, Mapping[str, str] | str]]

    def nodes_with(self, paths: Collection[str]) -> frozenset[str]:
        """The nodes that see all of `paths`; of none, those that can work.

        Raises:
            CheckpointError: none does.
        """
        found = frozenset(node for node, seen in self.seen.items() if seen.issuperset(paths))
        if not found:
            complaints = [f"{name}: {_first_of(wrong, paths)}" for name, wrong in self.trouble]
            raise CheckpointError(
                "no node of the Ray cluster can read all that is compared: "
                f"{'; '.join(complaints[:3])}"
                f"{f' (and {len(complaints) - 3} more nodes)' if len(complaints) > 3 else ''}; "
                f"{_SHARE if paths else _REPAIR}, {_OTHERWISE}"
            )
        return found


def _first_of(wrong: Mapping[str, str] | str, paths: Collection[str]) -> str:
    if isinstance(wrong, str):
        return wrong
    path = next(path for path in sorted(paths) if path in wrong)
    return f"{safe(path)} {wrong[path]}"


def survey(ray: Any, nodes: Sequence[Node], paths: Sequence[str]) -> Survey:
    """Have every node look once for the files `paths`.

    Raises:
        CheckpointError: a file is not here either.
    """
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _, here = look(paths)
    for path, file in here.items():
        if isinstance(file, str):
            raise CheckpointError(f"cannot read {safe(path)}: {file}; is the disk still there?")
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in nodes:
        there_alone = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked[task.options(scheduling_strategy=there_alone).remote(paths)] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_SURVEY_SECONDS)
    seen: dict[str, frozenset[str]] = {}
    trouble: list[tuple[str, dict[str, str] | str]] = []
    for ref in answered:
        node = asked[ref]
        try:
            there_version, there = ray.get(ref)
        except RayError as error:
            trouble.append((node.name, f"cannot work ({one_line(error)})"))
            continue
        if there_version != _version():
            versions = f"{safe(there_version)}, which is {safe(_version())} here"
            trouble.append((node.name, f"has pytest-subnet {versions}"))
            continue
        wrong = _differing(here, there)
        seen[node.id] = frozenset(paths) - wrong.keys()
        if wrong:
            trouble.append((node.name, wrong))
    for ref in silent:
        ray.cancel(ref)
        trouble.append((asked[ref].name, f"gave no answer within {_SURVEY_SECONDS:.0f} seconds"))
    return Survey(seen, trouble)


def _differing(here: Mapping[str, _File | str], there: Mapping[str, _File | str]) -> dict[str, str]:
    """What is wrong with each file that is not there as it is here."""
    wrong = {}
    for path, file in there.items():
        if isinstance(file, str):
            wrong[path] = f"cannot be read there ({safe(file)})"
        elif file != here[path]:
            wrong[path] = "is another file there (other size or modification time)"
    return wrong
