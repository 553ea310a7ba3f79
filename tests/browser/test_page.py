"""The page in a real browser. That it says nothing and asks for nothing, `visit` looks after."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_subnet.text import safe

pytestmark = pytest.mark.slow

ROWS = ".pair tbody tr"
COLUMNS = ["name", "kind", "layer", "dtype", "shape", "entries", "moved", "density"]


@pytest.fixture(scope="module")
def real_page(llama_pair, tmp_path_factory):
    """The report of a run in which one gate holds and one does not."""
    root = tmp_path_factory.mktemp("project")
    (root / "test_release.py").write_text(
        "from pytest_subnet import assert_update_rank, assert_update_sparsity\n"
        "def test_holds(model_pair):\n"
        "    assert_update_sparsity(model_pair, at_least=0.5)\n"
        "    assert_update_rank(model_pair, at_least=0.0, null=None)\n"
        "def test_fails(model_pair):\n"
        "    assert_update_sparsity(model_pair, at_least=0.999)\n",
        encoding="utf-8",
    )
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--subnet-report=out.html"),
            *(f"--subnet-{side}={llama_pair / side}" for side in ("base", "tuned")),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return root / "out.html"


def draw_all(tab):
    """Scroll past every chart: they are drawn when they come near."""
    for chart in tab.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()


def cell(tab, x, y, chart="[data-chart=density]"):
    """Where a cell of a heatmap is on the screen."""
    tab.locator(chart).first.scroll_into_view_if_needed()
    tab.locator(f"{chart} .nsewdrag").first.wait_for()
    return tab.locator(chart).first.evaluate(
        """(root, [x, y]) => {
            const { xaxis, yaxis } = root._fullLayout;
            const box = root.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
        }""",
        [x, y],
    )


def names(tab, table="[data-table=pairs]"):
    return tab.locator(f"{table} tbody td.name").all_text_contents()


def status(tab):
    return tab.locator("[data-table=pairs] output").inner_text()


def scrolls_sideways(tab):
    return tab.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_a_real_run_says_its_verdict_with_both_numbers(visit, real_page):
    tab = visit(real_page)

    assert tab.locator("h1").inner_text() == "Failed"
    assert tab.locator(".counts").inner_text().startswith("1 passed, 1 failed in ")
    failure = tab.locator(".failure")
    assert failure.locator("h2").inner_text() == "test_release.py::test_fails"
    first = failure.locator(".first").inner_text()
    assert first.startswith("update sparsity 9")
    assert first.endswith("% is below the required 99.90%")
    assert not failure.locator("pre").is_visible()
    failure.locator("summary").press("Enter")
    assert failure.locator("pre").inner_text().startswith(first)


def test_a_real_run_shows_tensors_spectra_and_charts(visit, real_page):
    tab = visit(real_page)
    draw_all(tab)

    assert status(tab) == "1–21 of 21 tensors"
    assert tab.locator("[data-chart=density] .heatmaplayer image").count() == 1
    assert tab.locator("[data-chart=change] .points path").count() == 21
    assert tab.locator("[data-chart=spectrum] .points path").count() > 0
    assert "torch" in tab.locator("#environment").inner_text()


def test_every_section_is_drawn(visit, rich_run):
    tab = visit(rich_run)
    draw_all(tab)

    assert tab.locator("h2").all_text_contents() == [
        *("test_release.py::test_fails", "Tests", "base -> tuned"),
        *("Overlap", "Spectra", "Trajectories", "Environment"),
    ]
    assert tab.locator("nav a").count() == 6
    assert names(tab, "[data-table=overlaps]") == ["dpo", "grpo", "dpo", "sft", "grpo", "sft"]
    assert tab.locator("[data-chart=trajectory] .lines path").count() == 2
    assert tab.locator("tr.apart").all_text_contents() != []


def test_the_matrix_of_overlaps_shows_the_measure_that_is_chosen(visit, rich_run):
    tab = visit(rich_run)
    draw_all(tab)
    written = tab.locator("[data-chart=overlap] .annotation-text")

    assert set(written.all_text_contents()) == {"1.25"}
    tab.locator("[data-measure]").select_option("one-sided")
    assert sorted(written.all_text_contents()) == [
        *("20.00%", "20.00%", "30.00%", "60.00%", "60.00%", "60.00%")
    ]


def test_nothing_but_a_pair_and_not_even_that(visit, rich_run):
    measured = visit({**rich_run, "tests": [], "counts": {}, "passed": False})
    empty = visit({**rich_run, "tests": [], "counts": {}, "passed": False, "pairs": []})

    assert measured.locator("h1").inner_text() == "Measured"
    assert measured.locator(".counts").inner_text() == "1 pair; no test judged it"
    assert measured.locator("#tests, #overlaps, .failures").count() == 0
    assert empty.locator("section").count() == 1


def test_20_000_rows_are_sorted_and_few_of_them_are_in_the_page(visit, big_run):
    tab = visit(big_run)
    head = tab.locator("[data-table=pairs] th", has_text="density")
    densities = sorted(row[6] / row[5] for row in big_run["pairs"][0]["tensors"]["rows"])

    assert tab.locator(ROWS).count() == 50
    assert status(tab) == "1–50 of 20,000 tensors"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    shown = tab.locator(f"{ROWS}:first-child td.share").first.inner_text()
    assert shown == f"{densities[-1]:.2%}"
    head.locator("button").press("Enter")  # the same from the keyboard
    assert head.get_attribute("aria-sort") == "ascending"
    assert tab.locator(f"{ROWS}:first-child td.share").first.inner_text() == "0.00%"
    assert tab.locator("[aria-sort]").count() == 1
    assert tab.locator(ROWS).count() == 50


def test_tensors_are_searched_and_turned_over(visit, big_run):
    tab = visit(big_run)
    rows = big_run["pairs"][0]["tensors"]["rows"]
    wanted = [row[0] for row in rows if "layers.7." in row[0] and "up_proj" in row[0]]

    tab.get_by_role("searchbox").fill("UP_PROJ layers.7.")
    assert status(tab) == f"1–50 of {len(wanted)} tensors (of 20,000)"
    assert names(tab) == wanted[:50]
    tab.get_by_role("button", name="Next").click()
    assert names(tab) == wanted[50:100]
    tab.get_by_role("searchbox").fill("nothing of the kind")
    assert status(tab) == "No tensor fits (of 20,000)"
    assert names(tab) == []


def test_the_heatmap_tells_its_counts_and_leads_to_its_tensors(visit, big_run):
    tab = visit(big_run)
    rows = [
        row
        for row in big_run["pairs"][0]["tensors"]["rows"]
        if row[1] == "up_proj" and row[2] == 31
    ]
    moved, entries = sum(row[6] for row in rows), sum(row[5] for row in rows)
    kinds = tab.locator("[data-chart=density]").evaluate(
        "(root) => new Promise((done) => setTimeout(() => done(root.data[0].y ?? null), 0))"
    )
    assert kinds is None  # rows are numbered: embed, gate, up, down, norm
    x, y = cell(tab, 31, 2)

    tab.mouse.move(x, y)
    hover = tab.locator("[data-chart=density] .hoverlayer .hovertext")
    hover.wait_for()
    assert hover.text_content() == (
        f"up_proj, layer 31density {moved / entries:.2%}"
        f"{moved:,} of {entries:,} entries{len(rows)} tensors"
    )
    tab.mouse.click(x, y)
    tab.locator("[data-table=pairs] output", has_text="(of 20,000)").wait_for()
    assert status(tab) == f"1–50 of {len(rows)} tensors (of 20,000)"
    assert names(tab) == [row[0] for row in rows][:50]
    assert tab.get_by_label("Kind", exact=True).input_value() == "up_proj"
    assert tab.get_by_label("Layer", exact=True).input_value() == "31"


def test_the_heatmap_can_be_zoomed(visit, rich_run):
    tab = visit(rich_run)
    (x0, y0), (x1, y1) = cell(tab, 0, 0), cell(tab, 2, 2)

    tab.mouse.move(x0, y0)
    tab.mouse.down()
    tab.mouse.move(x1, y1, steps=5)
    tab.mouse.up()
    low, high = tab.locator("[data-chart=density]").evaluate("(root) => root.layout.xaxis.range")
    assert low == pytest.approx(0, abs=0.1)
    assert high == pytest.approx(2, abs=0.1)


def test_colours_follow_the_scheme_also_while_the_page_is_open(visit, rich_run):
    tab = visit(rich_run, color_scheme="dark")
    draw_all(tab)
    ink = "getComputedStyle(document.querySelector('.chart .xtitle')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"

    dark = tab.evaluate(ground), tab.evaluate(ink)
    tab.emulate_media(color_scheme="light")
    assert dark == ("rgb(17, 21, 26)", "rgb(228, 233, 239)")
    assert (tab.evaluate(ground), tab.evaluate(ink)) == ("rgb(255, 255, 255)", "rgb(27, 31, 36)")


@pytest.mark.parametrize("run", ["rich_run", "big_run", "hostile_run"])
def test_a_phone_is_wide_enough(visit, request, run):
    tab = visit(request.getfixturevalue(run), viewport={"width": 360, "height": 740})
    draw_all(tab)

    assert not scrolls_sideways(tab)


def test_print_is_light_with_whole_tables_up_to_a_cap(visit, big_run, rich_run):
    big = visit(big_run, color_scheme="dark")
    rich = visit(rich_run, viewport={"width": 700, "height": 900})
    for tab in (big, rich):
        tab.emulate_media(media="print")
    big.locator(ROWS).nth(499).wait_for()
    rich.locator("details.message[open]").wait_for()

    assert big.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert big.locator(ROWS).count() == 500
    assert status(big) == "1–500 of 20,000 tensors"
    assert rich.locator(".chart .main-svg").count() >= rich.locator(".chart").count()
    assert rich.locator("details.message pre").is_visible()
    assert not scrolls_sideways(rich)
    big.emulate_media(media="screen")
    big.locator(ROWS).nth(50).wait_for(state="detached")


def test_hostile_names_are_text(visit, hostile_run, hostile_names):
    tab = visit(hostile_run)
    draw_all(tab)

    shown = []
    for _ in range(4):
        shown += names(tab)
        tab.locator("[data-table=pairs]").get_by_role("button", name="Next").click(force=True)
    assert shown == [safe(name) for name in hostile_names]
    assert tab.locator(".failure h2").all_text_contents() == [safe(name) for name in hostile_names]
    x, y = cell(tab, 3, 4)
    tab.mouse.move(x, y)
    tab.locator("[data-chart=density] .hovertext").wait_for()
    assert tab.locator(".chart a[*|href], .chart script").count() == 0
    tab.mouse.click(x, y)
    assert status(tab).endswith("(of 200)")


def test_labels_of_charts_are_not_markup(visit, rich_run):
    kinds = ["<b>bold</b>", "<a href='//x'>k</a>", "&lt;i&gt;"]
    pair = rich_run["pairs"][0]
    rows = [[row[0], kinds[at % 3], *row[2:]] for at, row in enumerate(pair["tensors"]["rows"])]
    tensors = {**pair["tensors"], "rows": rows}
    tab = visit({**rich_run, "pairs": [{**pair, "tensors": tensors}]})
    draw_all(tab)

    assert tab.locator("[data-chart=density] .ytick text").all_text_contents() == kinds
    assert tab.locator("[data-chart=change] .legendtext").all_text_contents() == kinds
    x, y = cell(tab, 3, 1)
    tab.mouse.move(x, y)
    hover = tab.locator("[data-chart=density] .hovertext")
    hover.wait_for()
    assert hover.text_content().startswith(f"{kinds[1]}, layer 3density ")
    assert tab.locator(".chart a").count() == 0
