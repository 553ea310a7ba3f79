"""Runs to show, and a Chromium that says whatever a page does besides showing them."""

from __future__ import annotations

import random
import shutil
from urllib.parse import quote

import pytest

from pytest_subnet.reports.html import page

_COLUMNS = [
    *("name", "kind", "layer", "dtype", "shape", "entries", "updated", "beyond"),
    *("max_change", "change_norm", "base_norm"),
]
_PUBLISHED = ["source", "model", "algorithm", "tolerance", "dtype", "sparsity", "comparable"]


def frame(columns, rows):
    return {"columns": columns, "rows": rows}


def tensor(rng, name, kind, layer, entries=4096):
    updated = rng.randrange(entries // 2)
    change = 10 ** rng.uniform(-7, -3)
    moved = [updated, updated // 3, change, change * 9, 3.5]
    return [name, kind, layer, "bf16", "64×64", entries, *moved]


def pair_of(rows, label="base -> tuned", notes=(), published=()):
    base, _, tuned = label.partition(" -> ")
    return {
        "pair": label,
        "base": {"label": base, "fingerprint": "0123456789abcdef"},
        "tuned": {"label": tuned, "fingerprint": None},
        "notes": list(notes),
        "total": len(rows),
        "entries": sum(row[5] for row in rows),
        "updated": sum(row[6] for row in rows),
        "beyond": sum(row[7] for row in rows),
        "tensors": frame(_COLUMNS, rows),
        "published": frame(_PUBLISHED, list(published)),
    }


def gate(nodeid="test_release.py::test_gate", outcome="passed", message="", results=()):
    return {
        "nodeid": nodeid,
        "outcome": outcome,
        "seconds": 0.5,
        "message": message,
        "file": "test_release.py",
        "line": 3,
        "gate": True,
        "results": list(results),
    }


def run_of(tests=(), pairs=(), environment=None):
    outcomes = [test["outcome"] for test in tests]
    return {
        "version": 1,
        "passed": bool(tests) and set(outcomes) == {"passed"},
        "counts": {each: outcomes.count(each) for each in outcomes},
        "tests": list(tests),
        "pairs": list(pairs),
        "environment": environment or {"python": "3.11"},
    }


@pytest.fixture(scope="session")
def big_run():
    """20,000 tensors: a mixture of experts of 50 layers, its norms apart."""
    rng = random.Random(0)
    rows = [tensor(rng, "model.embed_tokens.weight", "embed", None)]
    for layer in range(50):
        start = f"model.layers.{layer}"
        rows.append([f"{start}.input_layernorm.weight", "norm", layer, "bf16", "64"])
        rows[-1] += [64, 0, 0, 0.0, 0.0, 8.0]
        for expert in range(133):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                name = f"{start}.mlp.experts.{expert}.{kind}.weight"
                rows.append(tensor(rng, name, kind, layer))
    assert len(rows) == 20_001
    return run_of([gate()], [pair_of(rows[:-1])])


@pytest.fixture(scope="session")
def rich_run():
    """Every section that there is."""
    rng = random.Random(1)
    kinds = ("q_proj", "up_proj", "norm")
    rows = [
        tensor(rng, f"model.layers.{layer}.{kind}.weight", kind, layer)
        for layer in range(4)
        for kind in kinds
    ]
    published = [
        ["arXiv 2505.11711, Table 6", "a/model", "DPO", "atol=1e-05", "bfloat16", 0.9, True],
        ["arXiv 2511.08567, Table 1", None, "RLVR", "rtol=0.001", None, 0.8, False],
    ]
    runs = [f"base -> runs/{name} (same bits)" for name in ("dpo", "grpo", "sft")]
    overlaps = [
        {
            "finding": "mask_overlap",
            "numbers": {
                **{"null": "exponent", "a": runs[a], "b": runs[b], "numel": 4096},
                **{"intersection": 500, "expected": 400.0, "lift": 1.25, "kappa": 0.4},
                **{"jaccard": 0.3, "one_sided_a": 0.6, "one_sided_b": 0.2 + a / 10},
            },
            "tensors": None,
        }
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    spectrum = {
        "finding": "update_rank",
        "numbers": {"ratio": 0.98, "stable_rank": 12.5, "pair": "base -> tuned"},
        "tensors": frame(
            ["name", "kind", "layer", "shape", "rank", "max_rank", "stable_rank"],
            [[row[0], row[1], row[2], row[4], 60 + row[2], 64, 8.5 + row[2]] for row in rows],
        ),
    }
    trajectory = {
        "finding": "update_dynamics",
        "numbers": {
            **{"never": 0.9, "cancelled": 0.04, "final": 0.06, "pair": "runs/dpo"},
            **{"tolerance": "same bits", "checkpoints": ["checkpoint-10", "checkpoint-20"]},
            **{"sparsities": [0.97, 0.94], "step_sparsities": [0.97, 0.96]},
        },
        "tensors": None,
    }
    tests = [
        gate("test_release.py::test_holds", results=[*overlaps, spectrum]),
        gate("test_release.py::test_path", results=[trajectory]),
        gate(
            "test_release.py::test_fails",
            "failed",
            "update sparsity 71.84% is below the required 80.00%\n  pair   base -> tuned",
        ),
    ]
    return run_of(tests, [pair_of(rows, notes=["bf16 beside f32"], published=published)])


@pytest.fixture(scope="session")
def hostile_names():
    """200 names that want to be more than text."""
    rng = random.Random(2)
    pwn = "window.__pwned=1;alert(1)"
    parts = [
        *(
            f"<script>{pwn}</script>",
            f"</script><script>{pwn}</script>",
            f"<img src=x onerror={pwn}>",
        ),
        *(f"\"onmouseover='{pwn}'", f"javascript:{pwn}", f"<a href='javascript:{pwn}'>x</a>"),
        *("{{ 7*7 }}", "{% for x in y %}", "%{z}", "${x}", "<!--", "]]>", "<svg/onload=alert(1)>"),
        *(
            "\u202eevil",
            "\u2028",
            "\u2029",
            "\n",
            "\r\n",
            "\x00",
            "\x1b[31m",
            "::error::x",
            "\udc80",
        ),
        *(
            "&lt;b&gt;",
            "<b>",
            "'",
            '"',
            "`",
            "\\",
            "x" * 5000,
            "😀",
            "é",
            "constructor",
            "__proto__",
        ),
    ]
    return [
        f"{at}." + "".join(rng.choice(parts) for _ in range(rng.randint(1, 3))) for at in range(200)
    ]


@pytest.fixture(scope="session")
def hostile_run(hostile_names):
    """These names wherever a run has a text."""
    rng = random.Random(3)
    rows = [
        tensor(rng, name, hostile_names[at // 20], at % 10) for at, name in enumerate(hostile_names)
    ]
    results = [
        {
            "finding": "mask_overlap",
            "numbers": {
                "null": name,
                "a": name,
                "b": other,
                "numel": 1,
                "jaccard": 0.5,
                name: name,
            },
            "tensors": None,
        }
        for name, other in zip(hostile_names[:3], hostile_names[3:6], strict=True)
    ]
    results.append(
        {
            "finding": "update_dynamics",
            "numbers": {
                **{"pair": hostile_names[7], "checkpoints": hostile_names[8:12]},
                **{"sparsities": [0.5] * 4, "step_sparsities": [0.5] * 4},
            },
            "tensors": None,
        }
    )
    results.append(
        {
            "finding": "update_rank",
            "numbers": {"pair": hostile_names[12], "ratio": 0.5},
            "tensors": frame(
                ["name", "kind", "layer", "rank", "max_rank", "stable_rank"],
                [[name, name, 0, 1, 2, 1.0] for name in hostile_names],
            ),
        }
    )
    tests = [gate(name, "failed", f"{name}\n{name}") for name in hostile_names]
    tests[0]["results"] = results
    pair = pair_of(rows, hostile_names[20], hostile_names[:5])
    pair["published"]["rows"] = [[name] * 5 + [0.5, True] for name in hostile_names[:9]]
    return run_of(tests, [pair], dict(zip(hostile_names[:50], hostile_names[50:100], strict=True)))


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or whichever is on the path; playwright's own is not fetched."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    with driver.sync_playwright() as started:
        # Of a container's root Chromium asks for this; all it opens here are our own files.
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a run, or the page of one, and holds it to doing nothing but show itself."""
    opened, noise = [], []

    def visit(shown, **options):
        file = shown
        if isinstance(shown, dict):
            file = tmp_path / f"{len(opened)}.html"
            file.write_text(page(shown), encoding="utf-8")
        address = f"file://{quote(str(file))}"
        tab = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        tab.on("console", lambda message: noise.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: noise.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (noise.append("dialog"), dialog.dismiss()))
        tab.on(
            "request",
            lambda request: (
                None
                if request.url.startswith("data:") or request.url == address
                else noise.append(f"request: {request.url}")
            ),
        )
        tab.add_init_script(
            "window.violations = [];"
            "document.addEventListener('securitypolicyviolation',"
            " (event) => violations.push(event.violatedDirective));"
        )
        tab.goto(address)
        opened.append(tab)
        return tab

    yield visit
    for tab in opened:
        noise += tab.evaluate("violations")
        if tab.evaluate("window.__pwned !== undefined"):
            noise.append("a name was executed")
        tab.close()
    assert noise == []
