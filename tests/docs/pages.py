"""The pages that users read, taken apart: links, headings, inline code, commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.name != "CHANGELOG.md"  # names what was
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def read(page: str) -> str:
    """The text of a page, named from the root."""
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """Its text, in whose fenced blocks every line is empty: lines keep their numbers."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), read(page))


def fenced(page: str, language: str) -> list[tuple[int, str]]:
    """Its fenced blocks of a language, with the number of the line before the first of each."""
    text = read(page)
    return [
        (
            text.count("\n", 0, block.start()) + 1,
            re.sub(rf"^{block['indent']}", "", block["body"], flags=re.M),
        )
        for block in _FENCE.finditer(text)
        if block["language"] == language
    ]


def anchors(page: str) -> set[str]:
    """What ``#...`` in a link to it may name, as GitHub makes it of headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@dataclass(frozen=True)
class Command:
    """One command of a fenced bash block."""

    page: str
    line: int
    """Of the page, where it begins."""
    words: tuple[str, ...]
    """As the shell would split it; variables that the page has set before are filled in."""
    variables: tuple[str, ...] = ()
    """Assignments in front of it: NAME=value."""

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(page: str) -> list[Command]:
    """The commands of its bash blocks, in their order. A line that only sets variables is none."""
    found = []
    known: dict[str, str] = {}
    for start, block in fenced(page, "bash"):
        lines = block.splitlines()
        number = 0
        while number < len(lines):
            first, text = number, lines[number]
            while text.endswith("\\"):
                number += 1
                text = f"{text[:-1]} {lines[number].strip()}"
            number += 1
            for part in re.split(r" && ", text):
                filled = re.sub(r"\$\{?([A-Z_]+)\}?", lambda name: known.get(name[1], name[0]), part)
                words = shlex.split(filled, comments=True)
                assigned = []
                while words and _ASSIGNMENT.fullmatch(words[0]):
                    assigned.append(words.pop(0))
                if words:
                    found.append(Command(page, start + first + 1, tuple(words), tuple(assigned)))
                else:
                    known.update(word.split("=", 1) for word in assigned)
    return found
