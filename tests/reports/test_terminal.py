"""The summary's text, from plain tables."""

import sys
from types import SimpleNamespace

import pytest

from pytest_subnet.reports.terminal import summary, write_summary


def row_of(layer, kind, dtype, entries, updated, beyond, name="", shape=""):
    return (layer, kind, dtype, entries, updated, beyond, name or f"{layer}.{kind}", shape, 0, 0, 0)


def table_of(*rows, **more):
    side = {"label": "side", "fingerprint": None}
    table = {"key": "k", "pair": "base -> tuned", "base": side, "tuned": side, "notes": []}
    rows = [row_of(*row) for row in rows]
    counts = {"total": len(rows), "read": len(rows), "taken": 0}
    return {**table, **counts, "rows": dict(enumerate(rows)), **more}


def lines_of(*rows, ascii_only=False, width=100, verbose=True, **more):
    table = table_of(*rows, **more)
    return summary(table, ascii_only=ascii_only, width=width, verbose=verbose).splitlines()


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
    assert lines[10].split() == ["up_proj", "200", "60", "70.00%", "72.50%"]  # moved most
    assert lines[11].split() == ["norm", "100", "0", "100.00%", "100.00%"]


def test_all_tensors_are_listed_when_asked_for_and_what_moved_most_comes_first():
    rows = [(0, f"kind{number}", "f32", 100, number, 0) for number in range(20)]

    lines = lines_of(*rows)

    names = [line.split()[-1] for line in lines[-20:]]
    assert names == [f"0.kind{number}" for number in reversed(range(20))]
    assert lines[-22].split()[-1] == "tensor"


def test_the_tensors_that_moved_most_come_first():
    rows = [(0, f"kind{number}", "f32", 100, number, 0) for number in range(9)]

    lines = lines_of(*rows, verbose=False)

    assert lines[3].split()[-1] == "tensor"
    assert [line.split()[-1] for line in lines[5:10]] == [f"0.kind{n}" for n in (8, 7, 6, 5, 4)]
    assert lines[5].split() == ["0", "100", "8", "92.00%", "100.00%", "0.kind8"]
    assert lines[10] == "… 3 more tensors moved; -v shows all"


def test_of_tensors_that_moved_alike_the_larger_comes_first():
    lines = lines_of((0, "a", "f32", 10, 5, 5), (0, "b", "f32", 100, 50, 50), verbose=False)

    assert [line.split()[-1] for line in lines[5:7]] == ["0.b", "0.a"]


def test_each_layer_has_a_block_and_the_highest_is_what_moved_most():
    updated = (0, 1, 250, 500, 1000)
    lines = lines_of(
        *((layer, "norm", "f32", 2000, count, 0) for layer, count in enumerate(updated)),
        (None, "embed", "f32", 10, 10, 10),  # of no layer
        verbose=False,
    )

    strip = lines.index("layers 0-4  .▁▂▄█")
    assert lines[strip + 1] == "            █ = 50.00% updated, . = nothing"


@pytest.mark.parametrize(
    ("updated", "ascii_only", "strip"),
    [
        ([7], False, ["layer 0  █", "         █ = 70.00% updated, . = nothing"]),
        ([0, 0], False, ["layers 0-1  ..", "            nothing moved"]),
        ([1, 8], True, ["layers 0-1  18", "            8 = 80.00% updated, . = nothing"]),
    ],
)
def test_a_strip_of_one_layer_of_nothing_and_in_ascii(updated, ascii_only, strip):
    rows = [(layer, "norm", "f32", 10, count, 0) for layer, count in enumerate(updated)]

    lines = lines_of(*rows, ascii_only=ascii_only, verbose=False)

    assert "\n".join(strip) in "\n".join(lines)


def test_a_model_without_layers_has_no_strip():
    lines = lines_of((None, "norm", "f32", 10, 1, 0), verbose=False)

    assert not [line for line in lines if line.startswith("layer ")]


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_lines_are_no_wider_than_the_terminal(width, verbose):
    name = "model.layers.{}.mlp.experts.127.gate_up_proj.weight"
    rows = [
        (layer, "gate_up_proj", "bf16", 67_895_296, 1_234_567 * layer, 0, name.format(layer))
        for layer in range(50)
    ]

    lines = lines_of(*rows, width=width, verbose=verbose)

    assert max(map(len, lines[2:])) <= width
    assert all("…" in line or line.endswith("weight") for line in lines if "eight" in line)


def test_a_name_without_room_loses_its_middle():
    rows = [(0, "q_proj", "f32", 4, 1, 0, "model.layers.0.self_attn.q_proj.weight")]

    lines = lines_of(*rows, width=80, verbose=False)

    assert lines[5].endswith("%  model.laye…f_attn.q_proj.weight")
    assert len(lines[5]) <= 80


@pytest.mark.parametrize(
    ("changed", "bar"),
    [(0, ""), (1, "▏"), (500, "██████████"), (1000, "████████████████████")],
)
def test_a_bar_shows_the_share_that_moved(changed, bar):
    assert lines_of((0, "norm", "f32", 1000, changed, 0))[5].rstrip().endswith(f"%  {bar}".rstrip())


def test_bars_can_be_drawn_in_ascii():
    lines = lines_of((0, "norm", "f32", 4, 2, 2), ascii_only=True)

    assert lines[5].split()[-1] == "#" * 10  # only a name that was cut has more than ASCII
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


def test_tables_follow_each_other_under_one_heading(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    reporter = Reporter()
    table = table_of((0, "norm", "f32", 1, 0, 0))
    write_summary(reporter, [table, table])

    one = summary(table, width=80).splitlines()
    assert reporter.lines == ["= subnet: what moved", *one, "", *one]


@pytest.mark.parametrize(
    ("encoding", "drawn"),
    [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#"), ("no-such-codec", "#"), (None, "█")],
)
def test_blocks_are_drawn_only_where_the_terminal_has_them(monkeypatch, encoding, drawn):
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(encoding=encoding))
    reporter = Reporter()
    write_summary(reporter, [table_of((0, "norm", "f32", 1, 1, 1))], verbose=True)

    assert drawn * 20 in "\n".join(reporter.lines)


@pytest.mark.parametrize("name", ["::error::gone", "  ::warning::x", "##[error]x"])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_a_command_to_the_runner_of_github(name, verbose):
    reporter = Reporter()
    table = table_of((0, name, "f32", 4, 2, 2, name), notes=[name])
    write_summary(reporter, [{**table, "pair": f"{name} -> tuned"}], verbose=verbose)

    assert not [line for line in reporter.lines if line.lstrip().startswith("::")]
    assert not [line for line in reporter.lines if "##[" in line]
    assert "error" in "".join(reporter.lines) or "warning" in "".join(reporter.lines)


def test_an_endless_kind_does_not_widen_the_table_without_end():
    lines = lines_of((0, "x" * 300_000, "f32", 4, 2, 2))

    assert max(map(len, lines)) < 400
