"""The marker `model_pair`: a pair of its own for the tests that carry it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pytest_subnet.text import nearest, safe

MARKER = (
    "model_pair(*, base, tuned, rename=None, vocab='strict', as_dtype=None): "
    "the checkpoints that the fixture model_pair opens for this test; paths are relative to rootdir"
)
_MARK = "@pytest.mark.model_pair"
_SIDES = ("base", "tuned")
_KEYWORDS = (*_SIDES, "rename", "vocab", "as_dtype")


def parametrize_marked(metafunc: pytest.Metafunc) -> None:
    """Turn the marker into an indirect, session-scoped parameter of `model_pair`."""
    mark = metafunc.definition.get_closest_marker("model_pair")
    if mark is None:
        return
    wrong = what_is_wrong(mark)
    if wrong:
        # Not a UsageError: during collection xdist turns that into an internal error.
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {_MARK} {wrong}")
    names = metafunc.fixturenames
    taken = "model_pair" in names
    if not taken and "request" not in names:
        return
    keywords = dict(mark.kwargs)
    for side in _SIDES:
        if isinstance(keywords[side], os.PathLike):
            keywords[side] = os.fspath(keywords[side])
    name = "-".join(short_name(keywords[side]) for side in _SIDES)
    if not taken:
        names.append("model_pair")  # for request.getfixturevalue; parametrize refuses other names
    metafunc.parametrize("model_pair", [keywords], indirect=True, scope="session", ids=[name])
    if not taken and "model_pair" in names:
        names.remove("model_pair")  # or it would be opened for a test that never asks for it


def refuse_ignored_mark(item: pytest.Item) -> None:
    """Fail a marked test that would be judged by another pair than the one its mark names.

    pytest shows some marks only when it is too late to parametrize the test by them.
    """
    mark = item.get_closest_marker("model_pair")
    if mark is None:
        return
    callspec = getattr(item, "callspec", None)
    if any(each.name == "model_pair" for each in getattr(callspec, "marks", ())):
        pytest.fail(
            f"{_MARK} in pytest.param(…, marks=…) comes too late to choose a pair; write "
            'pytest.mark.parametrize("model_pair", [{"base": …, "tuned": …}], indirect=True), or '
            "open the pair with the fixture open_model_pair",
            pytrace=False,
        )
    if callspec is not None and "model_pair" in callspec.params:
        return
    from unittest import TestCase  # deferred: only a marked test without a pair needs it

    if not issubclass(getattr(item, "cls", None) or object, TestCase):
        if mark in item.own_markers:  # that of a class or a module is meant for its other tests
            item.warn(_without_effect("the test does not take model_pair"))
        return
    wrong = what_is_wrong(mark)
    if wrong:
        pytest.fail(f"{_MARK} {wrong}", pytrace=False)
    if "model_pair" in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"{_MARK} cannot choose the pair of a unittest.TestCase, which pytest does not "
            "parametrize; let the class's autouse fixture take open_model_pair and open the pair",
            pytrace=False,
        )
    item.warn(_without_effect("pytest does not parametrize a unittest.TestCase"))


def what_is_wrong(mark: pytest.Mark) -> str | None:
    """What the arguments of the marker lack or have too much of, if anything."""
    if mark.args:
        return "takes keywords only: base=…, tuned=…"
    return what_is_wrong_with(mark.kwargs)


def what_is_wrong_with(keywords: object) -> str | None:
    """The same of keywords that came as the parameter of `model_pair`."""
    if not isinstance(keywords, Mapping):
        return f"takes a mapping with base and tuned, not {type(keywords).__name__}"
    for keyword in keywords:
        if keyword not in _KEYWORDS:
            hint = nearest(str(keyword), _KEYWORDS) or f"; it takes {', '.join(_KEYWORDS)}"
            return f"does not know the keyword {safe(keyword)!r}{hint}"
    missing = [side for side in _SIDES if _is_nothing(keywords.get(side))]
    return f"needs {' and '.join(f'{side}=…' for side in missing)}" if missing else None


def _is_nothing(source: object) -> bool:
    return source is None or (isinstance(source, str) and not source)


def short_name(source: object) -> str:
    """What stands for one side of the pair in the name of a marked test."""
    return safe(Path(source).name) if isinstance(source, str) else type(source).__name__


def _without_effect(reason: str) -> pytest.PytestWarning:
    return pytest.PytestWarning(f"{_MARK} has no effect here: {reason}")
