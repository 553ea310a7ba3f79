"""From a run's directory, or from a list of sources, to a trajectory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from operator import gt
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import exists, names_in
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.checkpoints.wording import looked_in
from pytest_subnet.errors import CheckpointError, PairMismatchError
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.sameness import refuse_same
from pytest_subnet.text import first_few, plural, safe
from pytest_subnet.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source

_NUMBERS = re.compile("[0-9]+")
_DECIMALS = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_UNITS = re.compile("[0-9]([A-Za-z]*)")


def open_trajectory(
    source: str | os.PathLike[str] | Sequence[Source],
    *,
    pattern: str = "checkpoint-*",
    as_dtype: str | None = None,
) -> Trajectory:
    """Open the checkpoints of one run in the order in which they were saved; only headers are read.

    Args:
        source: the run's directory, or the checkpoints themselves in order, each of which is
            anything that `open_checkpoint` takes.
        pattern: a glob on the names in the directory. They are ordered by the number in each:
            step-2 comes before step-10. Names that start with a dot are left out.
        as_dtype: cast floating tensors of all checkpoints to `"bfloat16"`, `"float16"`,
            `"float32"` or `"float64"` before they are compared; by default different dtypes are a
            problem. A run saved in float32 is compared with a bfloat16 start as the latter.

    Returns:
        The trajectory, with each checkpoint aligned with the first.

    Raises:
        CheckpointError: there is no such directory, fewer than two checkpoints, one that is missing
            or cannot be read, or names that give no order (no number, one number twice, several
            that disagree, as in step-20-loss-3 and step-30-loss-2, or other units, as in
            step-500 and step-1k).
        PairMismatchError: a checkpoint is given twice.
        TypeError: `source` is neither, or `pattern` no string.
        ValueError: an unknown `as_dtype`.

    A run's directory rarely holds the model that training started from. Put it first:

    >>> import shutil
    >>> _ = shutil.copytree("base", "run/checkpoint-10")
    >>> _ = shutil.copytree("tuned", "run/checkpoint-9")
    >>> run = open_trajectory("run")
    >>> run.names
    ('checkpoint-9', 'checkpoint-10')
    >>> open_trajectory(["base", *run.checkpoints])
    <Trajectory base … run/checkpoint-10, 3 checkpoints>
    """
    names, sources = find_checkpoints(source, pattern)
    return align(names, open_all(sources, open_checkpoint), as_dtype)


def find_checkpoints(
    source: str | os.PathLike[str] | Sequence[Source], pattern: str
) -> tuple[list[str] | None, Sequence[Source]]:
    """The checkpoints that `open_trajectory` is asked for, and their names in the directory."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern takes a glob such as 'step-*', not {type(pattern).__name__}")
    if isinstance(source, str | os.PathLike):
        directory = os.fspath(source)
        names = _in_order(directory, pattern)
        return names, [os.path.join(directory, name) for name in names]  # noqa: PTH118
    if not isinstance(source, Sequence):
        raise TypeError(
            "a trajectory is the directory of a run or a sequence of checkpoints, "
            f"not {type(source).__name__}"
        )
    if len(source) < 2:
        raise CheckpointError(
            f"a trajectory needs two or more checkpoints, and {len(source)} "
            f"{'was' if len(source) == 1 else 'were'} given; put the model that training started "
            "from first"
        )
    return None, source


def _in_order(directory: str, pattern: str) -> list[str]:
    """The names of the checkpoints in `directory`, by their numbers."""
    path = Path(directory).expanduser()
    if not directory or not exists(path):
        raise CheckpointError(
            f"no run at '{safe(directory)}': there is no such directory{looked_in(directory)}"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{safe(directory)} is one file, not the directory of a run; give its directory, or a "
            "list of checkpoints"
        )
    present = names_in(path)
    found = [name for name in present if fnmatchcase(name, pattern) and not name.startswith(".")]
    if len(found) < 2:
        held = f"it holds {first_few(present, 5)}" if present else "it is empty"
        raise CheckpointError(
            f"pattern='{safe(pattern)}' matches {plural(len(found), 'entry')} of {safe(directory)} "
            f"({held}), and a trajectory needs two or more checkpoints; say how they are called "
            "with pattern="
        )
    return _by_number(found, directory)


def _by_number(found: Sequence[str], directory: str) -> list[str]:
    """The names by the numbers in them; an error where these do not give one order."""
    numbers = {name: [int(number) for number in _NUMBERS.findall(name)] for name in found}
    for name in found:
        if not numbers[name]:
            raise _unordered(
                f"{safe(name)} in {safe(directory)} has no number, so its place in the run is not "
                "known; choose others"
            )
    ordered = sorted(found, key=numbers.__getitem__)
    decimals = {name: [Fraction(number) for number in _DECIMALS.findall(name)] for name in found}
    for name in found[1:]:
        if _UNITS.findall(name)[-1:] != _UNITS.findall(found[0])[-1:]:
            raise _unordered(
                f"{safe(found[0])} and {safe(name)} in {safe(directory)} count in other units, so "
                "which came first is not known; choose"
            )
    for earlier, later in pairwise(ordered):
        both = f"{safe(earlier)} and {safe(later)} in {safe(directory)}"
        before, after = numbers[earlier], numbers[later]
        if before == after:
            raise _unordered(
                f"{both} have the same number, so which came first is not known; choose"
            )
        # One of the numbers may be a metric, a version, or what follows a decimal point.
        if (
            len(before) != len(after)
            or any(map(gt, before, after))
            or decimals[earlier] >= decimals[later]
        ):
            raise _unordered(
                f"{both} have several numbers, which do not agree on what came first; choose"
            )
    return ordered


def _unordered(what: str) -> CheckpointError:
    return CheckpointError(f"{what} with pattern=, or give the checkpoints as a list in order")


def open_all(
    sources: Sequence[Source], open_one: Callable[[Source], Checkpoint]
) -> list[Checkpoint]:
    """Each of `sources`, opened; an error says which of them it was."""
    checkpoints = []
    for number, source in enumerate(sources, 1):
        try:
            checkpoints.append(open_one(source))
        except CheckpointError as error:
            raise CheckpointError(
                f"checkpoint {number} of {len(sources)} cannot be opened: {error}"
            ) from error
    return checkpoints


def align(
    names: Sequence[str] | None, checkpoints: Sequence[Checkpoint], as_dtype: str | None
) -> Trajectory:
    """Each of `checkpoints` with the first, by `names` or their own labels."""
    names = names or _told_apart(checkpoints)
    seen: dict[Hashable, int] = {}
    pairs = []
    for number, later in enumerate(checkpoints):
        earlier = seen.setdefault(later.identity(), number)
        if earlier != number:
            raise _twice(names, earlier, number)
        if number:
            with _naming(names, number - 1, number):
                refuse_same(checkpoints[number - 1], later)
            with _naming(names, 0, number):
                pairs.append(open_pair(checkpoints[0], later, as_dtype=as_dtype))
    return Trajectory(names, checkpoints, pairs)


@contextmanager
def _naming(names: Sequence[str], earlier: int, later: int) -> Iterator[None]:
    """Say which checkpoints are the same; no pair knows its place in a run."""
    try:
        yield
    except PairMismatchError as error:
        raise _twice(names, earlier, later) from error


def _twice(names: Sequence[str], earlier: int, later: int) -> PairMismatchError:
    return PairMismatchError(
        f"checkpoint {later + 1} of {len(names)} is there twice: {safe(names[earlier])} and "
        f"{safe(names[later])} are the same. Was a path given twice, one a link to the other, or "
        "a model kept without a copy (copy.deepcopy it, or clone each tensor of its state_dict)?"
    )


def _told_apart(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Their labels, numbered where some are alike (as those of modules are)."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} #{number}" for number, label in enumerate(labels, 1)]
