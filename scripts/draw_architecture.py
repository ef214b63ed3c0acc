"""The picture of rooms and arrows in ARCHITECTURE.md, drawn from the imports: `make architecture`.

With --check it writes nothing and says whether the page is out of date. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.rooms import FLOORS, PACKAGE, ROOT, arrows  # noqa: E402  (found from the checkout's root)

PAGE = ROOT / "ARCHITECTURE.md"
BEGIN = "<!-- The picture and the table are written by `make architecture`. -->"
END = "<!-- Here ends what `make architecture` writes. -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        print(f"{PAGE.name} needs one line {BEGIN!r} and, below it, one line {END!r}", file=sys.stderr)
        return 1
    drawn = redrawn(page)
    if check:
        if drawn != page:
            print(
                f"{PAGE.name} does not show today's rooms and imports: run `make architecture`",
                file=sys.stderr,
            )
        return int(drawn != page)
    temporary = PAGE.with_name(f"{PAGE.name}.tmp")
    temporary.write_text(drawn, encoding="utf-8")
    os.replace(temporary, PAGE)
    return 0


def redrawn(page: str) -> str:
    """The page with today's picture and table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    used = arrows()
    return f"{before}{BEGIN}\n\n{picture(used)}\n\n{table(used)}\n\n{END}{after}"


def picture(used: Mapping[str, set[str]]) -> str:
    """A Mermaid flowchart. Arrows that follow from others are left out."""
    shown = without_detours(used)
    lines = ["```mermaid", "flowchart TD"]
    for room in _from_the_top(used):
        lines.append(f"    {room}")
        lines += [f"    {room} --> {other}" for other in _from_the_top(shown[room])]
    return "\n".join([*lines, "```"])


def table(used: Mapping[str, set[str]]) -> str:
    """Every room: the first sentence of its docstring, and the rooms that it imports."""
    lines = ["| room | what it holds | imports |", "|---|---|---|"]
    for room in _from_the_top(used):
        names = ", ".join(_from_the_top(used[room])) or "nothing of ours"
        lines.append(f"| `{room}/` | {_first_sentence(room)} | {names} |")
    return "\n".join(lines)


def without_detours(used: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows between two rooms that no longer way joins; rooms must form no circle."""

    def below(room: str) -> set[str]:
        return used[room].union(*(below(other) for other in used[room]))

    return {room: used[room].difference(*(below(other) for other in used[room])) for room in used}


def _from_the_top(rooms: Mapping[str, set[str]] | set[str]) -> list[str]:
    return sorted(rooms, key=lambda room: (-FLOORS[room], room))


def _first_sentence(room: str) -> str:
    docstring = ast.get_docstring(
        ast.parse((ROOT / PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    )
    if not docstring:
        raise SystemExit(
            f"{PACKAGE}/{room}/__init__.py needs a docstring whose first sentence says what it holds"
        )
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
