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
REPORT = "2509.05276"
_NUMBERS = r"(\d[\d.]*(?:(?:-|, | and )\d[\d.]*)*)"


def _cited(text: str, kind: str) -> Iterator[str]:
    """What a text that names the report cites as ``kind``, but for what stands behind another paper's number:
    "(arXiv 2312.06635, section 4)"."""
    flat = re.sub(r"\s+#?\s*", " ", text)  # a citation may be broken over lines of comments
    flat = re.sub(rf"arXiv (?!{re.escape(REPORT)})\d{{4}}\.\d{{5}}[^)]*", "", flat)
    if REPORT in flat:
        for numbers in re.findall(rf"\b{kind} {_NUMBERS}", flat, re.IGNORECASE):
            yield from (number.strip(".") for number in re.split(r"-|, | and ", numbers))


def test_cited_sections_and_equations_exist() -> None:
    wrong = []
    for path in [ROOT / "README.md", *FILES]:
        text = path.read_text()
        wrong += [f"{path}: section {name}" for name in _cited(text, "sections?") if name not in SECTIONS]
        wrong += [f"{path}: eq. {n}" for n in _cited(text, r"eq\.") if not 1 <= int(n) <= LAST_EQUATION]
    assert not wrong


def test_citations_are_found_where_lines_break_and_without_the_number_beside_them() -> None:
    text = "(arXiv 2509.05276,\n# sections 3.4 and 4), (arXiv 2312.06635, section 9), (section 2, eq. 15-18)"
    assert list(_cited(text, "sections?")) == ["3.4", "4", "2"]
    assert list(_cited(text, r"eq\.")) == ["15", "18"]
