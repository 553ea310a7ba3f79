"""How numbers and names are written for people: one spelling everywhere, nothing unescaped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SHORT_DTYPES = {"bfloat16": "bf16", "float": "f", "complex": "c", "uint": "u", "int": "i"}
_LONGEST = 300
"""What is left of a name on the terminal: more than the paths of real checkpoints take."""
_COMPARED = 500
"""Names that a wrong one is compared with letter by letter, at up to a millisecond each."""

_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://)(\S+)")
_HOST = re.compile(r"\[.*|[^:]*(:\d*)?\W*")
_QUERY = re.compile(r"[?#][^\s'\"<>()]*")
_SECRETS = (
    re.compile(r"(?<![A-Za-z0-9])(hf_|api_org_)[A-Za-z0-9]{16,}"),
    re.compile(r"(?i)\b((?:bearer|basic)\s+)(?=\S*\d)[\w.~+/=-]{8,}"),
    re.compile(
        r"([?&](?i:[\w.-]{0,80}(?:token|secret|passw|signature|credential|key)"
        r"[\w.-]{0,80}|sig)="
        r"|\b[A-Z0-9_]{0,80}(?:TOKEN|SECRET|PASSWORD|API_KEY)[A-Z0-9_]{0,80}=['\"]?)[^\s&#;,'\"<>()]+"
    ),
)
_MARKS = ("://", "hf_", "api_org_", "=", "earer", "asic", "EARER", "ASIC")
"""One of them is in every text that one of these patterns finds; most texts have none."""


def printable(name: object) -> str:
    r"""`name` with everything escaped that could steer a terminal or break a line.

    >>> printable("evil\x1b[31m\nname")
    'evil\\x1b[31m\\nname'
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(name)
    )


def safe(name: object) -> str:
    r"""`name` as it is shown: without secrets, escaped, and shortened if it has no end.

    Names of tensors, files and repositories come from outside, and paths may hold a token.

    >>> safe("ok.weight"), safe("evil\x1b[31m\nname"), len(safe("x" * 300_000))
    ('ok.weight', 'evil\\x1b[31m\\nname', 300)
    >>> safe("/home/me/hf_AbCdEfGhIjKlMnOpQrStUvWx/base")
    '/home/me/hf_…/base'
    """
    text = redacted(str(name))
    half = _LONGEST // 2
    return printable(text if len(text) <= _LONGEST else f"{text[:half]}…{text[1 - half :]}")


def redacted(text: str) -> str:
    """`text` without what must not leave this machine: tokens, passwords, signatures.

    Addresses lose user, password, query and fragment; a path that only looks like one loses no more
    than its query.

    >>> redacted("cannot read https://me:secret@host/run/model.safetensors?X-Amz-Signature=f00")
    'cannot read https://host/run/model.safetensors'
    >>> redacted("HF_TOKEN=hf_AbCdEfGhIjKlMnOpQrStUvWx and hf_AbCdEfGhIjKlMnOpQrStUvWx")
    'HF_TOKEN=… and hf_…'
    """
    if any(mark in text for mark in _MARKS):
        text = _ADDRESS.sub(lambda found: found[1] + _public(found[2]), text)
        for secret in _SECRETS:
            text = secret.sub(r"\1…", text)
    return text


def _public(address: str) -> str:
    """What may be shown of an address behind its `://`."""
    authority = re.split(r"[/?#]", address, maxsplit=1)[0]
    if "@" in authority:
        address = authority.rpartition("@")[2] + address[len(authority) :]
    elif "@" in address and not _HOST.fullmatch(authority):
        return "…"  # a password that was not escaped: where it ends is not known
    return _QUERY.sub("", address)


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as percent; never rounded to 0 % or 100 % when it is neither.

    >>> percent(0.7184), percent(1.0), percent(0.9999999), percent(1e-9)
    ('71.84%', '100.00%', '>99.99%', '<0.01%')
    """
    text = f"{fraction * 100:.{digits}f}%"
    step = f"{10**-digits:.{digits}f}%"
    if fraction < 1 and text == f"{100:.{digits}f}%":
        return f">{100 - 10**-digits:.{digits}f}%"
    return f"<{step}" if fraction > 0 and text == f"{0:.{digits}f}%" else text


def plural(count: int, noun: str) -> str:
    """A count with its noun, of which the last word changes.

    >>> plural(1, "tensor"), plural(1234, "fused matrix")
    ('1 tensor', '1,234 fused matrices')
    """
    if count == 1:
        return f"1 {noun}"
    irregular = {"matrix": "matrices", "entry": "entries"}
    first, space, last = noun.rpartition(" ")
    return f"{count:,} {first}{space}{irregular.get(last, last + 's')}"


def size(nbytes: int) -> str:
    """A number of bytes in decimal units.

    >>> size(512), size(2_280_000_000)
    ('512 B', '2.28 GB')
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def short_dtype(dtype: str) -> str:
    """A torch dtype name as the field abbreviates it.

    >>> short_dtype("bfloat16"), short_dtype("float8_e4m3fn"), short_dtype("int64")
    ('bf16', 'f8_e4m3fn', 'i64')
    """
    for long, short in _SHORT_DTYPES.items():
        if dtype.startswith(long):
            return short + dtype.removeprefix(long)
    return dtype


def spell_tensor(dtype: str, shape: Sequence[int]) -> str:
    """Dtype and shape of a tensor, never its contents.

    >>> spell_tensor("bfloat16", (3584, 18944))
    'bf16[3584,18944]'
    """
    return f"{short_dtype(dtype)}[{','.join(map(str, shape))}]"


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list, escaped, and how many more there are.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c, … 1 more'
    """
    shown = ", ".join(safe(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, … {len(names) - limit:,} more"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that offers the known word closest to `word`, or nothing.

    >>> nearest("mode.layers", ["model.layers", "lm_head"])
    '; did you mean model.layers?'
    """
    import difflib  # deferred: only a wrong name pays for it

    if len(word) > _LONGEST:  # two endless words take minutes to compare
        return ""
    known = list(known)
    if len(known) > _COMPARED:
        parts = set(word.split("."))
        known.sort(key=lambda name: -len(parts.intersection(name.split("."))))
    close = difflib.get_close_matches(word, known[:_COMPARED], n=1, cutoff=0.5)
    return f"; did you mean {safe(close[0])}?" if close else ""


def facts(verdict: str, rows: Iterable[tuple[str, str]]) -> str:
    """A message: the verdict on the first line, then labelled facts in one column.

    An empty label continues the row above it.
    """
    return "\n".join([verdict, *(f"  {label:<11}{text}" for label, text in rows)])


def column(label: str, lines: Iterable[str]) -> list[tuple[str, str]]:
    """Rows of `facts` that share one label.

    >>> column("note", ["cast", "tied"]), column("note", [])
    ([('note', 'cast'), ('', 'tied')], [])
    """
    return [("" if number else label, line) for number, line in enumerate(lines)]
