"""The pages as `make docs` builds them: what a reader of the site finds on every page."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT, fenced, prose, read

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
bs4 = pytest.importorskip("bs4", reason="the extra `docs` is not installed")

pytestmark = pytest.mark.slow
BUILT = sorted(
    {*PAGES, "CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/*.md"))}
)
"""All pages of the site, as named from the root."""


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What the target `docs` of the Makefile runs behind its environment, in another folder."""
    recipe = re.search(r"^docs: .*\n\t@\$\(call program,python\) (.*) \. \S+$", read("Makefile"), re.M)
    assert recipe is not None
    command = [sys.executable, *shlex.split(recipe[1]), ".", str(site)]
    environment = {**os.environ, "NO_COLOR": "1"}  # its messages are read here
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[str, bs4.BeautifulSoup]:
    """Its pages by the file that each is made of."""
    return {
        page: bs4.BeautifulSoup((site / page).with_suffix(".html").read_text(encoding="utf-8"), "html.parser")
        for page in BUILT
    }


def text_of(page: bs4.Tag) -> str:
    """Words of an element, without the sign behind headings that links to them."""
    return page.get_text().replace("¶", "").strip()


def test_every_page_has_its_heading_as_its_title(parsed) -> None:
    for page, html in parsed.items():
        heading = re.search(r"^# +(.+?)\s*$", prose(page), re.M)
        assert heading is not None, page
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading[1])
        assert text_of(html.h1) == plain, page
        title = "spikingbrain-train" if page == "README.md" else f"{plain} - spikingbrain-train"
        assert html.title.get_text() == title, page


def test_navigation_has_the_headings_of_the_index_and_every_page(parsed, site: Path) -> None:
    navigation = parsed["README.md"].select_one(".sidebar-tree")
    captions = [text_of(caption) for caption in navigation.select(".caption")]
    headings = re.findall(r"^## +(.+)$", read("docs/README.md"), re.M)
    assert captions == ["All pages", *headings, "Measured", "The code"]
    linked = {link["href"].removesuffix(".html") + ".md" for link in navigation.select("a[href]")}
    assert set(BUILT) - linked == {"README.md"}
    assert "url=README.html" in (site / "index.html").read_text()


def test_links_and_pictures_lead_to_what_was_built(parsed, site: Path) -> None:
    anchors = {
        page.removesuffix(".md") + ".html": {tag["id"] for tag in html.select("[id]")}
        for page, html in parsed.items()
    }
    wrong, pictures, links = [], 0, 0
    for page, html in parsed.items():
        here = (site / page).with_suffix(".html")
        article = html.select_one("article")
        for tag, attribute in [*((link, "href") for link in article.select("a[href]"))] + [
            (image, "src") for image in article.select("img")
        ]:
            target = urlsplit(tag[attribute])
            if target.scheme:
                continue
            pictures, links = pictures + (attribute == "src"), links + (attribute == "href")
            file = (here.parent / unquote(target.path)).resolve() if target.path else here
            name = str(file.relative_to(site.resolve())) if file.is_relative_to(site.resolve()) else ""
            known = file.is_file() and (not target.fragment or target.fragment in anchors.get(name, ()))
            if not known:
                wrong.append(f"{page}: {tag[attribute]}")
    assert not wrong
    assert links > 500 and pictures >= len(list((ROOT / "docs/pictures").glob("*.png")))


def test_pictures_say_what_they_show(parsed) -> None:
    images = [image for html in parsed.values() for image in html.select("article img")]
    assert all(len(image["alt"].split()) > 3 for image in images)


@pytest.mark.parametrize("language", ["bash", "python", "yaml"])
def test_code_is_highlighted(parsed, language: str) -> None:
    """Each block of a language is one, with its lines, of which some word has a color."""
    found = 0
    for page, html in parsed.items():
        blocks = html.select(f"article .highlight-{language} pre")
        written = [block for _, block in fenced(page, language)]
        assert [block.get_text().strip("\n") for block in blocks] == [b.strip("\n") for b in written], page
        assert all(block.select("span[class]") for block in blocks), page
        found += len(blocks)
    assert found


def test_tables_are_tables_of_all_their_rows(parsed) -> None:
    for page, html in parsed.items():
        rows = re.findall(r"^ *\|.*\|\s*$", prose(page), re.M)
        rules = re.findall(r"^ *\|[-:| ]+\|\s*$", prose(page), re.M)
        made = html.select("article table tr")
        assert len(made) == len(rows) - len(rules), page
        assert not [p for p in html.select("article p") if p.get_text().startswith("|")], page


def test_the_drawing_of_rooms_is_one(parsed) -> None:
    (drawing,) = parsed["ARCHITECTURE.md"].select("article .mermaid")
    assert drawing.get_text().strip().startswith("flowchart TD")


def test_every_setting_has_its_row(parsed) -> None:
    named = {code.get_text() for code in parsed["docs/settings.md"].select("article td code")}
    assert set(re.findall(r"^\| `([\w.]+)` \|", read("docs/settings.md"), re.M)) <= named


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "docs").mkdir(parents=True)
    (checkout / "benchmarks").mkdir()
    shutil.copytree(ROOT / "docs/site", checkout / "docs/site", ignore=shutil.ignore_patterns("__pycache__"))
    for page in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "benchmarks/README", "docs/one"):
        (checkout / f"{page}.md").write_text(f"# {page}\n")
    table = "| page | for |\n|---|---|\n| [one](one.md) | all |\n"
    (checkout / "docs/README.md").write_text(f"# Pages\n\n## Guides\n\n{table}")
    (checkout / "README.md").write_text("# Here\n\n[a heading](docs/README.md#guides)\n")
    sound = build(checkout, tmp_path / "sound")
    assert sound.returncode == 0, sound.stderr
    links = "[page](docs/no_page.md) [heading](docs/README.md#no-heading) ![](docs/no_picture.png)"
    (checkout / "README.md").write_text(f"# Here\n\n{links}\n")
    broken = build(checkout, tmp_path / "broken")
    assert broken.returncode != 0
    assert all(name in broken.stderr for name in ("no_page.md", "no-heading", "no_picture.png")), (
        broken.stderr
    )


def test_the_index_of_measurements_lists_all() -> None:
    listed = re.findall(r"^\| \[(\S+\.md)\]\(\1\)", read("benchmarks/README.md"), re.M)
    assert sorted(listed) == sorted(
        path.name for path in ROOT.glob("benchmarks/*.md") if path.name != "README.md"
    )
