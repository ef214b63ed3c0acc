"""Loss curves as a picture."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.config.errors import DataError
from spikingbrain_train.training.metrics import METRICS_FILE
from spikingbrain_train.training.plots import plot_loss_curves


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
    {"iteration": 10, "train/loss": 5.0},
    {"iteration": 20, "train/loss": None},
    {"iteration": 30, "train/loss": 4.0, "valid/cross_entropy": 4.2},
]


def test_stages_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, POINTS) for name in ("align", "cpt")]
    plot_loss_curves(runs[:1], tmp_path / "one.png")
    plot_loss_curves(runs, tmp_path / "two.png")
    (one_width, one_height), (two_width, two_height) = (
        png_size(tmp_path / "one.png"),
        png_size(tmp_path / "two.png"),
    )
    assert two_width == 2 * one_width and two_height == one_height
    assert not list(tmp_path.glob("*.tmp"))


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
