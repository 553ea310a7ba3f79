"""The page of a run over 20,000 tensors: how long it takes to write, and until it answers.

    python benchmarks/report.py

needs Playwright and a Chromium on the PATH. Beside it stands the page of a run that measured
nothing, which is little more than Plotly: the difference is what 20,000 tensors cost.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from pytest_subnet.reports.html import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from pytest_subnet.reports.run import Run

ROUNDS = 5
LAYERS, EXPERTS = 48, 139
COLUMNS = [
    *("name", "kind", "layer", "dtype", "shape", "entries", "updated", "beyond"),
    *("max_change", "change_norm", "base_norm"),
]


def build_run(*, layers: int) -> Run:
    """A mixture of experts: 20,016 tensors with `layers=LAYERS`."""
    rng = random.Random(0)
    rows: list[list[bool | int | float | str | None]] = []
    for layer in range(layers):
        for expert in range(EXPERTS):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.language_model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
                updated = rng.randrange(500_000)
                sizes = [rng.random() / 1000, rng.random(), 30 + rng.random()]
                counts = [1_572_864, updated, updated // 3]
                rows.append([name, kind, layer, "bf16", "768×2048", *counts, *sizes])
    pair = {
        "pair": "base -> tuned",
        "base": {"label": "base", "fingerprint": None},
        "tuned": {"label": "tuned", "fingerprint": None},
        "notes": [],
        "total": len(rows),
        "entries": 1_572_864 * len(rows),
        "updated": sum(int(row[6] or 0) for row in rows),
        "beyond": sum(int(row[7] or 0) for row in rows),
        "tensors": {"columns": COLUMNS, "rows": rows},
        "published": {"columns": [], "rows": []},
    }
    return {
        "version": 1,
        "passed": False,
        "counts": {},
        "tests": [],
        "pairs": [pair] if rows else [],  # type: ignore[list-item]
        "environment": {"python": "3"},
    }


def open_page(browser: Browser, file: Path, *, has_rows: bool) -> tuple[float, float]:
    """Seconds from asking for the page until a click has sorted its rows, and to its first chart.

    Of a page without tables or charts: until it is there.
    """
    tab = browser.new_page(viewport={"width": 1280, "height": 1400})
    start = perf_counter()
    tab.goto(f"file://{file}", wait_until="commit")
    tab.locator("#environment").wait_for()
    if has_rows:
        sort = tab.locator("[data-table=pairs] th", has_text="density").locator("button")
        sort.dispatch_event("click")
        tab.locator("th[aria-sort]").wait_for()
    interactive = perf_counter() - start
    if has_rows:
        tab.locator("[data-chart=density] .main-svg").first.wait_for()
    drawn = perf_counter() - start
    tab.close()
    return interactive, drawn


def main() -> None:
    """Write both pages, open both, print what they took."""
    from playwright.sync_api import sync_playwright

    folder = Path(tempfile.mkdtemp())
    runs = {"20,016 tensors": build_run(layers=LAYERS), "nothing measured": build_run(layers=0)}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, run in runs.items():
            page(run)  # the first call imports Jinja2 and Plotly
            start = perf_counter()
            text = page(run)
            written = perf_counter() - start
            file = folder / f"{len(run['pairs'])}.html"
            file.write_text(text, encoding="utf-8")
            seconds = [open_page(browser, file, has_rows=bool(run["pairs"])) for _ in range(ROUNDS)]
            interactive, drawn = map(statistics.median, zip(*seconds, strict=True))
            print(
                f"{name:17} written in {written:.2f} s, {file.stat().st_size / 1e6:.2f} MB, "
                f"interactive after {interactive:.2f} s, first chart after {drawn:.2f} s"
            )
        browser.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
