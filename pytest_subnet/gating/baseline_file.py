"""The file in which the baselines of a test module are kept: JSON that a reviewer can read."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from pytest_subnet import atomic
from pytest_subnet.checkpoints.json_files import DuplicateNameError, is_text, parse_unique
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import SubnetError
from pytest_subnet.text import plural, size
from pytest_subnet.turns import in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = 1
"""Of the file: raised when what is there before changes its meaning."""


_MOST_BYTES = 16_000_000
"""Thousands of tests in one module; to parse more would take longer than to measure it."""

_PATIENCE = 60
"""Seconds: to record takes some thousandths of one."""

_CONFLICT = re.compile(rb"^(<{7}|={7}|>{7}|\|{7})(?=\s|$)", re.MULTILINE)
_FINGERPRINT = re.compile(r"([0-9a-f]{32})?")

Number: TypeAlias = int | float
Tests: TypeAlias = "dict[str, dict[str, Entry]]"
"""What was recorded: by test, then by finding (`update_sparsity#2` for a second result)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One result as it was recorded.

    Attributes:
        finding: `"update_sparsity"`, `"mask_overlap"`, …
        numbers: by name; of a number that stands in a mapping or a list `"lifts.matrix"` and
            `"sparsities[0]"`.
        under: how it was measured: `"tolerance"`, `"dtype"`, `"selection"`, `"null"` …, as far as
            the finding has them.
        coverage: `"tensors"`, `"tensors_total"` and `"numel"`, as far as the finding has them.
        fingerprints: of the checkpoints: `"base"` and `"tuned"`, or what the finding calls them; 32
            hexadecimal digits, empty where nobody knows.
        versions: of pytest-subnet, numpy and torch.
    """

    finding: str
    numbers: Mapping[str, Number]
    under: Mapping[str, str | None]
    coverage: Mapping[str, int]
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BaselineFile:
    """The baselines of one test module.

    Attributes:
        path: where they are, or will be.
        label: how messages name the file.
        command: what records all of them again.
    """

    path: Path
    label: str
    command: str

    def read(self) -> Tests:
        """What is recorded; nothing where there is no file.

        Raises:
            SubnetError: there is something that is no file of baselines, or it cannot be read.
        """
        raw = self._bytes()
        return {} if raw is None else self._parsed(raw)

    def merge(self, test: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Record the results of one test in the place of those it had; other tests keep theirs.

        The file is replaced whole: a run that is killed leaves the old one or the new one. Where
        nothing changed it is left alone. Other processes that record wait for their turn, so that
        none of them takes an entry of another for one that was never there.

        Returns:
            What was recorded of this test before.

        Raises:
            SubnetError: as `read`; or the file cannot be written.
        """
        with self._turn():
            tests = self.read()
            before = tests.get(test, {})
            if before != entries:
                tests[test] = dict(entries)
                self._write(tests)
        return before

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process of this machine records in the file.

        The lock is not beside it: there it would have to be kept out of commits.
        """
        import xxhash

        name = xxhash.xxh3_64_hexdigest(os.fsencode(os.path.realpath(self.path)))
        lock = Path(tempfile.gettempdir(), f"pytest-subnet-{name}.lock")
        with in_turn(lock, _PATIENCE) as came:
            if not came:
                raise SubnetError(
                    f"cannot write {self.label}: another process has been recording in it for "
                    f"{_PATIENCE} seconds; end it, and record again"
                )
            yield

    def _write(self, tests: Tests) -> None:
        text = spelled(tests)
        try:
            self.path.parent.mkdir(exist_ok=True)
            atomic.write_text(self.path, text)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SubnetError(
                f"cannot write {self.label}: {reason}; record where the repository can be written "
                "to, and commit the file"
            ) from error

    def _bytes(self) -> bytes | None:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
                what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                raise SubnetError(
                    f"{self.label} is {what}, not a file of baselines; move it away, then "
                    f"{self._again}"
                )
            if status.st_size > _MOST_BYTES:
                raise self._broken(f"has {size(status.st_size)}, which no baselines have")
            return self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SubnetError(
                f"cannot read {self.label}: {reason}; give this user access to it"
            ) from error

    def _parsed(self, raw: bytes) -> Tests:
        conflict = _CONFLICT.search(raw)  # on a line of its own, which no string of JSON is
        if conflict is not None:
            line = raw.count(b"\n", 0, conflict.start()) + 1
            raise SubnetError(
                f"{self.label} holds merge-conflict markers (line {line}: "
                f"{conflict[1].decode()}); keep the entries of one side, or {self._delete}"
            )
        try:
            return _tests(parse_unique(raw))
        except DuplicateNameError as error:
            raise self._broken(f"has {short(error)!r} twice in one object") from None
        except _OtherSchemaError as error:
            raise SubnetError(
                f"{self.label} is of schema {short(error)}, and this pytest-subnet reads schema "
                f"{SCHEMA}; install the one that wrote it, or {self._delete}"
            ) from None
        except _WrongError as error:
            raise self._broken(f"is no file of baselines: {error}") from None
        except UnicodeDecodeError:
            raise self._broken("is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise self._broken(f"is not JSON ({short(error)})") from None

    def _broken(self, what: str) -> SubnetError:
        return SubnetError(
            f"{self.label} {what}; restore it from version control, or {self._delete}"
        )

    @property
    def _again(self) -> str:
        return f"record its baselines: {self.command}"

    @property
    def _delete(self) -> str:
        return f"delete it and {self._again}"


def is_fingerprint(value: object) -> bool:
    """Whether `value` can be a fingerprint, or the empty one of what nobody knows."""
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None


def spelled(tests: Tests) -> str:
    """The text of the file: sorted, so that it changes only where a baseline does."""
    plain = {
        test: {name: asdict(entry) for name, entry in entries.items()}
        for test, entries in tests.items()
    }
    data = {"schema": SCHEMA, "tests": plain}
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


class _WrongError(ValueError):
    """Something in the file is not what it must be; says what and where."""


class _OtherSchemaError(ValueError):
    """The file is of another schema; says which."""


def _tests(value: object) -> Tests:
    if isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
        raise _OtherSchemaError(json.dumps(value["schema"]))
    top = _object(value, "the file", {"schema", "tests"})
    if type(top["schema"]) is not int:  # True and 1.0 equal 1
        raise _WrongError(f"schema is {_spelled(top['schema'])}")
    return {
        test: {
            name: _entry(entry, f"{short(test)} {short(name)}")
            for name, entry in _object(entries, short(test)).items()
        }
        for test, entries in _object(top["tests"], "tests").items()
    }


def _entry(value: object, where: str) -> Entry:
    parts = _object(value, where, set(Entry.__dataclass_fields__))
    return Entry(
        finding=_text(parts["finding"], f"finding of {where}"),
        numbers={
            name: _number(each, f"numbers.{short(name)} of {where}")
            for name, each in _object(parts["numbers"], f"numbers of {where}").items()
        },
        under={
            name: None if each is None else _text(each, f"under.{short(name)} of {where}")
            for name, each in _object(parts["under"], f"under of {where}").items()
        },
        coverage={
            name: _count(each, f"coverage.{short(name)} of {where}")
            for name, each in _object(parts["coverage"], f"coverage of {where}").items()
        },
        fingerprints={
            name: _fingerprint(each, f"fingerprints.{short(name)} of {where}")
            for name, each in _object(parts["fingerprints"], f"fingerprints of {where}").items()
        },
        versions={
            name: _text(each, f"versions.{short(name)} of {where}")
            for name, each in _object(parts["versions"], f"versions of {where}").items()
        },
    )


def _object(value: object, where: str, keys: set[str] | None = None) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _WrongError(f"{where} is {_spelled(value)}, not an object")
    for key in value:
        _text(key, f"a name in {where}")
    if keys is not None and value.keys() != keys:
        missing, more = sorted(keys - value.keys()), sorted(value.keys() - keys)
        wrong = f"has no {missing[0]}" if missing else f"has {short(more[0])}, which is unknown"
        raise _WrongError(f"{where} {wrong}")
    return cast("dict[str, object]", value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise _WrongError(f"{where} is {_spelled(value)}, not text")
    return value


def _number(value: object, where: str) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongError(f"{where} is {_spelled(value)}, not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _WrongError(f"{where} is {value}, which is not finite")
    if abs(value) > sys.float_info.max:
        raise _WrongError(f"{where} is {short(value)}, which no result has")
    return value


def _count(value: object, where: str) -> int:
    if type(value) is not int or value < 0:
        raise _WrongError(f"{where} is {_spelled(value)}, not a count")
    return value


def _fingerprint(value: object, where: str) -> str:
    if not is_fingerprint(value):
        raise _WrongError(f"{where} is {_spelled(value)}, not 32 hexadecimal digits")
    return str(value)


def _spelled(value: object) -> str:
    """A value as JSON has it; of a container only how much is in it."""
    if isinstance(value, dict | list):
        what = "an object" if isinstance(value, dict) else "a list"
        return f"{what} of {plural(len(value), 'entry')}"
    return short(json.dumps(value))
