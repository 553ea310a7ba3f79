"""A run as one HTML page that holds all it shows: nothing is fetched, nothing but it runs.

The verdict, the tests and the facts of each pair are in the page's markup, readable without
scripts. Tables of tensors and charts are drawn by `page.js` from one block of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError
from pytest_subnet.reports import page_data, page_words
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_subnet.reports.run import Run

_WRAPPER = re.compile(
    r"\(\s*function\(root, factory\) \{.{,300}\(\) => \{\n"
    r"(?P<body>\"use strict\";var Plotly=.*)return Plotly;\s*\}\)\);?\s*\Z",
    re.DOTALL,
)


def page(run: Run) -> str:
    """The page that shows `run`: markup, style, scripts and data in one string.

    Args:
        run: what happened; everything in it may be hostile, and is shown as text.

    Returns:
        HTML in which nothing is fetched and no script runs but its own.

    Raises:
        SubnetError: Jinja2 or Plotly is missing.
    """
    try:
        import jinja2
        from markupsafe import Markup  # part of Jinja2
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise SubnetError(
            "a report in HTML needs Jinja2 and Plotly, which cannot be imported "
            f"({safe(str(error))}); install them with pip install 'pytest-subnet[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": _beside("page.html.jinja")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    sections = page_data.sections(run)
    drawn = {name: [each["data"] for each in section] for name, section in sections.items()}
    data = _embedded({"pairs": page_data.pairs(run), **drawn})
    # Browsers hash a script with the line ends of HTML.
    plotly = _unwrapped(get_plotlyjs().replace("\r\n", "\n"))
    style, script = _beside("page.css"), _beside("page.js")
    # Of the content: nothing in the page can hold it, and the same run gives the same page.
    nonce = _digest(data + style + script)
    tests = [page_words.entry_of(each) for each in run["tests"]]
    return environment.get_template("page").render(
        policy=_policy(nonce, style, [plotly, script]),
        nonce=nonce,
        style=Markup(style),
        plotly=Markup(plotly),
        script=Markup(script),
        data=Markup(data),
        verdict=page_words.verdict_of(run),
        failures=[each for each in tests if each["failed"]],
        tests=[each for each in tests if each["gate"] or each["failed"]],
        others=[each for each in tests if not (each["gate"] or each["failed"])],
        pairs=[page_words.pair_of(each) for each in run["pairs"]],
        **sections,
        environment=[(safe(key), safe(value)) for key, value in run["environment"].items()],
    )


def _unwrapped(bundle: str) -> str:
    """Plotly's bundle without what makes it a module for loaders other than a page.

    Of a function that holds all of it V8 finds the end first and parses it anew when it is called:
    0.2 s of each opening of the page on two slow cores. A bundle of another form stays as it is.
    """
    wrapper = _WRAPPER.search(bundle)
    return bundle if wrapper is None else bundle[: wrapper.start()] + wrapper["body"]


def _policy(nonce: str, style: str, scripts: Iterable[str]) -> str:
    """What the page may do: run its own scripts, use its own style; fetch nothing."""
    allowed = " ".join(f"'sha256-{_digest(each)}'" for each in scripts)
    # Plotly adds style sheets, which page.js gives the nonce, and dresses its SVG by attributes.
    return (
        f"default-src 'none'; img-src data:; script-src {allowed}; "
        f"style-src-elem 'sha256-{_digest(style)}' 'nonce-{nonce}'; "
        "style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def _embedded(data: object) -> str:
    """JSON that no script element ends in, whatever the strings hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _breakable(name: str) -> str:
    """A name in whose markup a line may break after a slash, a dot, a colon or an underscore."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[/.:_])(?=\w)", name))


def _beside(name: str) -> str:
    return importlib.resources.files("pytest_subnet.reports").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
