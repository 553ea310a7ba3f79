"""Positional reads, with and without `preadv`, and what the system refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_subnet import CheckpointError
from pytest_subnet.checkpoints import files
from pytest_subnet.checkpoints.files import FileReader, exists, read_unchanged, stamp

CONTENT = bytes(range(256)) * 4

needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")


@pytest.fixture(params=[pytest.param("_read_at", marks=needs_preadv), "_seek_and_read"])
def read_some(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read, whichever this system would take."""
    monkeypatch.setattr(files, "read_some", getattr(files, request.param))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    return path


def read(path: Path, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    with FileReader() as reader:
        reader.read_into(str(path), offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.usefixtures("read_some")
@pytest.mark.parametrize(("offset", "count"), [(0, 1024), (0, 1), (1023, 1), (7, 333), (5, 0)])
def test_reads_any_range(file: Path, offset: int, count: int) -> None:
    assert read(file, offset, count) == CONTENT[offset : offset + count]


@pytest.mark.usefixtures("read_some")
def test_reads_back_and_forth_in_more_files_than_it_keeps_open(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    buffer = bytearray(3)
    with FileReader() as reader:
        for number in [*range(9), *reversed(range(9)), 0, 8, 0]:
            reader.read_into(str(tmp_path / str(number)), 4, memoryview(buffer))
            assert buffer == bytes([number]) * 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_keeps_few_files_open_and_closes_them_all(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = count()
    with FileReader() as reader:
        for number in range(20):
            path = tmp_path / str(number)
            path.write_bytes(b"x")
            reader.read_into(str(path), 0, memoryview(bytearray(1)))
        assert count() - before <= 4
    assert count() == before


def test_descriptor_is_of_the_file(file: Path) -> None:
    with FileReader() as reader:
        assert os.path.sameopenfile(reader.descriptor(str(file)), reader.descriptor(str(file)))
        assert os.fstat(reader.descriptor(str(file))).st_ino == file.stat().st_ino


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.read_some
    monkeypatch.setattr(files, "read_some", lambda f, buffer, at: whole(f, buffer[:7], at))
    assert read(file, 3, 500) == CONTENT[3:503]


@pytest.mark.usefixtures("read_some")
def test_file_that_ends_too_early_is_an_error(file: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(file, 1000, 100)
    assert str(caught.value) == (
        f"{file} ends at byte 1,024, before the data its header lists; "
        "it was cut short, save or download it again"
    )


@pytest.mark.usefixtures("read_some")
def test_file_that_shrinks_between_two_reads_is_an_error(file: Path) -> None:
    buffer = memoryview(bytearray(512))
    with FileReader() as reader:
        reader.read_into(str(file), 0, buffer)
        os.truncate(file, 700)
        with pytest.raises(CheckpointError, match="ends at byte 700"):
            reader.read_into(str(file), 512, buffer)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    for attempt in (lambda: read(path, 0, 1), lambda: stamp(path)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{path} does not exist; was the download or the save cut short?"
        )


@pytest.mark.usefixtures("read_some")
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a read that fails needs /proc")
def test_disk_error_in_mid_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("/proc/self/mem")  # its first page is not mapped: a real EIO
    with pytest.raises(CheckpointError) as caught:
        read(path, 0, 10)
    assert str(caught.value) == (
        f"cannot read {path}: Input/output error; "
        "check the disk or the mount and copy the file again"
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_disk_error_after_some_bytes_names_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: object, buffer: memoryview, offset: int) -> int:
        if offset >= 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 10

    monkeypatch.setattr(files, "read_some", fails)
    with pytest.raises(CheckpointError, match=r"weights\.bin: Input/output error"):
        read(file, 0, 100)
    with FileReader() as reader, pytest.raises(CheckpointError, match="does not exist"):
        reader.descriptor(str(file) + ".gone")


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions are POSIX's")
def test_no_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "secret.safetensors").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    code = """if True:
        import os
        from pytest_subnet import CheckpointError, open_checkpoint
        if os.geteuid() == 0:  # may read everything
            os.setuid(65534)
        for source in ("secret.safetensors", "closed", "closed/model.safetensors"):
            try:
                open_checkpoint(source)
            except CheckpointError as error:
                print(error)
    """
    # Nobody may not write coverage's data either.
    env = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "closed").chmod(0o755)  # so that pytest can remove it
    lines = run.stdout.splitlines()
    for line, path in zip(
        lines, ("secret.safetensors", "closed", "closed/model.safetensors"), strict=True
    ):
        assert line.startswith("no permission to read ")
        assert path in line
        assert "; give this user read access (chmod a+r, and a+x on the directories" in line


def test_stamp_tells_a_file_from_itself_after_a_write(file: Path) -> None:
    before = stamp(file)
    assert stamp(file) == before
    assert stamp(str(file)) == before
    with file.open("ab") as handle:
        handle.write(b"more")
    assert stamp(file) != before


def test_stamp_tells_a_file_from_its_replacement(file: Path) -> None:
    before = stamp(file)
    other = file.with_name("other")
    other.write_bytes(CONTENT)
    other.replace(file)
    assert stamp(file) != before


def test_stamp_follows_links(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    assert stamp(link)[1:] == stamp(file)[1:]


def test_stamp_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        stamp(tmp_path)
    assert str(caught.value) == (f"{tmp_path} is a directory, not a file; put the file there")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_stamp_refuses_a_pipe_instead_of_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a pipe or a device, not a file"):
        stamp(tmp_path / "pipe")


def test_read_unchanged_notices_a_write(file: Path) -> None:
    known = stamp(file)
    buffer = bytearray(4)
    read_unchanged(known, 2, memoryview(buffer))
    assert buffer == CONTENT[2:6]
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(CheckpointError) as caught:
        read_unchanged(known, 2, memoryview(buffer))
    assert str(caught.value) == (
        f"{file} changed after it was opened; wait until it is written, then open it again"
    )


@pytest.mark.parametrize(
    "name", ["none", "weights.bin/inside", "nul\0byte", "half\ud800", "x" * 5000]
)
def test_what_cannot_be_there_does_not_exist(file: Path, name: str) -> None:
    assert exists(file)
    assert not exists(f"{file.parent}/{name}")


def test_what_the_system_will_not_look_up_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"cannot read .*loop/x: Too many levels"):
        exists(tmp_path / "loop" / "x")
