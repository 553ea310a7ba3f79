"""The file of baselines: what is written is read again, and nothing else is."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_subnet.errors import SubnetError
from pytest_subnet.gating.baseline_file import BaselineFile, Entry, spelled

COMMAND = "pytest test_x.py --subnet-write-baselines"
DELETE = f"delete it and record its baselines: {COMMAND}"
RESTORE = f"restore it from version control, or {DELETE}"

texts = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
entries = st.builds(
    Entry,
    finding=texts,
    numbers=st.dictionaries(texts, numbers, max_size=4),
    under=st.dictionaries(texts, texts | st.none(), max_size=3),
    coverage=st.dictionaries(texts, st.integers(0, 10**15), max_size=3),
    fingerprints=st.dictionaries(texts, st.just("") | st.just("0123456789abcdef" * 2), max_size=3),
    versions=st.dictionaries(texts, texts, max_size=3),
)
recorded = st.dictionaries(texts, st.dictionaries(texts, entries, max_size=3), max_size=3)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3),
    max_leaves=8,
)

ENTRY = Entry(
    finding="update_sparsity",
    numbers={"sparsity": 0.95, "updated": 4},
    under={"dtype": "bf16", "tolerance": "same bits"},
    coverage={"tensors": 2},
    fingerprints={"base": "0" * 32, "tuned": "1" * 32},
    versions={"numpy": "2.0"},
)
WHOLE = json.loads(spelled({"test_a": {"update_sparsity": ENTRY}}))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "subnet_baselines" / "test_x.json"
    path.parent.mkdir()
    return BaselineFile(path, "subnet_baselines/test_x.json", COMMAND)


@pytest.fixture(scope="module")
def any_file(tmp_path_factory):
    return BaselineFile(tmp_path_factory.mktemp("any") / "test_x.json", "test_x.json", COMMAND)


def test_the_file_is_readable_and_sorted(file):
    file.merge("test_b", {"update_sparsity": ENTRY})
    file.merge("test_a", {})

    assert file.path.read_text() == textwrap.dedent(
        """\
        {
          "schema": 1,
          "tests": {
            "test_b": {
              "update_sparsity": {
                "coverage": {
                  "tensors": 2
                },
                "finding": "update_sparsity",
                "fingerprints": {
                  "base": "00000000000000000000000000000000",
                  "tuned": "11111111111111111111111111111111"
                },
                "numbers": {
                  "sparsity": 0.95,
                  "updated": 4
                },
                "under": {
                  "dtype": "bf16",
                  "tolerance": "same bits"
                },
                "versions": {
                  "numpy": "2.0"
                }
              }
            }
          }
        }
        """
    )


@given(recorded)
def test_what_is_written_is_read_again(any_file, tests):
    any_file.path.unlink(missing_ok=True)
    for test, found in tests.items():
        any_file.merge(test, found)

    kept = {test: found for test, found in tests.items() if found}
    read = any_file.read()
    assert read == kept
    for test, found in kept.items():
        for name, entry in found.items():
            again = read[test][name]
            assert list(map(repr, again.numbers.values())) == list(
                map(repr, (entry.numbers[number] for number in again.numbers))
            )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(recorded, texts, st.dictionaries(texts, entries, min_size=1, max_size=2))
def test_the_entries_of_other_tests_stay(any_file, tests, test, found):
    any_file.path.write_text(spelled(tests), encoding="utf-8")

    before = any_file.merge(test, found)

    assert before == tests.get(test, {})
    assert any_file.read() == {**tests, test: found}


def read_or_refused(file):
    """What is in the file; nothing where it is refused in words that can be printed."""
    try:
        return file.read()
    except SubnetError as refused:
        text = str(refused)
    assert text.startswith("test_x.json ")
    assert text.isprintable()
    return {}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=200), plain.map(lambda each: json.dumps(each).encode())))
def test_nonsense_is_an_error_of_ours_or_no_baselines(any_file, raw):
    any_file.path.write_bytes(raw)
    assert read_or_refused(any_file) == {}


def paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*path, key))


@given(st.sampled_from(list(paths(WHOLE))), plain)
def test_a_wrong_value_anywhere_is_no_number(any_file, path, value):
    """What stands in the place of any part is refused, or can be written as it is."""
    data = json.loads(json.dumps(WHOLE))
    if path:
        *above, last = path
        inner = data
        for key in above:
            inner = inner[key]
        inner[last] = value
    else:
        data = value
    any_file.path.write_text(json.dumps(data), encoding="utf-8")
    found = read_or_refused(any_file)
    assert not found or json.loads(spelled(found)) == data


def changed(**parts):
    data = json.loads(json.dumps(WHOLE))
    data["tests"]["test_a"]["update_sparsity"].update(parts)
    return json.dumps(data)


NESTED = "[" * 100_000 + "]" * 100_000
ON = "of test_a update_sparsity"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"is not JSON (Expecting value: line 1 column 1 (char 0)); {RESTORE}"),
        (
            "[]",
            f"is no file of baselines: the file is a list of 0 entries, not an object; {RESTORE}",
        ),
        ("{}", f"is no file of baselines: the file has no schema; {RESTORE}"),
        ('{"schema": 1}', f"is no file of baselines: the file has no tests; {RESTORE}"),
        (
            '{"schema": 1, "tests": {}, "more\\u001b[1m": 1}',
            f"is no file of baselines: the file has more\\x1b[1m, which is unknown; {RESTORE}",
        ),
        ('{"schema": true, "tests": {}}', f"is no file of baselines: schema is true; {RESTORE}"),
        (
            '{"schema": 2, "tests": {}}',
            "is of schema 2, and this pytest-subnet reads schema 1; install the one that wrote "
            f"it, or {DELETE}",
        ),
        (
            changed(numbers={"sparsity": "0.95"}),
            f'is no file of baselines: numbers.sparsity {ON} is "0.95", not a number; {RESTORE}',
        ),
        (
            changed(numbers={"sparsity": float("nan")}),
            f"is no file of baselines: numbers.sparsity {ON} is nan, which is not finite; "
            f"{RESTORE}",
        ),
        (
            changed(numbers={"sparsity": 1}).replace(": 1}", ": 1e999}"),
            f"is no file of baselines: numbers.sparsity {ON} is inf, which is not finite; "
            f"{RESTORE}",
        ),
        (
            changed(numbers={"sparsity": 10**400}),
            f"is no file of baselines: numbers.sparsity {ON} is 1{'0' * 199}…, which no result "
            f"has; {RESTORE}",
        ),
        (
            changed(coverage={"numel": -1}),
            f"is no file of baselines: coverage.numel {ON} is -1, not a count; {RESTORE}",
        ),
        (
            changed(fingerprints={"base": "f00"}),
            f'is no file of baselines: fingerprints.base {ON} is "f00", not 32 hexadecimal '
            f"digits; {RESTORE}",
        ),
        (
            changed(finding="\ud800"),
            f'is no file of baselines: finding {ON} is "\\ud800", not text; {RESTORE}',
        ),
        (
            changed(finding="\ud800").replace("finding", "other"),
            f"is no file of baselines: test_a update_sparsity has no finding; {RESTORE}",
        ),
        ('{"schema": 1, "tests": {}, "tests": {}}', f"has 'tests' twice in one object; {RESTORE}"),
        (
            '{\n<<<<<<< HEAD\n  "schema": 1,\n=======\n  "schema": 1,\n>>>>>>> other\n}',
            "holds merge-conflict markers (line 2: <<<<<<<); keep the entries of one side, or "
            f"{DELETE}",
        ),
        (
            '{"schema": 1,\n=======\n}',
            f"holds merge-conflict markers (line 2: =======); keep the "
            f"entries of one side, or {DELETE}",
        ),
    ],
)
def test_a_damaged_file_says_what_and_what_to_do(file, text, message):
    file.path.write_text(text, encoding="utf-8")

    for attempt in (file.read, lambda: file.merge("test_b", {"update_sparsity": ENTRY})):
        with pytest.raises(SubnetError) as caught:
            attempt()
        assert str(caught.value) == f"subnet_baselines/test_x.json {message}"
    assert file.path.read_text(encoding="utf-8") == text  # nothing of it is lost


def test_what_is_no_utf8_says_so(file):
    file.path.write_bytes(b'{"schema": 1, "tests": {"\xff": {}}}')
    with pytest.raises(SubnetError) as caught:
        file.read()
    assert str(caught.value) == f"subnet_baselines/test_x.json is not UTF-8; {RESTORE}"


def test_nesting_without_end_is_no_crash(file):
    file.path.write_text(NESTED)
    with pytest.raises(SubnetError, match=r"is not JSON \(maximum recursion depth exceeded"):
        file.read()


def test_a_huge_file_is_not_read(file):
    with open(file.path, "wb") as handle:
        handle.truncate(16_000_001)
    with pytest.raises(SubnetError) as caught:
        file.read()
    assert str(caught.value) == (
        f"subnet_baselines/test_x.json has 16 MB, which no baselines have; {RESTORE}"
    )


def test_a_directory_or_a_pipe_in_its_place(file):
    os.mkfifo(file.path)
    with pytest.raises(SubnetError, match=r"test_x\.json is a pipe or a device, not a file of"):
        file.read()
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(SubnetError) as caught:
        file.read()
    assert str(caught.value) == (
        "subnet_baselines/test_x.json is a directory, not a file of baselines; move it away, then "
        f"record its baselines: {COMMAND}"
    )


def test_a_file_in_place_of_the_directory(file):
    file.path.parent.rmdir()
    file.path.parent.write_text("")
    with pytest.raises(SubnetError) as caught:
        file.read()
    assert str(caught.value) == (
        "cannot read subnet_baselines/test_x.json: Not a directory; give this user access to it"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is Linux's")
def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "subnet_baselines").symlink_to("/sys/kernel")  # not even for root
    file = BaselineFile(tmp_path / "subnet_baselines" / "test_x.json", "test_x.json", COMMAND)
    with pytest.raises(SubnetError) as caught:
        file.merge("test_a", {"update_sparsity": ENTRY})
    assert str(caught.value) == (
        "cannot write test_x.json: Permission denied; record where the repository can be written "
        "to, and commit the file"
    )


def test_a_full_disk_leaves_the_old_file(file):
    file.merge("test_a", {"update_sparsity": ENTRY})
    before = file.path.read_bytes()
    script = f"""
        import resource
        from pathlib import Path
        from pytest_subnet.gating.baseline_file import BaselineFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        file = BaselineFile(Path({str(file.path)!r}), "test_x.json", "")
        file.merge("test_b", file.read()["test_a"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert "SubnetError: cannot write test_x.json: File too large; record where" in done.stderr
    assert file.path.read_bytes() == before
    assert list(file.path.parent.iterdir()) == [file.path]


def test_what_did_not_change_is_not_written(file):
    file.merge("test_a", {"update_sparsity": ENTRY})
    before = file.path.stat().st_ino
    file.merge("test_a", {"update_sparsity": ENTRY})
    assert file.path.stat().st_ino == before
