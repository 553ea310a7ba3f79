"""One process after another: whoever waits, and whoever waits in vain."""

import subprocess
import sys
import textwrap
import warnings

import filelock
import pytest

from pytest_subnet.turns import in_turn


def test_processes_take_turns(tmp_path):
    """Four count in one file, 25 times each; without turns some of it would be lost."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from pytest_subnet.turns import in_turn
        counted = Path(sys.argv[1], "counted")
        for _ in range(25):
            with in_turn(Path(sys.argv[1], "deep", "lock"), 60.0) as came:
                assert came
                counted.write_text(str(int(counted.read_text()) + 1))
        """
    )
    (tmp_path / "counted").write_text("0")
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert (tmp_path / "counted").read_text() == "100"


def test_patience_ends(tmp_path):
    """The block runs all the same, and knows."""
    with (
        filelock.FileLock(tmp_path / "lock"),
        in_turn(tmp_path / "lock", 0.01) as came,
    ):
        assert not came


def test_where_nothing_can_be_locked(tmp_path):
    """A file in the way of the directory: there is no waiting."""
    (tmp_path / "file").write_text("")
    with in_turn(tmp_path / "file" / "lock", 0.01) as came:
        assert came


@pytest.mark.parametrize("raised", [NotImplementedError, PermissionError, UserWarning])
def test_where_the_system_has_no_locks(tmp_path, monkeypatch, raised):
    """Also where warnings are errors."""

    def acquire(*_, **__):
        if issubclass(raised, Warning):
            warnings.warn("a lesser lock", raised, stacklevel=2)
        raise raised

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with in_turn(tmp_path / "lock", 0.01) as came:
            assert came


def test_what_goes_wrong_in_the_block_is_not_taken_for_a_lock_that_failed(tmp_path):
    with pytest.raises(TimeoutError, match="mine"), in_turn(tmp_path / "lock", 0.01):
        raise TimeoutError("mine")
    with in_turn(tmp_path / "lock", 0.01) as came:
        assert came
