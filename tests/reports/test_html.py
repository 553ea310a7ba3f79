"""The page as text: what it says, what it holds, and that no name gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import sys
from html.parser import HTMLParser

import pytest

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import safe

pytest.importorskip("jinja2", reason="needs the extra report")
pytest.importorskip("plotly", reason="needs the extra report")

from pytest_subnet.reports.html import _unwrapped, page
from pytest_subnet.reports.page_data import pairs, sections
from pytest_subnet.reports.page_words import entry_of, number

COLUMNS = [
    *("name", "kind", "layer", "dtype", "shape", "entries", "updated", "beyond"),
    *("max_change", "change_norm", "base_norm"),
]
ROW = ["model.norm.weight", "norm", None, "bf16", "4", 4, 1, 0, 0.5, 0.5, 2.0]
HOSTILE = (
    *("<script>alert(1)</script>", "</script><script>alert(1)</script>", "<!--<script>"),
    *('" onload="x', "' x='", "{{ 7*7 }}", "{% raw %}", "a\nb", "\u202e", "\u2028", "\x1b[31m"),
    *("&lt;", "\udc80", "x" * 600),
)


def pair_of(*rows, label="base -> tuned", published=()):
    return {
        "pair": label,
        "base": {"label": "base", "fingerprint": "abc"},
        "tuned": {"label": "tuned", "fingerprint": None},
        "notes": [],
        "total": len(rows),
        "entries": sum(row[5] for row in rows),
        "updated": sum(row[6] for row in rows),
        "beyond": sum(row[7] for row in rows),
        "tensors": {"columns": COLUMNS, "rows": list(rows)},
        "published": {
            "columns": ["source", "model", "algorithm", "tolerance", "dtype", "sparsity"],
            "rows": list(published),
        },
    }


def gate(outcome="passed", message="", results=(), *, nodeid="test_a.py::test", about=True):
    place = {"file": "test_a.py", "line": 3, "gate": about, "seconds": 0.25}
    results = [{"finding": finding, "numbers": of, "tensors": None} for finding, of in results]
    return {"nodeid": nodeid, "outcome": outcome, "message": message, "results": results, **place}


def run_of(tests=(), pairs=(), **more):
    outcomes = [test["outcome"] for test in tests]
    return {
        "version": 1,
        "passed": bool(tests) and set(outcomes) == {"passed"},
        "counts": {each: outcomes.count(each) for each in outcomes},
        "tests": list(tests),
        "pairs": list(pairs),
        "environment": {"python": "3.11"},
        **more,
    }


class Reader(HTMLParser):
    """What a parser makes of a page: its elements in order, and what stands in each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": ""}
        self.elements.append(element)
        if tag not in ("meta", "wbr"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        attributes = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            each
            for each in self.elements
            if each["tag"] == tag and attributes.items() <= each["attributes"].items()
        ]

    def texts(self, tag, **attributes):
        return [" ".join(each["text"].split()) for each in self.all(tag, **attributes)]

    @property
    def data(self):
        return json.loads(self.all("script", id="data")[0]["text"])


def test_the_verdict_comes_first_with_the_first_line_of_what_failed():
    message = "update sparsity 71.84% is below the required 80.00%\n  pair   a -> b"
    read = Reader(page(run_of([gate(), gate("failed", message), gate("xfailed", "known")])))

    assert read.texts("h1") == ["Failed"]
    assert read.texts("p", class_="counts") == ["1 passed, 1 failed, 1 failed as expected in 0.8 s"]
    assert read.texts("p", class_="first")[0] == message.splitlines()[0]
    assert [each["text"] for each in read.all("pre")] == [message]
    assert read.texts("title") == ["Failed – pytest-subnet"]


@pytest.mark.parametrize(
    ("tests", "title", "details"),
    [
        ([gate()], "Passed", "1 passed in 0.2 s"),
        ([gate("error", "boom")], "Failed", "1 error in 0.2 s"),
        ([gate("skipped", "no GPU")], "Not passed", "1 skipped in 0.2 s: nothing was judged"),
        ([], "Measured", "0 pairs; no test judged it"),
    ],
)
def test_every_outcome_has_its_verdict(tests, title, details):
    read = Reader(page(run_of(tests)))

    assert read.texts("h1") == [title]
    assert read.texts("p", class_="counts") == [details]


def test_sections_without_content_are_not_there():
    assert [each["attributes"]["id"] for each in Reader(page(run_of())).all("section")] == [
        "environment"
    ]
    bare = run_of(environment={})
    assert Reader(page(bare)).all("section") == []


def test_what_is_not_about_weights_is_folded_unless_it_failed():
    others = [
        gate(nodeid="test_b.py::test_b", about=False),
        gate("failed", "no", nodeid="test_b.py::test_c", about=False),
    ]
    read = Reader(page(run_of([gate(), *others])))

    assert read.texts("h3") == ["test_a.py::test", "test_b.py::test_c", "test_b.py::test_b"]
    assert "1 more, not about weights" in read.texts("summary")


def test_a_pair_says_sparsity_and_density_and_the_published_ones():
    published = [["arXiv 1, Table 2", None, "DPO", "atol=1e-05", None, 0.8]]
    read = Reader(page(run_of(pairs=[pair_of(ROW, published=published)])))

    assert read.texts("p", class_="headline") == [
        "25.00% of the entries moved (sparsity 75.00%, same bits), 0.00% by more than 1e-5 "
        "(sparsity 100.00%)"
    ]
    cells = read.texts("td")
    assert cells[14:21] == [
        *("arXiv 1, Table 2", "DPO", "not said", "atol=1e-05", "not said", "80.00%", "20.00%")
    ]
    assert cells[-6:] == ["base", "base", "abc", "tuned", "tuned", "not taken"]


def test_a_page_runs_and_fetches_nothing_but_its_own():
    read = Reader(page(run_of([gate()], [pair_of(ROW)])))
    policy = read.all("meta", http_equiv="Content-Security-Policy")
    policy = next(
        each["attributes"]["content"]
        for each in read.all("meta")
        if "content" in each["attributes"]
    )
    scripts = [each for each in read.all("script") if each["attributes"].get("id") != "data"]

    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(each['text'].encode()).digest()).decode()}'"
        for each in scripts
    }
    assert set(rules["script-src"].split()) == hashes
    assert len(hashes) == 2
    for element in read.elements:
        assert not {"src", "href", "srcset"} & element["attributes"].keys() or (
            element["tag"] == "a" and element["attributes"]["href"].startswith("#")
        )
        assert not [name for name in element["attributes"] if name.startswith("on")]


def test_the_same_run_gives_the_same_page():
    run = run_of([gate()], [pair_of(ROW)])

    assert page(run) == page(run)


def hostile_run(names):
    rows = [[name, name, 0, name, name, *ROW[5:]] for name in names]
    overlap = {"null": names[0], "a": names[1], "b": names[2], "jaccard": 0.5, names[3]: names[4]}
    tests = [gate("failed", f"{name}\n{name}", nodeid=name) for name in names[1:]]
    found = [("mask_overlap", overlap), ("update_rank", {"pair": names[5], "ratio": 0.5})]
    tests.insert(0, gate("failed", f"{names[0]}\n{names[0]}", found, nodeid=names[0]))
    shown = pair_of(*rows, label=names[0], published=[[name] * 5 + [0.5] for name in names])
    shown["notes"] = list(names)
    return run_of(tests, [shown], environment={name: name for name in names})


def test_hostile_names_stay_text_wherever_they_stand():
    rng = random.Random(0)
    names = [f"{at}" + "".join(rng.choices(HOSTILE, k=3)) for at in range(200)]
    tame = Reader(page(hostile_run([f"name{at}" for at in range(200)])))
    text = page(hostile_run(names))
    # Before a parser looks at it: the first end of a script after the data is the data's own.
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert not set(data) & set("<>&\u2028\u2029")
    assert json.loads(data).keys() == {"pairs", "spectra", "overlaps", "trajectories"}
    read = Reader(text)

    def tags(reader):
        return [each["tag"] for each in reader.elements if each["tag"] != "wbr"]

    assert tags(read) == tags(tame)
    assert [each["text"] for each in read.all("h2", class_="name")][:200] == list(map(safe, names))
    tensors = read.data["pairs"][0]["tensors"]
    assert tensors["kind"]["words"] == list(dict.fromkeys(map(safe, names)))
    assert decoded(tensors["names"]) == list(map(safe, names))


def decoded(coded):
    names = [""]
    for shared, rest in zip(coded[::2], coded[1::2], strict=True):
        names.append(names[-1][:shared] + rest)
    return names[1:]


def test_names_share_a_start_only_where_both_languages_count_alike():
    rows = [[name, *ROW[1:]] for name in ("a.b", "a.c", "😀a", "😀b")]
    tensors = Reader(page(run_of(pairs=[pair_of(*rows)]))).data["pairs"][0]["tensors"]

    assert tensors["names"] == [0, "a.b", 2, "c", 0, "😀a", 0, "😀b"]


def test_20_000_tensors_stay_under_8_mb():
    rng = random.Random(0)
    rows = [
        [
            f"model.language_model.layers.{at // 400}.mlp.experts.{at % 400}.down_proj.weight",
            *("down_proj", at // 400, "bf16", "2048×768", 1_572_864, rng.randrange(1_000_000)),
            *(rng.randrange(1_000_000), rng.random(), rng.random(), rng.random()),
        ]
        for at in range(20_000)
    ]
    text = page(run_of(pairs=[pair_of(*rows)]))

    assert len(text.encode()) < 8_000_000
    assert decoded(Reader(text).data["pairs"][0]["tensors"]["names"]) == [row[0] for row in rows]


def test_numbers_that_json_does_not_know_are_texts():
    row = [*ROW[:8], float("inf"), float("nan"), 1.23456789]
    tensors = Reader(page(run_of(pairs=[pair_of(row)]))).data["pairs"][0]["tensors"]

    assert [tensors[key] for key in ("max_change", "change_norm", "base_norm")] == [
        *(["inf"], ["nan"], [1.23457])
    ]


def test_tolerances_of_the_run_stand_beside_the_paper_s():
    tests = [
        gate(results=[("update_sparsity", {"pair": "base -> tuned", "tolerance": tolerance})])
        for tolerance in ("atol=0.001", "rtol=0.1", "same bits", "atol=0")
    ]
    tests.append(gate(results=[("update_sparsity", {"pair": "x", "tolerance": "atol=1"})]))

    assert pairs(run_of(tests, [pair_of(ROW)]))[0]["tolerances"] == [1e-5, 1e-3]


def overlap(a, b, null="matrix", numel=9):
    return ("mask_overlap", {"a": a, "b": b, "null": null, "numel": numel, "jaccard": 0.5})


def test_overlaps_form_one_matrix_for_each_null_and_selection():
    found = [
        *(overlap("base -> x/a (bits)", "base -> x/b (bits)"),) * 2,
        overlap("base -> x/b (bits)", "base -> x/c (bits)"),
        overlap("a", "b", null=None),
        overlap("a", "b", numel=3),
    ]
    shown = sections(run_of([gate(results=found)]))["overlaps"]

    assert [each["title"] for each in shown] == ["null: matrix", "no null", "null: matrix"]
    first = shown[0]["data"]
    assert first["short"] == ["a", "b", "c"]
    assert first["runs"][2] == "base -> x/c (bits)"
    assert [cell[:2] for cell in first["cells"]] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("sparsity", 0.9388, "93.88%"),
        ("sparsity", 0.99999999, ">99.99%"),
        ("lift", 0.5, "0.5"),
        ("updated", 1234, "1,234"),
        ("saturated", True, "yes"),
        ("interval", [1.0, 2.5], "1, 2.5"),
        ("stalled", [False] * 14, ", ".join(["no"] * 12) + ", … 2 more"),
        ("pair", "a\nb", "a\\nb"),
    ],
)
def test_a_number_is_written_as_what_it_is(key, value, text):
    assert number(key, value) == text


def test_a_message_without_end_is_cut():
    shown = entry_of(gate("failed", "first\n" + "x" * 30_000))

    assert shown["first"] == "first"
    assert shown["message"].endswith("x\n… 10,006 more characters")


def test_plotly_is_not_wrapped_in_a_function_that_is_parsed_twice():
    plotly = Reader(page(run_of())).all("script", id="plotly")[0]["text"]

    assert "plotly.js v" in plotly[:100]
    assert "function(root, factory)" not in plotly[:2000]
    assert plotly.partition("*/")[2].lstrip().startswith('"use strict";var Plotly=')
    assert plotly.rstrip().endswith("window.Plotly = Plotly;")


def test_a_bundle_of_another_form_stays_as_it_is():
    for bundle in ("", "var Plotly={};", "(function(root, factory) {} (this, () => {\nf()\n}));"):
        assert _unwrapped(bundle) == bundle


def test_without_plotly_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)

    with pytest.raises(SubnetError) as raised:
        page(run_of())
    assert re.sub(r"\(.*\)", "(…)", str(raised.value)) == (
        "a report in HTML needs Jinja2 and Plotly, which cannot be imported (…); install them "
        "with pip install 'pytest-subnet[report]'"
    )
