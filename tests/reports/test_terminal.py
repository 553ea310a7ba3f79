"""The summary's text, from plain tables."""

import sys
from types import SimpleNamespace

import pytest

from pytest_subnet.reports.terminal import summary, write_summary


def table_of(*rows, **more):
    table = {"key": "k", "pair": "base -> tuned", "notes": [], "total": len(rows)}
    return {**table, "rows": dict(enumerate(rows)), "read": len(rows), "taken": 0, **more}


def lines_of(*rows, ascii_only=False, **more):
    return summary(table_of(*rows, **more), ascii_only=ascii_only).splitlines()


def test_layers_are_ordered_by_number_and_the_rest_comes_last():
    lines = lines_of(*((layer, "norm", "f32", 4, 0, 0) for layer in (10, None, 2, 0)))

    assert [line.split()[0] for line in lines[5:9]] == ["0", "2", "10", "-"]


def test_tensors_of_one_layer_and_of_one_kind_are_added_up():
    lines = lines_of(
        (0, "up_proj", "bf16", 100, 10, 5),
        (0, "norm", "bf16", 100, 0, 0),
        (1, "up_proj", "bf16", 100, 50, 50),
    )

    assert lines[5].split()[:5] == ["0", "200", "10", "95.00%", "97.50%"]
    assert lines[6].split()[:5] == ["1", "100", "50", "50.00%", "50.00%"]
    assert lines[-2].split() == ["norm", "100", "0", "100.00%", "100.00%"]
    assert lines[-1].split() == ["up_proj", "200", "60", "70.00%", "72.50%"]


@pytest.mark.parametrize(
    ("changed", "bar"),
    [(0, ""), (1, "▏"), (500, "██████████"), (1000, "████████████████████")],
)
def test_a_bar_shows_the_share_that_moved(changed, bar):
    assert lines_of((0, "norm", "f32", 1000, changed, 0))[5].rstrip().endswith(f"%  {bar}".rstrip())


def test_bars_can_be_drawn_in_ascii():
    lines = lines_of((0, "norm", "f32", 4, 2, 2), ascii_only=True)

    assert lines[5].split()[-1] == "#" * 10
    assert "\n".join(lines).isascii()


@pytest.mark.parametrize(
    ("read", "taken", "line"),
    [
        (0, 1, "scan cache: nothing read, 1 tensor taken from it"),
        (4, 1234, "scan cache: 4 tensors read, 1,234 tensors taken from it"),
    ],
)
def test_a_hit_of_the_scan_cache_is_named(read, taken, line):
    lines = lines_of((0, "norm", "f32", 1, 0, 0), notes=["one"], read=read, taken=taken)

    assert lines[2:5] == ["note: one", line, ""]


def test_dtypes_coverage_and_notes_are_said():
    lines = lines_of(
        (0, "norm", "f32", 1, 0, 0), (0, "q_proj", "bf16", 1, 0, 0), total=9, notes=["one", "two"]
    )

    assert lines[1] == "100.00% same bits, density 0.00% (bf16+f32, 2/9 tensors, 2 entries)"
    assert lines[2:4] == ["note: one", "note: two"]


def test_a_single_changed_entry_is_not_rounded_away():
    assert lines_of((0, "norm", "f32", 10**9, 1, 0))[1].startswith(
        ">99.99% same bits, density <0.01%"
    )


class Reporter:
    def __init__(self):
        self.lines = []

    def write_sep(self, sep, title):
        self.lines.append(f"{sep} {title}")

    def write_line(self, line):
        self.lines.append(line)


def test_nothing_is_written_without_a_table():
    reporter = Reporter()
    write_summary(reporter, [])

    assert reporter.lines == []


def test_tables_follow_each_other_under_one_heading():
    reporter = Reporter()
    table = table_of((0, "norm", "f32", 1, 0, 0))
    write_summary(reporter, [table, table])

    one = summary(table).splitlines()
    assert reporter.lines == ["= subnet: what moved", *one, "", *one]


@pytest.mark.parametrize(
    ("encoding", "drawn"),
    [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#"), ("no-such-codec", "#"), (None, "█")],
)
def test_blocks_are_drawn_only_where_the_terminal_has_them(monkeypatch, encoding, drawn):
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(encoding=encoding))
    reporter = Reporter()
    write_summary(reporter, [table_of((0, "norm", "f32", 1, 1, 1))])

    assert drawn * 20 in "\n".join(reporter.lines)


def test_an_endless_kind_does_not_widen_the_table_without_end():
    lines = lines_of((0, "x" * 300_000, "f32", 4, 2, 2))

    assert max(map(len, lines)) < 400
