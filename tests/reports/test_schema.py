"""The published schema and the data model are one."""

import importlib.resources
import json
import typing

import jsonschema
import pytest

from pytest_subnet.reports import run as model
from pytest_subnet.reports.building import run_of

SCHEMA = json.loads(
    importlib.resources.files("pytest_subnet").joinpath("reports/schema.json").read_text("utf-8")
)


@pytest.mark.parametrize("name", ["Run", "Pair", "Side", "Test", "Measured", "Frame"])
def test_an_object_has_the_same_fields_in_both(name):
    described = SCHEMA if name == "Run" else SCHEMA["$defs"][name.lower()]

    assert list(described["properties"]) == list(getattr(model, name).__annotations__)
    assert described["required"] == list(described["properties"])
    assert described["additionalProperties"] is False


def test_outcomes_and_version_are_the_same_in_both():
    assert SCHEMA["$defs"]["outcome"]["enum"] == list(typing.get_args(model.Outcome))
    assert SCHEMA["properties"]["version"]["const"] == model.VERSION


def test_a_run_of_nothing_fits():
    jsonschema.validate(run_of([]), SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"passed": "yes"},
        {"counts": {"unknown": 1}},
        {"more": 1},
        {"tests": [{}]},
        {"environment": {"python": 3}},
    ],
)
def test_what_is_no_run_does_not_fit(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**run_of([]), **change}, SCHEMA)
