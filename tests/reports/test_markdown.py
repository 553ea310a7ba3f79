"""The Markdown of a run, whole and in its parts."""

import pytest

from pytest_subnet.reports.markdown import code, fenced, page, page_lines

MEASURED = {
    "finding": "update_sparsity",
    "numbers": {
        "sparsity": 0.8571,
        "updated": 12,
        "expected_sparsity": None,
        "sure": True,
        "ratio": 1234.5,
        "tolerance": "atol=1e-05",
        "numel": 84,
    },
    "tensors": None,
}
FAILED = """\
## pytest-subnet: NOT PASSED (1 failed, 1 passed)

### failed: `test_a.py::test_c`

`test_a.py:3`

````text
no `x`:
```
````

### Gates

|  | gate | measured | time |
| --- | --- | --- | --- |
| failed | `test_a.py::test_c` |  | 0.50 s |
| passed | `test_a.py::test_b` | update sparsity: sparsity 85.71%, updated 12, ratio 1234, \
`atol=1e-05` | 0.50 s |

python `3`, key&#95;a `1`
"""
PAIR = """\
### `base -> tuned`

66.67% same bits, 83.33% within 1e-05 (3/4 tensors, 12 entries)

- fingerprint of `base`: `ffff`
- note: 1 tensor cast to bfloat16&#58; &#60;b&#62;

| kind | tensors | entries | updated | same bits | within 1e-05 |
| --- | ---: | ---: | ---: | ---: | ---: |
| `q_proj` | 2 | 8 | 4 | 50.00% | 75.00% |
| `norm` | 1 | 4 | 0 | 100.00% | 100.00% |

| layer | tensors | entries | updated | same bits | within 1e-05 |
| --- | ---: | ---: | ---: | ---: | ---: |
| `2` | 1 | 4 | 1 | 75.00% | 100.00% |
| `10` | 1 | 4 | 3 | 25.00% | 50.00% |
| - | 1 | 4 | 0 | 100.00% | 100.00% |

Published sparsities nearest to it; none of them is a target:

| source | algorithm | model | tolerance | dtype | sparsity |
| --- | --- | --- | --- | --- | --- |
| paper | GRPO | not said | not said | bfloat16 | 86.00% |
"""


def test_the_verdict_comes_first_then_what_failed_then_the_gates(make_run):
    run = make_run(
        {"results": [MEASURED]},
        {"nodeid": "test_a.py::test_c", "outcome": "failed", "message": "no `x`:\n```"},
        environment={"python": "3", "key_a": "1"},
    )

    assert page(run) == FAILED


def test_a_pair_has_its_kinds_its_layers_and_what_is_published(make_run):
    columns = ["name", "kind", "layer", "entries", "updated", "beyond"]
    pair = {
        "pair": "base -> tuned",
        "base": {"label": "base", "fingerprint": "ffff"},
        "tuned": {"label": "tuned", "fingerprint": None},
        "notes": ["1 tensor cast to bfloat16: <b>"],
        "total": 4,
        "entries": 12,
        "updated": 4,
        "beyond": 2,
        "tensors": {
            "columns": columns,
            "rows": [
                ["a", "q_proj", 10, 4, 3, 2],
                ["b", "norm", None, 4, 0, 0],
                ["c", "q_proj", 2, 4, 1, 0],
            ],
        },
        "published": {
            "columns": ["source", "model", "algorithm", "tolerance", "dtype", "sparsity"],
            "rows": [["paper", None, "GRPO", None, "bfloat16", 0.86]],
        },
    }

    assert PAIR in page(make_run(pairs=[pair]))


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["passed", "passed"], "passed (2 passed)"),
        (["skipped"], "NOT PASSED (1 skipped)"),
        ([], "NOT PASSED (no test ran)"),
        (["error", "failed", "xfailed"], "NOT PASSED (1 failed, 1 error, 1 xfailed)"),
    ],
)
def test_the_verdict_counts_what_came_of_the_tests(make_run, outcomes, verdict):
    run = make_run(*({"outcome": outcome} for outcome in outcomes))

    assert page_lines(run)[0] == f"## pytest-subnet: {verdict}"


def test_a_run_that_failed_although_every_test_passed_says_where_to_look(make_run):
    assert page_lines(make_run({}, passed=False))[0] == (
        "## pytest-subnet: NOT PASSED (1 passed; stopped, or failed for something else than a "
        "test: see the log)"
    )


def test_a_run_without_tests_only_measures(make_run):
    assert page_lines(make_run(passed=True))[0] == (
        "## pytest-subnet: 0 pairs measured, no test judged it"
    )


def test_tests_that_are_no_gates_are_shown_only_where_they_fail(make_run):
    other = {"nodeid": "test_other.py::test_x", "gate": False}

    assert "test_other" not in page(make_run({}, other))
    assert "### failed: `test_other.py::test_x`" in page(
        make_run({}, {**other, "outcome": "failed"})
    )


def test_an_endless_message_ends(make_run):
    run = make_run({"outcome": "failed", "message": "x" * 30_000})

    assert "\n… 10,000 characters more\n" in page(run)
    assert len(page(run)) < 21_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        (" ", ""),
        ("a.b_c*<i>", "`a.b_c*<i>`"),
        ("a`b", "<code>a&#96;b</code>"),
        ("a|b", "<code>a&#124;b</code>"),
        ("a\\", "<code>a&#92;</code>"),
        (" a ", "<code> a </code>"),
    ],
)
def test_code_is_between_backticks_where_nothing_can_end_it(text, shown):
    assert code(text) == shown


@pytest.mark.parametrize(("text", "fence"), [("a", 3), ("``", 3), ("```", 4), ("x ````` y", 6)])
def test_a_fence_is_longer_than_any_in_the_text(text, fence):
    assert fenced(text) == ["`" * fence + "text", text, "`" * fence]
