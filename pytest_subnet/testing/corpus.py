"""What a laboratory reads: the source of the running interpreter's own standard library."""

from __future__ import annotations

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator

SEEN = (
    *("argparse", "csv", "dataclasses", "difflib", "ftplib", "heapq", "inspect", "shutil"),
    *("smtplib", "statistics", "tempfile", "textwrap", "threading"),
)
"""The modules that the model is trained on."""

UNSEEN = ("bisect", "contextlib", "imaplib", "poplib", "queue", "random", "selectors", "weakref")
"""The modules that its loss is measured on, and that the data sets are made from."""

_LONGEST_SIGNATURE, _LONGEST_SENTENCE, _FEWEST_WORDS = 60, 72, 4


@dataclass(frozen=True)
class Function:
    """A function of the standard library, and what its docstring says of it in one line.

    Attributes:
        name: with its module before it.
        signature: name and parameters as in the source, without annotations of the return.
        sentence: the first line of its docstring; begins with a letter.
    """

    name: str
    signature: str
    sentence: str


def read_source(module: str) -> str:
    """The source of a module of the standard library.

    Raises:
        CheckpointError: it is not there, as where only compiled modules were installed.
    """
    path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{safe(path)} cannot be read ({safe(type(error).__name__)}); a laboratory learns from "
            "the source of Python's standard library: use an interpreter that comes with it"
        ) from error


def functions(module: str, source: str) -> list[Function]:
    """The functions in `source` whose docstring begins with one short line of words, in order."""
    return list(_functions(module, ast.parse(source)))


def _functions(module: str, tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        signature = f"{node.name}({ast.unparse(node.args)})"
        sentence = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        if (
            len(signature) <= _LONGEST_SIGNATURE
            and len(sentence) <= _LONGEST_SENTENCE
            and len(sentence.split()) >= _FEWEST_WORDS
            and sentence[0].isalpha()
        ):
            yield Function(f"{module}.{node.name}", signature, sentence)
