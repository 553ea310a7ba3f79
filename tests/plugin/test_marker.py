"""The marker model_pair: a pair of its own for the tests that carry it."""

import pytest

STRICT = pytest.version_tuple >= (9, 0)
NAMES_CHECKED = [
    (
        'base="base", tunde="tuned"',
        "does not know the keyword 'tunde'; did you mean tuned?",
    ),
    (
        'base="base", tuned="tuned", xyz=1',
        "does not know the keyword 'xyz'; it takes base, tuned, rename, vocab, as_dtype",
    ),
    ('tuned="tuned"', "needs base=…"),
    ("", "needs base=… and tuned=…"),
    ('base="base", tuned=""', "needs tuned=…"),
    ('"base", "tuned"', "takes keywords only: base=…, tuned=…"),
]


def test_a_marked_test_has_its_own_pair(project, pair_options):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="tuned", tuned="base")
        def test_marked(model_pair):
            assert model_pair.label == "tuned -> base"

        def test_unmarked(model_pair):
            assert model_pair.label == "base -> tuned"
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=2)


def test_tests_with_the_same_pair_share_it(project, pair_options, scans):
    source = """
        import pytest
        from pytest_subnet import assert_update_sparsity

        @pytest.mark.model_pair(base="base", tuned="tuned")
        def test_marked(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)

        def test_unmarked(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)

        @pytest.mark.model_pair(base="tuned", tuned="base")
        def test_other(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)

        @pytest.mark.model_pair(tuned="tuned", base="base")
        def test_marked_again(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)
    """
    project.makepyfile(test_one=source, test_two=source)

    project.runpytest(*pair_options).assert_outcomes(passed=8)

    assert sorted(scans) == [("base -> tuned", 4), ("tuned -> base", 4)]


def test_what_costs_to_load_is_set_up_once_for_neighbours_with_the_same_mark(project):
    project.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def loaded(model_pair):
            print("loading", model_pair.label)
        """
    )
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="base", tuned="tuned")
        def test_one(loaded): ...

        @pytest.mark.model_pair(base="base", tuned="tuned")
        def test_two(loaded): ...
        """
    )

    result = project.runpytest("-s")

    result.assert_outcomes(passed=2)
    assert result.stdout.str().count("loading base -> tuned") == 1


@pytest.mark.parametrize("strict", ["", pytest.param("strict = true", id="strict")])
def test_marks_go_with_classes_modules_and_parameters(project, strict):
    if strict and not STRICT:
        pytest.skip("pytest 9.0 brought strict")
    project.makeini(f"[pytest]\n{strict}")
    project.makepyfile(
        test_marks="""
        import pytest

        pytestmark = pytest.mark.model_pair(base="base", tuned="tuned")

        def test_of_the_module(model_pair):
            assert model_pair.label == "base -> tuned"

        @pytest.mark.model_pair(base="tuned", tuned="base")
        class TestClass:
            def test_of_the_class(self, model_pair):
                assert model_pair.label == "tuned -> base"

            @pytest.mark.parametrize("bound", [0.1, 0.2])
            @pytest.mark.model_pair(base="base", tuned="tuned", as_dtype="float16")
            def test_of_its_own(self, model_pair, bound):
                assert model_pair.notes == ("4 tensors cast to float16",)

            def test_without_the_fixture(self): ...
        """
    )

    result = project.runpytest("-v")

    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines_random(
        [
            "*::test_of_the_module[[]base-tuned[]] PASSED*",
            "*::TestClass::test_of_the_class[[]tuned-base[]] PASSED*",
            "*::TestClass::test_of_its_own*0.1*PASSED*",
            "*::TestClass::test_of_its_own*0.2*PASSED*",
        ]
    )


def test_all_keywords_of_open_pair_are_taken(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(
            base="base",
            tuned="tuned",
            rename={"model.norm.weight": "norm"},
            vocab="common",
            as_dtype="bfloat16",
        )
        def test_marked(model_pair):
            assert len(model_pair.problems) == 2
        """
    )

    project.runpytest().assert_outcomes(passed=1)


def test_sources_may_be_paths_and_tensors(project):
    project.makepyfile(
        """
        import pathlib
        import pytest
        import torch

        NORM = {"model.norm.weight": torch.ones(4)}

        @pytest.mark.model_pair(base=pathlib.Path("base"), tuned=NORM)
        def test_marked(model_pair):
            assert [tensor.name for tensor in model_pair.tensors] == ["model.norm.weight"]
        """
    )

    project.runpytest("-v").stdout.fnmatch_lines(["*test_marked[[]base-dict[]] PASSED*"])


def test_paths_are_relative_to_the_rootdir(project, monkeypatch):
    project.makeini("[pytest]")
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="base", tuned="./tuned")
        def test_marked(model_pair):
            assert model_pair.label == "base -> tuned"
        """
    )
    monkeypatch.chdir(project.mkdir("below"))

    project.runpytest("..").assert_outcomes(passed=1)


def test_paths_and_the_rootdir_may_hold_spaces_and_other_scripts(project, monkeypatch):
    root = project.path / "für 模型"
    root.mkdir()
    for name in ("base", "tuned"):
        (project.path / name).rename(root / f"{name} ü")
    (root / "pytest.ini").write_text("[pytest]")
    (root / "test_marked.py").write_text(
        "import pytest\n"
        '@pytest.mark.model_pair(base="base ü", tuned="tuned ü")\n'
        "def test_marked(model_pair):\n"
        '    assert model_pair.label == "base ü -> tuned ü"\n',
        encoding="utf-8",
    )
    monkeypatch.chdir(root)

    project.runpytest().assert_outcomes(passed=1)


@pytest.mark.parametrize(("arguments", "message"), NAMES_CHECKED)
def test_a_wrong_mark_ends_collection_with_one_clean_error(project, arguments, message):
    project.makepyfile(
        test_wrong=f"""
        import pytest

        @pytest.mark.model_pair({arguments})
        def test_marked(model_pair): ...
        """
    )

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1)
    assert f"test_wrong.py::test_marked: @pytest.mark.model_pair {message}" in result.outlines


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ('vocab="comon"', "vocab='comon' is not one of 'strict', 'common'*"),
        ('as_dtype="int4"', "as_dtype='int4' is not one of *"),
        ("rename=5", "rename=5 is neither a mapping from names in tuned to names in base nor *"),
        ('rename={"w": ["x"]}', "rename maps names to names; ['x'] is not a string"),
    ],
)
def test_a_wrong_value_is_a_failure_without_a_traceback(project, keyword, message):
    project.makepyfile(
        f"""
        import pytest

        @pytest.mark.model_pair(base="base", tuned="tuned", {keyword})
        def test_marked(model_pair): ...
        """
    )

    result = project.runpytest()

    result.assert_outcomes(errors=1)
    message = message.replace("[", "[[]")
    result.stdout.fnmatch_lines([f"@pytest.mark.model_pair: {message}"])
    result.stdout.no_fnmatch_line("*fixtures.py*")


@pytest.mark.parametrize("taken", ["request", "asked"])
def test_a_pair_that_is_asked_for_in_the_test_is_the_marked_one(project, pair_options, taken):
    project.makepyfile(
        f"""
        import pytest

        @pytest.fixture
        def asked(request):
            return request

        def test_before(model_pair):
            assert model_pair.label == "base -> tuned"

        @pytest.mark.model_pair(base="tuned", tuned="base")
        def test_marked({taken}):
            assert {taken}.getfixturevalue("model_pair").label == "tuned -> base"

        def test_after(request):
            assert request.getfixturevalue("model_pair").label == "base -> tuned"
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=3)


def test_a_marked_test_that_takes_only_request_opens_nothing(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="nowhere", tuned="nowhere")
        def test_marked(request): ...
        """
    )

    project.runpytest("-W", "error").assert_outcomes(passed=1)


def test_a_pair_from_a_parameters_own_mark_is_refused(project, pair_options):
    project.makepyfile(
        """
        import pytest

        OTHER = pytest.mark.model_pair(base="tuned", tuned="base")

        @pytest.mark.parametrize("bound", [0.1, pytest.param(0.2, marks=OTHER)])
        def test_marked(model_pair, bound):
            assert model_pair.label == "base -> tuned"
        """
    )

    result = project.runpytest(*pair_options)

    result.assert_outcomes(passed=1, errors=1)
    assert (
        "@pytest.mark.model_pair in pytest.param(…, marks=…) comes too late to choose a pair; "
        'write pytest.mark.parametrize("model_pair", [{"base": …, "tuned": …}], indirect=True), '
        "or open the pair with the fixture open_model_pair"
    ) in result.outlines


UNITTEST = """
    import pytest
    import unittest

    @pytest.mark.model_pair({arguments})
    class TestRelease(unittest.TestCase):
        @pytest.fixture(autouse=True)
        def take(self, {fixture}): ...

        def test_marked(self): ...
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            'base="tuned", tuned="base"',
            "cannot choose the pair of a unittest.TestCase, which pytest does not parametrize; let "
            "the class's autouse fixture take open_model_pair and open the pair",
        ),
        ('base="tuned", tunde="base"', "does not know the keyword 'tunde'; did you mean tuned?"),
    ],
)
def test_a_marked_unittest_class_is_not_judged_by_another_pair(
    project, pair_options, arguments, message
):
    project.makepyfile(UNITTEST.format(arguments=arguments, fixture="model_pair"))

    result = project.runpytest(*pair_options)

    result.assert_outcomes(errors=1)
    assert f"@pytest.mark.model_pair {message}" in result.outlines


def test_a_skipped_test_stays_skipped(project):
    source = UNITTEST.format(arguments='base="base", tuned="tuned"', fixture="model_pair")
    project.makepyfile(source.replace("def test", "@pytest.mark.skip\n        def test"))

    project.runpytest().assert_outcomes(skipped=1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            UNITTEST.format(arguments='base="base", tuned="tuned"', fixture="tmp_path"),
            "pytest does not parametrize a unittest.TestCase",
        ),
        (
            """
            import pytest

            @pytest.mark.model_pair(base="base", tuned="tuned")
            def test_marked(): ...
            """,
            "the test does not take model_pair",
        ),
    ],
)
def test_a_mark_without_effect_is_a_warning(project, source, reason):
    project.makepyfile(source)

    result = project.runpytest("-W", "default::pytest.PytestWarning")

    result.assert_outcomes(passed=1, warnings=1)
    # A library that was imported before may have changed how a warning's category is printed.
    result.stdout.fnmatch_lines([f"*@pytest.mark.model_pair has no effect here: {reason}"])


def test_the_marker_is_listed(project):
    result = project.runpytest("--markers")

    result.stdout.fnmatch_lines(["@pytest.mark.model_pair([*], base, tuned, *"])
