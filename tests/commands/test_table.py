"""The commands a user can type: the same under every name, listed, and never a traceback for a wrong one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.commands import main as module
from spikingbrain_train.commands.table import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def _entry_points() -> dict[str, str]:
    # tomllib is not in Python 3.10.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("\n[project.scripts]\n")[2].partition("\n[")[0]
    return dict(re.findall(r'^([\w-]+) = "([^"]+)"$', section, re.MULTILINE))


def test_entry_points_are_the_commands_of_the_table() -> None:
    table = {command.program: f"{command.run.__module__}:{command.run.__qualname__}" for command in COMMANDS}
    assert _entry_points() == table


def test_every_file_of_tools_is_a_door_of_one_command() -> None:
    doors = {command.door: command for command in COMMANDS}
    files = ["train.py", *(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))]
    assert sorted(doors) == sorted(files)
    for door, command in doors.items():
        text = (ROOT / door).read_text(encoding="utf-8")
        assert f"import {command.run.__name__}\n" in text and f"    {command.run.__name__}()\n" in text
        assert command.program in text, "the door names the installed command"


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["__main__.py", *words])
    try:
        module.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_all_are_listed_with_a_line_each(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert [line for line in lines if line.split()[:1] == [command.name]] == [
            next(line for line in lines if line.endswith(f"  {command.summary}"))
        ]
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("preproces", "preproces is not a command; did you mean preprocess? There are train, plan, "),
        ("spikingbrain-trian", "did you mean train?"),
        ("frobnicate", "frobnicate is not a command; there are train, plan, "),
        ("--version-of-what", "--version-of-what is not a command"),
    ],
)
def test_an_unknown_command_is_one_sentence(
    word: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, word, "--help") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sentence in said.err


@pytest.mark.parametrize("name", ["preprocess", "spikingbrain-preprocess"])
def test_usage_says_how_the_command_was_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, name, "--nothing") == 2
    assert capsys.readouterr().err.startswith("usage: python -m spikingbrain_train preprocess ")


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["tools/convert_checkpoint.py", "import", "--help"], "usage: convert_checkpoint.py import "),
        (
            ["-m", "spikingbrain_train", "convert", "import", "--help"],
            "usage: python -m spikingbrain_train convert import ",
        ),
    ],
)
def test_door_and_module_run_the_same_command(words: list[str], usage: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(usage) and "spikingbrain-convert import --hf Qwen2.5-7B" in done.stdout
