"""Numba's compiler, with a cache on disk that can only help.

Compiling takes seconds, so it is kept. Numba's own cache raises out of the first call where no
directory can be written, where a file of it is damaged, and where it was written while a module was
loaded under another name (`No module named '<dynamic>'`); and two processes that fill it at once
can give each other the code of another dtype, because its index and its data are written apart.
Here each compiled function is one file named after all that it depends on, and whatever goes wrong
with it means compiling again.
"""

# Numba's cache has no public way in: what is used of it is typed loosely here, and guarded.
# mypy: disable-error-code="no-untyped-call, misc, no-any-return"

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("pytest_subnet")


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter lock, kept on disk where that works.

    Args:
        options: as `numba.njit` takes them.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, **options)(function)
        try:
            dispatcher._cache = _Cache(function)
        except Exception as error:  # no directory that can be written, or another Numba inside
            _log.info("compiling the scan's kernel in every process: %s", error)
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """Numba's cache of one function; what cannot be loaded or saved is compiled again."""

    def __init__(self, py_func: Callable[..., Any]) -> None:
        super().__init__(py_func)
        self._cache_file = _OneFileEach(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=(py_func.__module__, self._impl.locator.get_source_stamp()),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _log.info("compiling the scan's kernel again: its cache is broken (%r)", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _log.info("compiling the scan's kernel in every process: not kept (%r)", error)


class _OneFileEach(IndexDataCacheFile):
    """Compiled code in one file for each key; there is no index to disagree with the data."""

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name_for(key), data)

    def load(self, key: Any) -> Any:
        try:
            return self._load_data(self._name_for(key))
        except FileNotFoundError:
            return None

    def flush(self) -> None:
        """Nothing is kept besides the files themselves."""

    def _name_for(self, key: Any) -> str:
        everything = repr((self._version, self._source_stamp, key)).encode()
        return self._data_name(hashlib.sha256(everything).hexdigest()[:16])

    def _data_name(self, number: Any) -> str:
        return self._data_name_pattern.replace("{number:d}", str(number))
