"""The tables of a session's pairs, from this process and from workers."""

import marshal

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.reports.session import SessionReport, WorkerTables

A, B = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`base` and `tuned` with two tensors, of which one entry moved."""
    monkeypatch.chdir(tmp_path)
    weights = {A: np.ones((2, 2), np.float32), B: np.ones(2, np.float32)}
    save_file(weights, "base.safetensors")
    weights[A][0, 0] = 2
    save_file(weights, "tuned.safetensors")


@pytest.fixture
def pair(files):
    return open_pair("base.safetensors", "tuned.safetensors")


def tables_of(*pairs):
    report = SessionReport()
    for pair in pairs:
        report.watch(pair)
    return report.tables()


def test_a_pair_that_was_opened_and_not_read_has_no_table(pair):
    assert tables_of(pair) == []


def test_what_was_read_is_in_the_table(pair):
    update_sparsity(pair, include=A)

    (table,) = tables_of(pair)

    assert table["pair"] == "base.safetensors -> tuned.safetensors"
    assert table["total"] == 2
    assert table["notes"] == []
    assert table["rows"] == {0: (0, "up_proj", "f32", 4, 1, 1, A, "2×2", 1.0, 1.0, 2.0)}
    assert table["base"] == {"label": "base.safetensors", "fingerprint": None}
    assert table["tuned"] == {"label": "tuned.safetensors", "fingerprint": None}


def test_a_fingerprint_that_is_known_is_told_and_none_is_asked_for(files, pair, monkeypatch):
    update_sparsity(pair)
    known = pair.base.fingerprint()
    monkeypatch.setattr(type(pair.base), "fingerprint", None)
    other = open_pair("base.safetensors", "tuned.safetensors")
    update_sparsity(other)

    (table,) = tables_of(other, pair)

    assert table["base"]["fingerprint"] == known
    assert table["tuned"]["fingerprint"] is None


def test_sizes_that_are_no_numbers_are_none():
    huge = torch.full((2,), 1e300, dtype=torch.float64)  # whose squares are Inf
    pair = open_pair({"w": huge}, {"w": -huge})
    update_sparsity(pair)

    ((*_, change, change_norm, base_norm),) = tables_of(pair)[0]["rows"].values()

    assert (change, change_norm, base_norm) == (2e300, None, None)


def test_a_table_is_of_plain_types_only(pair):
    update_sparsity(pair)

    marshal.dumps(tables_of(pair))  # refuses subclasses and whatever else xdist refuses


def test_what_a_file_says_is_made_printable_before_it_is_sent():
    name = "evil\x1b\ud800.weight"  # a lone surrogate ends a run of xdist
    pair = open_pair({name: torch.zeros(2)}, {name: torch.ones(2)})
    update_sparsity(pair)

    ((_, kind, _, _, _, _, shown, *_),) = tables_of(pair)[0]["rows"].values()

    assert kind == r"evil\x1b\ud800"
    assert shown == r"evil\x1b\ud800.weight"


def test_tables_of_one_pair_are_put_together(files, pair):
    other = open_pair("base.safetensors", "tuned.safetensors")
    update_sparsity(pair, include=A)
    update_sparsity(other, include=B)

    (table,) = tables_of(pair, other)

    assert sorted(table["rows"]) == [0, 1]


def test_what_two_workers_send_counts_once(pair):
    update_sparsity(pair)
    report = SessionReport()
    sent = tables_of(pair)

    report.receive(sent)
    report.receive(sent)

    (table,) = sent
    assert report.tables() == [{**table, "read": 4}]


@pytest.mark.parametrize("how", ["cast", "renamed", "written"])
def test_pairs_that_only_share_their_name_stay_apart(files, pair, how):
    update_sparsity(pair)
    keywords = {}
    if how == "cast":
        keywords = {"as_dtype": "float16"}
    elif how == "renamed":
        keywords = {"rename": {B: "other"}}
    else:
        weights = {A: np.zeros((2, 2), np.float32), B: np.zeros(2, np.float32)}
        save_file(weights, "tuned.safetensors", {"second": "run"})
    report = SessionReport()
    report.watch(pair)
    other = open_pair("base.safetensors", "tuned.safetensors", **keywords)
    update_sparsity(other, include=A)

    assert len(tables_of(pair, other)) == 2


def test_tables_come_in_the_order_of_their_names(files, pair):
    back = open_pair("tuned.safetensors", "base.safetensors")
    for each in (back, pair):
        update_sparsity(each)

    names = [table["pair"].partition(".")[0] for table in tables_of(back, pair)]

    assert names == ["base", "tuned"]


def test_tensors_that_do_not_align_are_noted(files):
    save_file({A: np.zeros((2, 2), np.float32)}, "part.safetensors")
    pair = open_pair("base.safetensors", "part.safetensors")
    update_sparsity(pair, include=A)

    (table,) = tables_of(pair)

    assert table["notes"] == ["1 tensor not compared: no partner, or another shape"]


@pytest.mark.parametrize("output", [None, {}, {"subnet": []}])
def test_a_worker_without_a_table_adds_nothing(output):
    class Node:
        workeroutput = output

    report = SessionReport()
    WorkerTables(report).pytest_testnodedown(Node())

    assert report.tables() == []


def test_a_worker_that_crashed_adds_nothing():
    report = SessionReport()
    WorkerTables(report).pytest_testnodedown(object())

    assert report.tables() == []
