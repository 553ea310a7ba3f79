"""Sphinx configuration."""

from __future__ import annotations

project = "pytest-subnet"
author = "The pytest-subnet developers"
copyright = f"2026, {author}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "pytest-subnet"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"


def plain_to_rst(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """Docstrings are written to be read as they are: make reStructuredText of what is not."""
    for number, line in enumerate(lines):
        if line == "Valid usages:":
            lines[number] = "Valid usages::\n"
        elif not line.startswith("    assert_"):
            lines[number] = line.replace("|", "\\|")
    lines[:] = "\n".join(lines).split("\n")


def setup(app) -> None:
    """Run before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)
