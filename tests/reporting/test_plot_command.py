"""The command that draws: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.reporting.command_line import plot
from tests.reporting.recordings import write_run

REPOSITORY = Path(__file__).resolve().parents[2]


def test_it_prints_where_the_picture_is_and_a_line_for_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "other")]
    picture = tmp_path / "loss.svg"
    plot([*map(str, runs), "--compare", "--names", "first, second", "--x", "hours", "--output", str(picture)])
    path, _header, first, second = capsys.readouterr().out.splitlines()
    assert path == str(picture) and picture.exists()
    assert first.startswith("first ") and second.startswith("second ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["nowhere"],
        ["run", "--output", "loss.jpeg"],
        ["run", "--panels", "nothing"],
        ["run", "--metric", "train/los"],
        ["run", "--smooth", "0"],
        ["run", "--dense-cross-entropy", "much"],
        ["run", "--names", "a,b"],
        ["run", "other"],
    ],
    ids=" ".join,
)
def test_help_and_refusals_import_neither_torch_nor_matplotlib(tmp_path: Path, arguments: list[str]) -> None:
    write_run(tmp_path / "run"), write_run(tmp_path / "other")
    program = (
        "import sys\n"
        "from spikingbrain_train.reporting.command_line import plot\n"
        "try:\n    plot(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    if arguments == ["--help"]:
        assert result.returncode == 0 and "spikingbrain-plot --compare" in result.stdout
        return
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["."], "metrics.jsonl does not exist, but there is one in one, other; name the output_dir of a run"),
        (["one/tensorboard"], "one/tensorboard/metrics.jsonl does not exist, but there is one in one; name"),
        (["one/metrics.jsonl"], "one/metrics.jsonl is a file; name the output_dir of the run, a folder"),
        (["damaged/run"], "damaged/run/metrics.jsonl is not text, so no run wrote it"),
        (["damaged/folder"], "damaged/folder/metrics.jsonl cannot be read (Is a directory); name"),
        (["one", "--panels", ""], "--panels is empty; name some of loss, "),
        (["one", "--panels", " , "], "--panels is empty; name some of loss, "),
        (["one", "--metric", ""], "--metric is empty; name one, e.g. train/grad_norm, or leave it out"),
    ],
)
def test_what_holds_no_run_and_what_names_nothing_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    write_run(tmp_path / "one"), write_run(tmp_path / "other")
    (tmp_path / "one" / "tensorboard").mkdir()
    (tmp_path / "damaged" / "run").mkdir(parents=True)
    (tmp_path / "damaged" / "run" / "metrics.jsonl").write_bytes(b"\x8c\xff\n")
    (tmp_path / "damaged" / "folder" / "metrics.jsonl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        plot(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("\n") == 1


def test_the_door_in_tools_opens(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "plot_metrics.py"), "nowhere"]
    env = {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 2 and "nowhere/metrics.jsonl does not exist" in result.stderr
