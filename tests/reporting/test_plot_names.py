"""What runs are called: by what tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.names import changes_in_words, names_of
from spikingbrain_train.reporting.plots.recording import Recording
from spikingbrain_train.reporting.plots.style import count_text, line_style, number_text, shortened
from tests.reporting.recordings import write_run


def recordings(*folders: Path) -> list[Recording]:
    return [Recording.read(folder) for folder in folders]


def configured(folder: Path, **settings: object) -> Path:
    return write_run(folder, settings={"output_dir": str(folder), "logging": {"log_interval": 5}, **settings})


def test_compared_runs_are_called_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    runs = recordings(
        configured(tmp_path / "a", optimizer={"lr": 1e-4, "weight_decay": 0.1}, seed=1),
        configured(tmp_path / "b", optimizer={"lr": 5e-4, "weight_decay": 0.1}, seed=1),
    )
    assert names_of(runs) == ["lr 1e-4", "lr 5e-4"]


def test_settings_of_the_same_last_name_are_written_in_full(tmp_path: Path) -> None:
    runs = recordings(
        configured(tmp_path / "a", gla={"gate": "tied"}, swa={"gate": 1}),
        configured(tmp_path / "b", gla={"gate": "own"}, swa={"gate": 2}),
    )
    assert names_of(runs) == ["gla.gate tied, swa.gate 1", "gla.gate own, swa.gate 2"]


def test_runs_that_differ_in_much_or_do_not_say_go_by_their_folders(tmp_path: Path) -> None:
    many = recordings(
        configured(tmp_path / "a", one=1, two=1, three=1, four=1),
        configured(tmp_path / "b", one=2, two=2, three=2, four=2),
    )
    assert names_of(many) == ["a", "b"]
    silent = recordings(write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run"))
    assert names_of(silent) == ["x/run", "y/run"]


def test_given_names_are_taken_and_must_fit(tmp_path: Path) -> None:
    runs = recordings(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert names_of(runs, ["first", "second"]) == ["first", "second"]
    with pytest.raises(ConfigurationError, match="--names has 1 names for 2 runs"):
        names_of(runs, ["first"])
    with pytest.raises(ConfigurationError, match="tell the runs apart"):
        names_of(runs, ["same", "same"])


def test_changes_are_short() -> None:
    changed = {"optimizer.lr": (1e-3, 1e-4), "data.reset_at_documents": (False, True), "a.b": (None, [1, 2])}
    assert changes_in_words(changed) == [
        "lr 1e-3 → 1e-4",
        "reset_at_documents off → on",
        "b none → [1, 2]",
    ]


def test_numbers_are_short_and_cannot_be_mistaken() -> None:
    counts = {0: "0", 999: "999", 1500: "1.5k", 999_999: "1M", 2.5e9: "2.5B", 1.5e11: "150B", 2e12: "2T"}
    assert {value: count_text(value) for value in counts} == counts
    numbers = {0.0: "0", 2.5: "2.5", 0.25: "0.25", 5e-4: "5e-4", 1e6: "1e6", 123.456: "123.5"}
    assert {value: number_text(value) for value in numbers} == numbers
    assert shortened("a" * 30 + "seed=1", 20).endswith("seed=1") and len(shortened("a" * 90, 20)) == 20


def test_no_two_lines_share_dashes_and_marker_and_neighbours_share_neither() -> None:
    styles = [line_style(number) for number in range(20)]
    assert len({(str(style.dashes), style.marker) for style in styles}) == len(styles)
    for one, other in zip(styles, styles[1:], strict=False):
        assert one.colour != other.colour and one.dashes != other.dashes and one.marker != other.marker
