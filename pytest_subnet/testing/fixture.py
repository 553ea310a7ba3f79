"""The fixture that a suite takes from here; what it needs is imported when it is used."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_subnet.testing.laboratories import Laboratory


@pytest.fixture(scope="session")
def laboratory(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """A tiny real language model, its tokenizer, data and trainers' arguments; nothing downloaded.

    Trained in some seconds by the first run, and kept in pytest's cache for those after; without
    the cache, for this run and its workers.

        def test_trainer(laboratory):
            model = laboratory.model()
    """
    from pytest_subnet.testing.laboratories import build_laboratory

    try:
        kept = _kept(pytestconfig)
        if kept is not None:
            with suppress(OSError):  # read-only, or full
                return build_laboratory(kept)
        return build_laboratory(_of_this_run(pytestconfig, tmp_path_factory))
    except SubnetError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _kept(config: pytest.Config) -> Path | None:
    """The place for all runs; None without pytest's cache."""
    cache: pytest.Cache | None = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is None or (_is_worker(config) and config.getoption("cacheclear")):
        return None  # a worker that starts late would clear away what the others use
    try:
        return cache.mkdir("subnet-laboratory")
    except OSError:
        return None


def _of_this_run(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    """The place for this run; workers have directories of their own below one that they share."""
    root = factory.getbasetemp()
    return (root.parent if _is_worker(config) else root) / "subnet-laboratory"


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")
