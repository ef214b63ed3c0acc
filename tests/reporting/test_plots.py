"""Loss curves as a picture."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.metrics import METRICS_FILE
from spikingbrain_train.reporting.plots import loss_curves as plots
from spikingbrain_train.reporting.plots.loss_curves import plot_loss_curves


def write_run(folder: Path, points: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / METRICS_FILE).write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


POINTS: list[dict[str, object]] = [
    {"iteration": 0, "valid/cross_entropy": 9.9},
    {"iteration": 10, "train/loss": 5.0, "train/tokens": 1000.0},
    {"iteration": 20, "train/loss": None, "train/tokens": 2000.0},
    {"iteration": 30, "train/loss": 4.0, "train/tokens": 3000.0},
    {"iteration": 30, "valid/cross_entropy": 4.2},
]


def drawn(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> list[Axes]:
    """The panels that are drawn instead of a file."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, destination: figures.append(figure))
    plot_loss_curves(*arguments, **settings)
    return figures[0].get_axes()


def test_stages_follow_each_other_over_all_tokens_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / name, POINTS) for name in ("align", "cpt")]
    held_out, align, cpt = drawn(monkeypatch, runs, tmp_path / "loss.png", dense_cross_entropy=2.25)
    first, second, dense = held_out.get_lines()
    assert list(first.get_xdata()) == [0.0, 3000.0] and list(first.get_ydata()) == [9.9, 4.2]
    assert list(second.get_xdata()) == [3000.0, 6000.0]
    assert set(dense.get_ydata()) == {2.25}
    assert held_out.get_ylim()[0] < 2.25
    for panel in (align, cpt):
        assert list(panel.get_lines()[0].get_xdata()) == [1000.0, 3000.0]
    assert [panel.get_title("left") for panel in (align, cpt)] == [
        "Training loss, align",
        "Training loss, cpt",
    ]


def test_run_without_evaluation_shows_its_training_loss_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", POINTS[1:4])
    (panel,) = drawn(monkeypatch, [run], tmp_path / "loss.png")
    assert panel.get_title("left") == "Training loss, run"


def test_picture_is_a_png_and_appears_whole(tmp_path: Path) -> None:
    plot_loss_curves([write_run(tmp_path / "run", POINTS)], tmp_path / "deep" / "loss.png")
    width, height = png_size(tmp_path / "deep" / "loss.png")
    assert width > 800 and height > 400
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["loss.png"]


def test_run_without_a_point_is_a_sentence_and_writes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"iteration": 10, "train/loss": None}])
    with pytest.raises(DataError, match="no finite train/loss"):
        plot_loss_curves([run], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_command_line_prints_a_sentence_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "tools/plot_metrics.py", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
