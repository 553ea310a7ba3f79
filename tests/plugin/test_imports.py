"""What a run imports: nothing heavy that it does not need. Only a process of its own can tell."""

import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "numba", "scipy", "tqdm", "tabulate", "difflib")
WATCH = """
    import sys

    def pytest_unconfigure(config):
        present = [name for name in {names!r} if name in sys.modules]
        config.get_terminal_writer().line(f"imported: {{present}}")
"""


def imports(project, names, *arguments):
    """Runs pytest and gives the modules among `names` that were imported when it ended."""
    # Other plugins that are installed, and what starts a measurement of coverage, count for nothing.
    project.makeconftest(WATCH.format(names=names))
    result = project.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"), *arguments
    )
    (line,) = [line for line in result.outlines if line.startswith("imported: ")]
    return result, line.removeprefix("imported: ")


def test_a_run_that_does_not_use_the_plugin_imports_nothing_heavy(project):
    project.makepyfile("def test_own(): ...")

    result, present = imports(project, HEAVY)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["plugins:*subnet-*"])
    assert present == "[]"


def test_the_public_names_alone_import_nothing_heavy(project):
    project.makepyfile(
        """
        import pytest_subnet

        def test_own():
            assert "assert_update_sparsity" in dir(pytest_subnet)
        """
    )

    _, present = imports(project, HEAVY)

    assert present == "[]"


@pytest.mark.parametrize("action", ["--fixtures", "--markers", "--collect-only"])
def test_looking_around_imports_nothing_heavy(project, gate, pair_options, action):
    _, present = imports(project, HEAVY, action, *pair_options)

    assert present == "[]"


@pytest.mark.parametrize("test", ["holds", "fails"])
def test_files_are_gated_to_a_verdict_without_torch(project, gate, pair_options, test):
    libraries = ("torch", "transformers", "safetensors", "huggingface_hub", "scipy", "tqdm")

    result, present = imports(project, (*libraries, "numba"), *pair_options, "-k", test)

    result.stdout.fnmatch_lines(["*subnet: what moved*", "*1 deselected*"])
    assert present == "['numba']"


def test_every_gate_on_files_does_without_torch(project, pair_options):
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

    result, present = imports(project, ("torch", "transformers"), *pair_options)

    result.assert_outcomes(passed=1)
    assert present == "[]"


def test_the_plugin_module_alone_is_light(project):
    found = project.run(
        *(sys.executable, "-c"),
        f"import sys, pytest_subnet.plugin; print([m for m in {HEAVY} if m in sys.modules])",
    )

    assert found.outlines == ["[]"]
