"""The page that shows the rooms and their arrows, and the paths that our pages name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scripts import draw_architecture, rooms

ROOT = Path(__file__).parents[2]
ARROWS = {"models": {"ops", "config"}, "ops": {"config"}, "config": set(), "hf": set()}


def test_the_picture_leaves_out_what_follows_and_the_table_does_not() -> None:
    assert draw_architecture.picture(ARROWS).splitlines() == [
        *("```mermaid", "flowchart TD", "    models", "    models --> ops", "    ops", "    ops --> config"),
        *("    config", "    hf", "```"),
    ]
    rows = draw_architecture.table(ARROWS).splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == [
        *("ops, config |", "config |", "nothing of ours |", "nothing of ours |"),
    ]
    assert rows[2].startswith("| `config/` | What a run is")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the page as it would be drawn today."""
    copy = tmp_path / "ARCHITECTURE.md"
    copy.write_text(draw_architecture.redrawn((ROOT / "ARCHITECTURE.md").read_text()))
    monkeypatch.setattr(draw_architecture, "PAGE", copy)
    return copy


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", *arguments])
    return draw_architecture.main()


def test_a_new_arrow_makes_the_page_out_of_date_until_it_is_drawn(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text()
    assert _call(monkeypatch, "--check") == 0 and capsys.readouterr().err == ""
    drawn = {**rooms.arrows(), "reporting": rooms.arrows()["reporting"] | {"hf"}}
    monkeypatch.setattr(draw_architecture, "arrows", lambda: drawn)
    assert _call(monkeypatch, "--check") == 1 and page.read_text() == before
    assert "run `make architecture`" in capsys.readouterr().err
    assert _call(monkeypatch) == 0 and "reporting --> hf" in page.read_text()
    assert _call(monkeypatch, "--check") == 0
    outside = [before.partition(draw_architecture.BEGIN)[0], before.partition(draw_architecture.END)[2]]
    assert page.read_text().startswith(outside[0]) and page.read_text().endswith(outside[1])


def test_a_page_without_its_markers_is_left_alone(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text("# Architecture\n")
    assert _call(monkeypatch) == 1 and page.read_text() == "# Architecture\n"
    assert "ARCHITECTURE.md needs one line" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    """Files and folders, from the root or the package; a bare name lies where its paragraph has been."""
    missing = []
    for paragraph in re.split(r"\n\n|\n(?=[|-]|\d\. )", (ROOT / name).read_text()):
        folders = [ROOT, ROOT / "spikingbrain_train"]
        for path in re.findall(r"`([\w/.-]+(?:\.(?:py|md|sh|sbatch)|/))`", paragraph):
            if found := next((folder / path for folder in folders if (folder / path).exists()), None):
                folders.append(found if found.is_dir() else found.parent)
            elif path not in ("utils.py", "outputs/"):  # there is none, as the page says; runs make it
                missing.append(path)
    assert not missing
