"""The package's public names: the same for the interpreter, for type checkers and for readers."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import pytest_subnet

SOURCE = Path(inspect.getsourcefile(pytest_subnet)).read_text(encoding="utf-8")
ERRORS = ("CheckpointError", "PairMismatchError", "SelectionError", "SubnetError")


def names_for_type_checkers():
    """Name to module, as imported under `if TYPE_CHECKING`."""
    (block,) = [
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {}
    ours = [node for node in block.body if node.module.startswith("pytest_subnet")]
    for node in ours:
        for alias in node.names:
            assert alias.name == alias.asname, "`import x as x` makes a name public"
            found[alias.name] = node.module
    return found


def test_type_checkers_see_what_the_lazy_table_gives():
    lazy = {name: f"pytest_subnet.{module}" for name, module in pytest_subnet._MODULE.items()}

    assert names_for_type_checkers() == lazy


def test_the_table_names_no_name_twice():
    names = [name for names in pytest_subnet._WHERE.values() for name in names]

    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", pytest_subnet.__all__)
def test_every_name_is_the_one_that_its_module_defines(name):
    module = importlib.import_module(names_for_type_checkers()[name])

    assert getattr(pytest_subnet, name) is getattr(module, name)
    assert getattr(pytest_subnet, name).__module__ == module.__name__


def test_dir_lists_every_name_without_importing_it():
    assert dir(pytest_subnet) == sorted([*pytest_subnet.__all__, "__version__"])


def test_a_star_import_gives_every_name():
    namespace = {}
    exec("from pytest_subnet import *", namespace)

    assert set(pytest_subnet.__all__) <= namespace.keys()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pytest_subnet' has no attribute 'assert_x'"):
        _ = pytest_subnet.assert_x
    with pytest.raises(ImportError, match="cannot import name 'assert_x' from 'pytest_subnet'"):
        exec("from pytest_subnet import assert_x")


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert pytest_subnet.__version__ == version("pytest-subnet")


@pytest.mark.parametrize("name", pytest_subnet.__all__)
def test_every_name_is_documented(name):
    assert inspect.getdoc(getattr(pytest_subnet, name)).strip().splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    "name",
    [name for name in pytest_subnet.__all__ if inspect.isfunction(getattr(pytest_subnet, name))],
)
def test_every_function_shows_a_run_of_itself(name):
    example = inspect.getdoc(getattr(pytest_subnet, name)).partition(">>> ")[2]

    assert name in example


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_no_assertion_errors(name):
    error = getattr(pytest_subnet, name)

    assert issubclass(error, pytest_subnet.SubnetError)
    assert not issubclass(error, AssertionError)
