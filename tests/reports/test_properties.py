"""Results as flat, plain, printable properties."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pytest_subnet.reports.properties import PropertySink


class Result:
    def __init__(self, **numbers):
        self.numbers = numbers

    def to_dict(self):
        return {"finding": "thing", **self.numbers}


def recorded(*results):
    properties = []
    sink = PropertySink(properties)
    for result in results:
        sink(result)
    return properties


def test_numbers_are_named_after_their_finding():
    assert recorded(Result(share=0.5, count=3, sure=True, unit="bits")) == [
        ("subnet.thing.share", 0.5),
        ("subnet.thing.count", 3),
        ("subnet.thing.sure", True),
        ("subnet.thing.unit", "bits"),
    ]


def test_later_results_of_one_finding_are_numbered():
    names = [name for name, _ in recorded(Result(a=1), Result(a=2), Result(a=3))]

    assert names == ["subnet.thing.a", "subnet.thing#2.a", "subnet.thing#3.a"]


def test_what_is_nested_is_flattened_and_what_is_empty_left_out():
    result = Result(under={"same bits": 1, "deep": {"er": 2}}, notes=["a", "b"], none=None, no=[])

    assert recorded(result) == [
        ("subnet.thing.under.same bits", 1),
        ("subnet.thing.under.deep.er", 2),
        ("subnet.thing.notes", "a; b"),
    ]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.int64(3), "3"),
        (np.bool_(True), "True"),
        (Fraction(1, 2), "1/2"),
        (Path("a") / "b", str(Path("a") / "b")),
        ("\ud800 \x1b[31m\n", r"\ud800 \x1b[31m\n"),
        (["\x00"], r"\x00"),
        ((1, 2), "1; 2"),
        (2**70, 2**70),
        (float("inf"), float("inf")),
    ],
)
def test_only_plain_types_and_printable_text_come_out(value, plain):
    ((_, found),) = recorded(Result(value=value))

    assert found == plain
    assert type(found) is type(plain)


def test_the_names_of_properties_are_printable_too():
    assert recorded(Result(under={"\x1b[31m": 1})) == [(r"subnet.thing.under.\x1b[31m", 1)]


def test_the_dictionary_of_a_result_is_left_as_it_is():
    result = Result(a=1)
    result.to_dict = lambda kept={"finding": "thing", "a": 1}: kept

    assert recorded(result, result) == [("subnet.thing.a", 1), ("subnet.thing#2.a", 1)]


def test_a_long_name_is_kept_whole():
    name = "model." * 1000

    assert recorded(Result(worst=name, tensors={name: 1})) == [
        ("subnet.thing.worst", name),
        (f"subnet.thing.tensors.{name}", 1),
    ]
