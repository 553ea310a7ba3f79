"""Two hundred hostile names, as tensor, path, test and message, through every report of text."""

import html.parser
import importlib.resources
import json

import jsonschema
import pytest
from markdown_it import MarkdownIt

from pytest_subnet.reports import json_file, markdown
from pytest_subnet.reports.github import error_annotations, fitted
from pytest_subnet.reports.measured import tensor_name, text
from pytest_subnet.reports.terminal import write_summary

_OURS = {"code", "br", "h2", "h3", "p", "pre", "table", "thead", "tbody", "tr", "th", "td"}


class Page(html.parser.HTMLParser):
    """What a browser is given: the elements, and the texts of each."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._open = set(), {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add((tag, *(name for name, _ in attrs)))
        if tag != "br":
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def handle_comment(self, data):
        self.elements.add("comment")


@pytest.fixture(scope="session")
def page(hostile_run):
    """The Markdown as a browser would be given it, by who lets raw HTML through."""
    return Page(
        MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown.page(hostile_run))
    )


def test_json_holds_every_name_and_fits_its_schema(hostile_run, hostile_names):
    page = json_file.page(hostile_run)

    run = json.loads(page)
    schema = importlib.resources.files("pytest_subnet").joinpath("reports/schema.json")
    jsonschema.validate(run, json.loads(schema.read_text("utf-8")))
    assert run == hostile_run
    assert page.isascii()
    assert page.count("\n") == 1
    names = {row[0] for row in run["pairs"][0]["tensors"]["rows"]}
    assert names == {tensor_name(name) for name in hostile_names}


def test_every_text_of_a_run_is_printable(hostile_run):
    def texts(value):
        match value:
            case str():
                yield value
            case dict():
                for key, part in value.items():
                    yield from (key, *texts(part))
            case list():
                for part in value:
                    yield from texts(part)

    for test in hostile_run["tests"]:
        assert test["message"].replace("\n", "").isprintable()
    bare = {**hostile_run, "tests": [{**test, "message": ""} for test in hostile_run["tests"]]}
    assert all(found.isprintable() for found in texts(bare))


def test_markdown_has_no_element_but_its_own(page):
    allowed = {(tag,) for tag in _OURS} | {("ul",), ("li",), ("code", "class")}
    allowed |= {("th", "style"), ("td", "style")}

    assert page.elements <= allowed


def test_markdown_has_every_name_as_it_is(page, hostile_names):
    shown = {found.strip() for found in page.texts["code"]}

    for name in hostile_names:
        assert text(f"{name}::{name}").strip() in shown


def test_markdown_has_every_message_between_its_fences(page, hostile_run):
    shown = page.texts["pre"]

    assert [found.removesuffix("\n") for found in shown] == [
        test["message"] for test in hostile_run["tests"]
    ]


def test_tables_of_markdown_keep_their_columns(hostile_run):
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown.page(hostile_run))
    rows, cells = 0, []
    for token in tokens:
        if token.type == "tr_open":
            cells.append(0)
        elif token.type in ("td_open", "th_open"):
            cells[-1] += 1
        elif token.type == "table_close":
            assert len(set(cells)) == 1
            rows, cells = rows + len(cells), []
    written = [line for line in markdown.page_lines(hostile_run) if line.startswith("| ")]
    in_messages = [
        line
        for test in hostile_run["tests"]
        for line in test["message"].split("\n")
        if line.startswith("| ")
    ]
    assert rows == len(written) - len(in_messages) - 4  # rules below the heads of four tables


@pytest.mark.parametrize("most", [200, 5_000, 20_000, 60_000])
def test_markdown_that_is_cut_is_whole_markdown(hostile_run, most):
    cut = fitted(markdown.page_lines(hostile_run), most)

    assert len(cut.encode()) <= most
    assert cut.splitlines()[-1].endswith(" in the log")
    page = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(cut))
    assert page.texts["p"][-1].endswith(" in the log")  # not in a fence that is still open


def test_annotations_are_one_line_and_one_command_each(hostile_run):
    many = error_annotations(hostile_run)
    each = [error_annotations({**hostile_run, "tests": [test]}) for test in hostile_run["tests"]]

    assert len(many) == 10
    for (line,) in each:
        assert line.isprintable()
        head, properties, message = _parsed(line)
        assert head == "error"
        assert set(properties) == {"file", "line", "title"}
        assert message


def _parsed(line):
    """As GitHub's runner reads a command."""
    assert line.startswith("::")
    head, message = line[2:].split("::", 1)
    command, properties = head.split(" ", 1)
    pairs = [part.split("=", 1) for part in properties.split(",")]
    return command, dict(pairs), _unescaped(message)


def _unescaped(text):
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def test_an_annotation_says_what_the_test_said(hostile_run):
    for test in hostile_run["tests"]:
        (line,) = error_annotations({**hostile_run, "tests": [test]})
        _, properties, message = _parsed(line)

        shown = test["message"] if len(test["message"]) < 4000 else message
        assert message == shown
        assert _unescaped(properties["title"]) == test["nodeid"]
        assert _unescaped(properties["file"]) == test["file"]


@pytest.mark.parametrize("verbose", [False, True])
def test_the_terminal_is_steered_by_no_name(hostile_names, verbose, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = []

    class Reporter:
        def write_sep(self, sep, title): ...

        write_line = staticmethod(lines.append)

    rows = {
        number: (number % 3, tensor_name(name), "f32", 2, 2, 2, tensor_name(name), "2", 1, 1, 1)
        for number, name in enumerate(hostile_names)
    }
    label = text(hostile_names[-1])
    side = {"label": label, "fingerprint": None}
    table = {"key": "k", "pair": label, "base": side, "tuned": side, "notes": [label]}
    write_summary(
        Reporter(),
        [{**table, "total": 200, "rows": rows, "read": 200, "taken": 0}],
        verbose=verbose,
    )

    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.lstrip().startswith("::") or "##[" in line]
