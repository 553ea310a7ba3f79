"""The marker `model_pair`: a pair of its own for the tests that carry it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_subnet.text import nearest, safe

MARKER = (
    "model_pair(*, base, tuned, rename=None, vocab='strict', as_dtype=None): "
    "the checkpoints that the fixture model_pair opens for this test; paths are relative to rootdir"
)
_KEYWORDS = ("base", "tuned", "rename", "vocab", "as_dtype")


def parametrize_marked(metafunc: pytest.Metafunc) -> None:
    """Turn the marker into an indirect, session-scoped parameter of `model_pair`."""
    mark = metafunc.definition.get_closest_marker("model_pair")
    if mark is None or "model_pair" not in metafunc.fixturenames:
        return
    keywords = _checked(metafunc.definition.nodeid, mark)
    for side in ("base", "tuned"):
        source = keywords[side]
        if isinstance(source, os.PathLike):
            keywords[side] = os.fspath(source)
    name = "-".join(_short(keywords[side]) for side in ("base", "tuned"))
    metafunc.parametrize("model_pair", [keywords], indirect=True, scope="session", ids=[name])


def _checked(nodeid: str, mark: pytest.Mark) -> dict[str, object]:
    where = f"{nodeid}: @pytest.mark.model_pair"
    if mark.args:
        raise _collect_error(f"{where} takes keywords only: base=…, tuned=…")
    for keyword in mark.kwargs:
        if keyword not in _KEYWORDS:
            hint = nearest(keyword, _KEYWORDS)
            raise _collect_error(f"{where} does not know the keyword {safe(keyword)!r}{hint}")
    missing = [side for side in ("base", "tuned") if not mark.kwargs.get(side)]
    if missing:
        raise _collect_error(f"{where} needs {' and '.join(f'{side}=…' for side in missing)}")
    return dict(mark.kwargs)


def _short(source: object) -> str:
    return safe(Path(source).name) if isinstance(source, str) else type(source).__name__


def _collect_error(text: str) -> pytest.Collector.CollectError:
    # Not a UsageError: during collection xdist turns that into an internal error.
    return pytest.Collector.CollectError(text)
