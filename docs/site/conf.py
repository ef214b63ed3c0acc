"""The pages as a site, by Sphinx: `make docs` writes it to outputs/docs.

The pages stay as GitHub shows them, in their folders: the source folder of the site is the checkout, and its
navigation is made of docs/README.md, whose headings say what a reader wants to do.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

project = "spikingbrain-train"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
include_patterns = ["*.md", "docs/**.md", "benchmarks/**.md"]
root_doc = "README"

# Anchors as GitHub makes them of all levels of headings; a link to one that is not there is a warning, and an
# error in `make docs`.
myst_heading_anchors = 6
myst_fence_as_directive = ["mermaid"]
nitpicky = True
# Indented blocks are what commands print.
highlight_language = "text"
# Typographic quotes in a command that is copied out of a sentence would break it.
smartquotes = False

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_use_index = False
# The main page is the README; a server looks for index.html.
html_additional_pages = {"index": "to_readme.html"}
templates_path = ["."]

_ROW = re.compile(r"^\| \[[^\]]*\]\(([^)#\s]+\.md)\) \|", re.M)


def navigation() -> dict[str, list[str]]:
    """Headings of docs/README.md -> the pages listed below each, from the root of the checkout."""
    index = ROOT / "docs/README.md"
    _, *parts = re.split(r"^## +", index.read_text(encoding="utf-8"), flags=re.M)
    pages = {}
    for part in parts:
        heading, _, body = part.partition("\n")
        found = [(index.parent / row).resolve().relative_to(ROOT) for row in _ROW.findall(body)]
        pages[heading.strip()] = [str(page) for page in found]
    measured = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks").glob("*.md"))
    for of in pages.values():
        of[:] = [page for page in of if page not in measured]
    return {
        "All pages": ["docs/README.md"],
        **pages,
        "Measured": measured,
        "The code": ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"],
    }


def _add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    if name != root_doc:
        return
    for caption, pages in navigation().items():
        entries = "\n".join(page.removesuffix(".md") for page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("source-read", _add_navigation)
