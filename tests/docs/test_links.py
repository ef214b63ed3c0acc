"""Links of the pages lead somewhere."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, prose, read

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    wrong = []
    for target in _LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists():
            wrong.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(str(path.resolve().relative_to(ROOT))):
            wrong.append(f"{target}: the page has no such heading")
    assert not wrong


def test_every_page_of_the_docs_is_in_their_index() -> None:
    index = set(_LINK.findall(read("docs/README.md")))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert pages <= index, f"docs/README.md lists no {', '.join(sorted(pages - index))}"


def test_headings_become_anchors_as_on_github() -> None:
    assert "what-works-where" in anchors("README.md")
    assert "adding-a-stage-a-callback-an-evaluator" in anchors("CONTRIBUTING.md")
