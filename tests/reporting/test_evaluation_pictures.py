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


def choices(accuracy: float = 0.5, **more: Any) -> dict[str, Any]:
    """Two tasks: one asked in four orders, one with scores of two kinds."""
    shared = {"num_fewshot": 0, "shortened_prompts": 0}
    letters = {"A": 0.7, "B": 0.1, "C": 0.1, "D": 0.1}
    permutations = {
        "accuracy": [0.5, 0.25, 0.5, 0.25],
        **{"right_under_all": 0.125, "right_under_some": 0.5, "consistency": 0.25, "letters": letters},
    }
    mmlu = {"questions": 8, "accuracy": accuracy, "stderr": 0.2, "chance": 0.25, "permutations": permutations}
    norm = {"acc_norm": 0.6, "acc_norm_stderr": 0.05}
    piqa = {"questions": 1838, "accuracy": 0.7, "stderr": 0.01, "chance": 0.5, **norm}
    return {"model": "a model", "tasks": {"mmlu": {**shared, **mmlu}, "piqa": {**shared, **piqa}}, **more}


def drawn_scores(panel: Any) -> dict[str, list[Any]]:
    """Score and both ends of its error bar, of each task and kind."""
    found: dict[str, list[Any]] = {}
    for container in panel.containers:
        points, _, (bars,) = container.lines
        ends = [(segment[0][0], segment[1][0]) for segment in bars.get_segments()]
        found[container.get_label()] = [
            (pytest.approx(x), pytest.approx(low), pytest.approx(high))
            for x, (low, high) in zip(points.get_xdata(), ends, strict=True)
        ]
    return found


def test_scores_stand_with_their_errors_beside_guessing() -> None:
    scores, orders, letters = _figure([Report.of(choices(), "a model")]).axes
    assert drawn_scores(scores) == {
        "accuracy": [(50, 30, 70), (70, 69, 71)],
        "acc_norm": [(60, 55, 65)],
    }
    guessing = [line for line in scores.get_lines() if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in guessing] == [[25, 25], [50, 50]]
    assert "guessing" in [text.get_text() for text in scores.get_legend().get_texts()]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["mmlu\n(8)", "piqa\n(1,838)"]
    widths = [bar.get_width() for bar in orders.patches]
    assert widths == pytest.approx([12.5, 50, 37.5])  # right in all orders, in some, in none
    assert [text.get_text() for text in letters.texts] == ["70", "10", "10", "10"]
    assert [label.get_text() for label in letters.get_yticklabels()] == ["mmlu"]


def test_tasks_without_four_orders_errors_or_a_second_score_are_drawn(tmp_path: Path) -> None:
    bare = {"winogrande": {"questions": 1, "accuracy": 1.0, "chance": 0.5}}
    (panel,) = _figure([Report.of({"tasks": bare}, "a model")]).axes
    assert drawn_scores(panel) == {"accuracy": [(100, 100, 100)]}
    assert Report.of({"tasks": bare}, "m").describe() == "m: winogrande 100.0 % (guessing 50.0 %)"


def test_scores_of_two_models_share_the_rows_of_their_tasks() -> None:
    other = choices(0.75)
    del other["tasks"]["piqa"]
    with_probes = choices(**{key: value for key, value in report().items() if key != "model"})
    panels = _figure([Report.of(with_probes, "one"), Report.of(other, "other")]).axes
    assert drawn_scores(panels[0])["1: accuracy"][0] == (50, 30, 70)
    assert drawn_scores(panels[0])["2: accuracy"] == [(75, 55, 95)]
    looks = {(each.lines[0].get_color(), each.lines[0].get_marker()) for each in panels[0].containers}
    assert len(looks) == 2
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["1: mmlu", "2: mmlu"]
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles[3:5] == ["1: passkey", "1: variable tracking"] and len(titles) == 7


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
        ('{"tasks": [1]}', "is no report of an evaluation"),
        ('{"tasks": {"piqa": {"questions": 3}}}', "is no report of an evaluation"),
        ('{"cross_entropy": 3.0}', "holds neither multiple choice nor probes nor a comparison"),
    ],
)
def test_a_file_that_is_no_report_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"result.json {said}"):
        Report.read(path)
