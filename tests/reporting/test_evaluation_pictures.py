"""Reports of evaluations as pictures: what is in them, files that are none, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.command_line import plot
from spikingbrain_train.reporting.plots.evaluation_picture import _figure
from spikingbrain_train.reporting.plots.evaluation_report import Report

POSITIONS = {"kl_divergence": [0.1, 0.2], "agreement": [0.9, 0.5], "forced_agreement": [0.9, 0.8]}


def report(share: float = 0.5) -> dict[str, Any]:
    """With a probe at two lengths and depths, one without depths, and a teacher."""
    cells = {"accuracy": share, "by_depth": {"0": {"accuracy": 0.25}, "0.5": {"accuracy": 0.75}}}
    return {
        "model": "a model",
        "probes": {
            "results": {
                "passkey": {"1024": cells, "1500": cells},
                "variable_tracking": {"1024": {"accuracy": 0.2, "by_depth": {}}},
            }
        },
        "against_teacher": {"by_position": {**POSITIONS, "still_identical": [0.9, 0.4]}},
    }


def test_tables_and_curves_show_what_was_found() -> None:
    passkey, tracking, agreement, kl = _figure([Report.of(report(), "a model")]).axes
    assert [text.get_text() for text in passkey.texts] == ["25", "75", "50", "25", "75", "50"]
    assert [label.get_text() for label in passkey.get_xticklabels()] == ["0%", "50%", "all"]
    assert [label.get_text() for label in passkey.get_yticklabels()] == ["1k", "1500"]
    assert [text.get_text() for text in tracking.texts] == ["20"]
    assert [list(line.get_ydata()) for line in agreement.get_lines()] == [[90, 80], [90, 50], [90, 40]]
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in agreement.get_lines()}
    assert len(looks) == 3
    assert list(kl.get_lines()[0].get_ydata()) == [0.1, 0.2]


def test_reports_of_two_models_stand_side_by_side_under_their_numbers() -> None:
    axes = _figure([Report.of(report(), "one"), Report.of(report(0.9), "other")]).axes
    titles = [panel.get_title(loc="left") for panel in axes]
    assert titles[:4] == ["1: passkey", "2: passkey", "1: variable tracking", "2: variable tracking"]
    assert len(axes[-1].get_lines()) == 2 and len(axes[-2].get_lines()) == 6


def test_the_command_draws_files_of_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.json").write_text(json.dumps(report()))
    files = [str(tmp_path / "one.json"), str(tmp_path / "other.json")]
    plot([*files, "--names", "a,b", "--output", str(tmp_path / "both.svg")])
    assert (tmp_path / "both.svg").stat().st_size > 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "a: passkey 50 % at 1500, variable_tracking 20 % at 1k, "
        "KL 0.1500 nats and 70 % of tokens as the teacher"
    )
    assert second.startswith("b: ")
    with pytest.raises(SystemExit):
        plot([*files, "--log"])
    assert "--log is for runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no report of an evaluation"),
        ("[1]", "is no report of an evaluation"),
        ('{"probes": {"results": {"passkey": 3}}}', "is no report of an evaluation"),
        ('{"cross_entropy": 3.0}', "holds neither probes nor a comparison with a teacher"),
    ],
)
def test_a_file_that_is_no_report_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"result.json {said}"):
        Report.read(path)
