"""What a run imports: nothing heavy that it does not need. Only a process of its own can tell."""

import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "numba", "scipy", "tqdm", "tabulate")
WATCH = """
    import sys

    def pytest_unconfigure(config):
        present = [name for name in {names!r} if name in sys.modules]
        config.get_terminal_writer().line(f"imported: {{present}}")
"""


@pytest.fixture
def imports(project, run_apart):
    """Runs pytest and gives the modules among some that were imported when it ended."""

    def imports(names, *arguments):
        project.makeconftest(WATCH.format(names=names))
        result = run_apart(*arguments)
        (line,) = [line for line in result.outlines if line.startswith("imported: ")]
        return result, line.removeprefix("imported: ")

    return imports


def test_a_run_that_does_not_use_the_plugin_imports_nothing_heavy(project, imports):
    project.makepyfile("def test_own(): ...")

    result, present = imports(HEAVY)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["plugins:*subnet-*"])
    assert present == "[]"


def test_the_public_names_alone_import_nothing_heavy(project, imports):
    project.makepyfile(
        """
        import pytest_subnet

        def test_own():
            assert "assert_update_sparsity" in dir(pytest_subnet)
        """
    )

    _, present = imports(HEAVY)

    assert present == "[]"


@pytest.mark.parametrize("action", ["--fixtures", "--markers", "--collect-only"])
def test_looking_around_at_tests_that_use_it_needs_no_library_of_models(
    imports, gate, pair_options, action
):
    _, present = imports(("torch", "transformers", "numba"), action, *pair_options)

    assert present == "[]"


@pytest.mark.parametrize("test", ["holds", "fails"])
def test_files_are_gated_to_a_verdict_without_torch(imports, gate, pair_options, test):
    libraries = ("torch", "transformers", "safetensors", "huggingface_hub", "tqdm")

    result, present = imports((*libraries, "numba"), *pair_options, "-k", test)

    result.stdout.fnmatch_lines(["*subnet: what moved*", "*1 deselected*"])
    assert present == "['numba']"


def test_every_gate_on_files_does_without_torch(project, imports, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import (
            assert_even_sparsity, assert_finite, assert_frozen, assert_max_change,
            assert_same_structure, assert_update_sparsity, assert_updated,
        )

        def test_gates(model_pair):
            assert_same_structure(model_pair)
            assert_finite(model_pair)
            assert_frozen(model_pair, ["*norm*", "*embed*"])
            assert_updated(model_pair, "*_proj.weight")
            assert_max_change(model_pair, at_most=1)
            assert_max_change(model_pair, at_most=1, relative=True)
            assert_even_sparsity(model_pair, max_spread=0.5)
            assert_update_sparsity(model_pair, at_least=0.5, atol=1e-6)
        """
    )

    result, present = imports(("torch", "transformers"), *pair_options)

    result.assert_outcomes(passed=1)
    assert present == "[]"


def test_the_plugin_module_alone_is_light(project):
    found = project.run(
        *(sys.executable, "-c"),
        f"import sys, pytest_subnet.plugin; print([m for m in {HEAVY} if m in sys.modules])",
    )

    assert found.outlines == ["[]"]
