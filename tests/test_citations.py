"""What is cited of SpikingBrain's report (arXiv 2509.05276) exists there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {"2", "2.2", "3", "3.1", "3.3", "3.4", "4", "4.1", "5.4", "5.5", "6"}
"""Those that this project has looked up; add one when it is cited for the first time."""
LAST_EQUATION = 23
FOLDERS = ("spikingbrain_train", "conf", "docs", "tests", "benchmarks", "tools")
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".md") and path != Path(__file__)
]
_NUMBERS = r"(\d[\d.]*(?:(?:-|, | and )\d[\d.]*)*)"


def _cited(text: str, kind: str) -> Iterator[str]:
    flat = re.sub(r"\s+#?\s*", " ", text)  # a citation may be broken over lines of comments
    for numbers in re.findall(rf"2509\.05276\)?,(?: [a-z]+\.? [\d.-]+ and)? {kind} {_NUMBERS}", flat):
        yield from (number.strip(".") for number in re.split(r"-|, | and ", numbers))


def test_cited_sections_and_equations_exist() -> None:
    wrong = []
    for path in [ROOT / "README.md", *FILES]:
        text = path.read_text()
        wrong += [f"{path}: section {name}" for name in _cited(text, "sections?") if name not in SECTIONS]
        wrong += [f"{path}: eq. {n}" for n in _cited(text, r"eq\.") if not 1 <= int(n) <= LAST_EQUATION]
    assert not wrong


def test_citations_are_found_where_lines_break() -> None:
    text = "# (arXiv 2509.05276,\n# sections 3.4 and 4), and (arXiv 2509.05276, section 2 and eq. 15-18)"
    assert list(_cited(text, "sections?")) == ["3.4", "4", "2"]
    assert list(_cited(text, r"eq\.")) == ["15", "18"]
