"""A run as Markdown: a file, or the summary of a step on GitHub."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_subnet.reports.measured import words_of
from pytest_subnet.text import percent, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pytest_subnet.reports.run import Frame, Measured, Pair, Plain, Run, Test

_NOTHING_MORE = frozenset({"tensors", "tensors_total", "numel"})
"""Numbers that say how much was measured, not what."""
_SHARE = re.compile(r".*(sparsity|density|share|ratio|jaccard|dice|one_sided_[ab]|match|recovered)")
_NUMBERS = 4
_LONGEST = 20_000
_FENCE = re.compile(r"`{3,}")
_ORDER = ("failed", "error", "skipped", "xfailed", "xpassed", "passed")
_UNLESS = ("selection", "baselines")
"""Of the environment: what did not run, or was not compared, and so did not pass."""
_NOT_PLAIN = re.compile(r"[^\w ,;.%=+?/()-]|_|www\.")


def page(run: Run) -> str:
    """The run as Markdown: the verdict first, then what failed, the gates and the pairs."""
    return "\n".join(page_lines(run)) + "\n"


def page_lines(run: Run) -> list[str]:
    """The same, line by line: one line is one row of a table, and can be left out."""
    gates = [test for test in run["tests"] if test["gate"]]
    failed = [test for test in run["tests"] if test["outcome"] in ("failed", "error")]
    return [
        f"## pytest-subnet: {_verdict(run)}",
        "",
        *(line for test in failed for line in _failure(test)),
        *(_gates(gates) if gates else []),
        *(line for pair in run["pairs"] for line in _pair(pair)),
        *_environment(run["environment"]),
    ]


def _verdict(run: Run) -> str:
    counts = run["counts"]
    found = ", ".join(f"{counts[each]:,} {each}" for each in _ORDER if counts.get(each))
    if not run["tests"] and run["passed"]:
        return f"{plural(len(run['pairs']), 'pair')} measured, no test judged it"
    if run["passed"]:
        but = "".join(
            f"; {key} {code(run['environment'][key])}"
            for key in _UNLESS
            if key in run["environment"]
        )
        return f"passed ({found}{but})"
    judged = counts.get("passed") and not (counts.get("failed") or counts.get("error"))
    elsewhere = "; stopped, or failed for something else than a test: see the log"
    return f"NOT PASSED ({found or 'no test ran'}{elsewhere if judged else ''})"


def _failure(test: Test) -> list[str]:
    message = test["message"]
    left = len(message) - _LONGEST
    if left > 0:
        message = f"{message[:_LONGEST]}\n… {left:,} characters more"
    return [
        f"### {test['outcome']}: {code(test['nodeid'])}",
        "",
        code(f"{test['file']}:{test['line']}"),
        "",
        *fenced(message),
        "",
    ]


def fenced(text: str) -> list[str]:
    r"""`text` between fences that nothing in it can close.

    >>> fenced("a\n```\nb")
    ['````text', 'a', '```', 'b', '````']
    """
    fence = "`" * max([3, *(len(run) + 1 for run in _FENCE.findall(text))])
    return [f"{fence}text", *text.split("\n"), fence]


def _gates(gates: Sequence[Test]) -> list[str]:
    in_order = sorted(gates, key=lambda test: _ORDER.index(test["outcome"]))
    rows = [
        [
            test["outcome"],
            code(test["nodeid"]),
            "<br>".join(_numbers(result) for result in test["results"]),
            f"{test['seconds']:.2f} s",
        ]
        for test in in_order
    ]
    return ["### Gates", "", *_table(["", "gate", "measured", "time"], rows), ""]


def _numbers(result: Measured) -> str:
    numbers = result["numbers"]
    main = [
        f"{_words(key)} {_number(key, value)}"
        for key, value in numbers.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and key not in _NOTHING_MORE
    ]
    under = [code(str(numbers[key])) for key in ("tolerance", "null") if numbers.get(key)]
    return f"{_words(result['finding'])}: {', '.join([*main[:_NUMBERS], *under])}"


def _number(key: str, value: int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return percent(value) if _SHARE.fullmatch(key) and 0 <= value <= 1 else f"{value:.4g}"


def _words(key: str) -> str:
    return _escaped(words_of(key))


def _pair(pair: Pair) -> Iterator[str]:
    tensors = f"{len(pair['tensors']['rows']):,}/{plural(pair['total'], 'tensor')}"
    yield f"### {code(pair['pair'])}"
    yield ""
    yield (
        f"{_share(pair['entries'] - pair['updated'], pair['entries'])} same bits, "
        f"{_share(pair['entries'] - pair['beyond'], pair['entries'])} within 1e-05 "
        f"({tensors}, {plural(pair['entries'], 'entry')})"
    )
    yield ""
    facts = [
        f"- fingerprint of {code(known['label'])}: {code(known['fingerprint'])}"
        for known in (pair["base"], pair["tuned"])
        if known["fingerprint"]
    ]
    facts += [f"- note: {_escaped(note)}" for note in pair["notes"]]
    yield from [*facts, ""] if facts else []
    for column in ("kind", "layer"):
        header = [column, "tensors", "entries", "updated", "same bits", "within 1e-05"]
        yield from _table(header, _groups(pair["tensors"], column), right=header[1:])
        yield ""
    if pair["published"]["rows"]:
        yield "Published sparsities nearest to it; none of them is a target:"
        yield ""
        yield from _published(pair["published"])
        yield ""


def _groups(tensors: Frame, column: str) -> list[list[str]]:
    """What tensors of one kind or layer hold together; what moved most comes first for kinds."""
    at = {name: index for index, name in enumerate(tensors["columns"])}
    sums: dict[Plain, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in tensors["rows"]:
        counts = sums[row[at[column]]]
        counts[0] += 1
        for place, name in enumerate(("entries", "updated", "beyond"), 1):
            counts[place] += int(row[at[name]] or 0)
    found = sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0))
    if column == "kind":
        found.sort(key=lambda item: -item[1][2] / (item[1][1] or 1))
    return [
        [
            "-" if name is None else code(str(name)),
            *(f"{count:,}" for count in (tensors, entries, updated)),
            _share(entries - updated, entries),
            _share(entries - beyond, entries),
        ]
        for name, (tensors, entries, updated, beyond) in found
    ]


def _published(frame: Frame) -> list[str]:
    rows = []
    for row in frame["rows"]:
        cells = dict(zip(frame["columns"], row, strict=True))
        words = [
            _escaped(str(cells[column] or "not said"))
            for column in ("source", "algorithm", "model", "tolerance", "dtype")
        ]
        sparsity = cells["sparsity"]
        rows.append([*words, percent(sparsity) if isinstance(sparsity, float) else ""])
    return _table(["source", "algorithm", "model", "tolerance", "dtype", "sparsity"], rows)


def _environment(environment: Mapping[str, str]) -> list[str]:
    known = [f"{_escaped(key)} {code(value)}" for key, value in environment.items()]
    return [", ".join(known)]


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "-"


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> list[str]:
    marks = ["---:" if column in right else "---" for column in header]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


def code(text: str) -> str:
    """`text` as code, wherever it stands, in a table too.

    Between backticks only where nothing in it could end them or a cell; what is left is spelled in
    character references, which are never structure.

    >>> code("model.norm.weight"), code("a|`b`")
    ('`model.norm.weight`', '<code>a&#124;&#96;b&#96;</code>')
    """
    if not text.strip():
        return ""
    if not re.search(r"[|`\\]", text) and text == text.strip():
        return f"`{text}`"
    return f"<code>{_referenced(text)}</code>"


def _referenced(text: str) -> str:
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def _escaped(text: str) -> str:
    """`text` in a line of prose or a cell: no markup, no link, no mention."""
    return _NOT_PLAIN.sub(lambda found: _referenced(found[0]), text)
