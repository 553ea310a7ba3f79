"""Every result's numbers reach user_properties, whichever way it was measured."""

import xml.etree.ElementTree as ET

import pytest

PROPERTY_DUMP = """
    import pytest

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(report):
        if report.when == "teardown" and type(report) is pytest.TestReport:
            with open(pytest_dump, "a", encoding="utf-8") as file:
                print(repr((report.nodeid, report.user_properties)), file=file)
"""


@pytest.fixture
def properties(project):
    """Runs pytest and gives the properties of each test, as pytest's last report has them."""
    dump = project.path / "properties"
    project.makeconftest(f"    pytest_dump = {str(dump)!r}\n" + PROPERTY_DUMP)

    def properties(*arguments):
        project.runpytest(*arguments)
        lines = dump.read_text(encoding="utf-8").splitlines()
        return {
            node.partition("::")[2]: dict(found)
            for node, found in map(eval, lines)  # what repr wrote above
        }

    return properties


def test_a_result_is_recorded_with_what_it_was_measured_on(project, properties, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import assert_update_sparsity

        def test_gate(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8, atol=1e-5, exclude="*norm*")
        """
    )

    found = properties(*pair_options)["test_gate"]

    assert found["subnet.update_sparsity.sparsity"] == 0.85
    assert found["subnet.update_sparsity.density"] == 0.15
    assert found["subnet.update_sparsity.updated"] == 12
    assert found["subnet.update_sparsity.numel"] == 80
    assert found["subnet.update_sparsity.tensors"] == 3
    assert found["subnet.update_sparsity.tensors_total"] == 4
    assert found["subnet.update_sparsity.dtype"] == "f32"
    assert found["subnet.update_sparsity.tolerance"] == "atol=1e-05"
    assert found["subnet.update_sparsity.pair"] == "base -> tuned"
    assert found["subnet.update_sparsity.updated_under.same bits"] == 12


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        ("assert_update_sparsity(pair, at_least=0.99)", "update_sparsity"),
        ("assert_even_sparsity(pair, max_spread=0.01)", "update_sparsity"),
        ("assert_frozen(pair, '*')", "update_movement"),
        ("assert_updated(pair, '*')", "update_movement"),
        ("assert_max_change(pair, at_most=0.1)", "update_movement"),
        ("assert_same_structure(open_pair('base', {}))", None),
    ],
)
def test_a_failing_assertion_is_recorded_too(project, properties, call, finding):
    project.makepyfile(
        f"""
        from pytest_subnet import *

        def test_plain():
            pair = open_pair("base", "tuned")
            {call}
        """
    )

    found = properties()["test_plain"]

    if finding is None:
        assert found == {}  # there was nothing to measure
    else:
        assert found[f"subnet.{finding}.pair"] == "base -> tuned"


def test_a_plain_measure_without_any_fixture_is_recorded(project, properties):
    project.makepyfile(
        """
        from pytest_subnet import assert_finite, open_pair, update_sparsity

        def test_plain():
            pair = open_pair("base", "tuned")
            assert update_sparsity(pair).sparsity > 0.8
            assert_finite(pair)
        """
    )

    found = properties()["test_plain"]

    assert found["subnet.update_sparsity.updated"] == 12
    assert found["subnet.update_movement.nonfinite_tuned"] == 0


def test_a_second_result_of_one_finding_has_its_number(project, properties, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import assert_frozen, update_movement, update_sparsity

        def test_three(model_pair):
            update_sparsity(model_pair, include="*norm*")
            update_sparsity(model_pair, include="*q_proj*")
            update_movement(model_pair)
            update_sparsity(model_pair)

        def test_next(model_pair):
            update_sparsity(model_pair)
        """
    )

    found = properties(*pair_options)

    assert found["test_three"]["subnet.update_sparsity.updated"] == 0
    assert found["test_three"]["subnet.update_sparsity#2.updated"] == 4
    assert found["test_three"]["subnet.update_sparsity#3.updated"] == 12
    assert "subnet.update_movement#2.moved" not in found["test_three"]
    assert "subnet.update_sparsity#2.updated" not in found["test_next"]


def test_what_a_fixture_measures_belongs_to_the_test_that_set_it_up(project, properties):
    project.makepyfile(
        """
        import pytest
        from pytest_subnet import open_pair, update_sparsity

        @pytest.fixture(scope="module")
        def measured():
            yield update_sparsity(open_pair("base", "tuned"))
            update_sparsity(open_pair("tuned", "base"))

        def test_one(measured): ...
        def test_two(measured): ...
        """
    )

    found = properties()

    assert found["test_one"]["subnet.update_sparsity.pair"] == "base -> tuned"
    assert found["test_two"]["subnet.update_sparsity.pair"] == "tuned -> base"  # its teardown


def test_what_a_setup_that_fails_has_measured_is_recorded(project, properties):
    project.makepyfile(
        """
        import pytest
        from pytest_subnet import assert_frozen, open_pair

        @pytest.fixture
        def frozen():
            assert_frozen(open_pair("base", "tuned"), "*")

        def test_setup(frozen): ...
        """
    )

    assert properties()["test_setup"]["subnet.update_movement.moved"] == 2


def test_recorded_updates_and_unittest_are_recorded(project, properties):
    project.makepyfile(
        """
        import unittest
        import torch
        from pytest_subnet import open_pair, update_sparsity

        def test_record(record_update):
            model = torch.nn.Linear(2, 2)
            with record_update(model) as update: ...
            update_sparsity(update)

        class TestCase(unittest.TestCase):
            def test_case(self):
                update_sparsity(open_pair("base", "tuned"))
        """
    )

    found = properties()

    assert found["test_record"]["subnet.update_sparsity.pair"] == "Linear before -> Linear after"
    assert found["TestCase::test_case"]["subnet.update_sparsity.updated"] == 12


@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="pytest 9.0 brought subtests")
def test_subtests_add_nothing_to_what_the_test_recorded(project, properties, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_layers(model_pair, subtests):
            for layer in (0, 1):
                with subtests.test(layer=layer):
                    result = update_sparsity(model_pair, include=f"*.{layer}.*")
                    assert layer == 0
        """
    )

    (found,) = properties(*pair_options).values()

    assert found["subnet.update_sparsity.updated"] == 4
    assert found["subnet.update_sparsity#2.updated"] == 8
    assert not [name for name in found if "#3" in name]


def test_junit_xml_holds_the_properties_of_each_test(project, gate, pair_options):
    project.runpytest(*pair_options, "--junit-xml=report.xml")

    for case in ET.parse(project.path / "report.xml").iter("testcase"):
        found = {each.get("name"): each.get("value") for each in case.iter("property")}
        assert found["subnet.update_sparsity.updated"] == "12"
        assert found["subnet.update_sparsity.pair"] == "base -> tuned"


def test_junit_xml_stays_well_formed_with_hostile_names(project, save_checkpoint):
    import numpy as np

    name = 'evil\x1b[31m\x00<&"]]>\n.layers.0.\ud800.weight'
    weights = np.zeros((2, 2), np.float32)
    try:
        save_checkpoint("base\x1b\n<&>", {name.replace("\ud800", "x"): weights})
    except OSError:
        pytest.skip("this file system has no such names")
    save_checkpoint("ill", {name.replace("\ud800", "x"): weights + 1})
    project.makepyfile(
        r"""
        from pytest_subnet import assert_frozen, update_sparsity

        def test_hostile(open_model_pair):
            pair = open_model_pair("base\x1b\n<&>", "ill")
            update_sparsity(pair)
            assert_frozen(pair, "*")
        """
    )

    result = project.runpytest("--junit-xml=report.xml")

    result.assert_outcomes(failed=1)
    (case,) = ET.parse(project.path / "report.xml").iter("testcase")
    found = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert found["subnet.update_sparsity.pair"] == r"base\x1b\n<&> -> ill"
    assert "\x1b" not in result.stdout.str()
