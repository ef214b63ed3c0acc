"""Which models are measured, in which order, and what a stopped search still knows; costs are made up."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest

from spikingbrain_train.errors import ConfigurationError, NumericalError
from spikingbrain_train.layer_choice.measurements import MEASUREMENTS_FILE, Measurement, Measurements
from spikingbrain_train.layer_choice.search import Choice, rounds_of, search
from spikingbrain_train.reporting.activity import activity

SETTINGS = {"tokens": 64, "mixers": ["a", "b"]}


class MadeUpMeter:
    """Layers cost 0.1 times their number; layers 0 and 1 together 5 more. Stops after ``patience`` models."""

    def __init__(self, patience: int = 1000) -> None:
        self.measured: list[tuple[int, ...]] = []
        self.patience = patience

    def measure_source(self) -> float:
        return 2.0

    def hold(self, base: Collection[int], layer: int) -> None:
        assert all(each < layer or each in base for each in base)

    def measure(self, swapped: Collection[int]) -> Measurement:
        if len(self.measured) == self.patience:
            raise KeyboardInterrupt
        layers = tuple(sorted(swapped))
        self.measured.append(layers)
        cost = sum(0.1 * layer for layer in layers) + (5.0 if {0, 1} <= set(layers) else 0.0)
        return Measurement(layers, cost, 2.0 + cost)


def choose(meter: MadeUpMeter, folder: Path, *, greedy: bool = False) -> Choice:
    show = partial(activity, shown=False)
    return search(meter, Measurements(folder, SETTINGS), range(4), 2, greedy=greedy, show=show)


def test_the_cheapest_swaps_are_chosen_and_the_control_is_measured(tmp_path: Path) -> None:
    meter = MadeUpMeter()
    choice = choose(meter, tmp_path)
    assert choice.order == [0, 1] and choice.chosen.kl_divergence == pytest.approx(5.1)
    assert choice.even.swapped == (0, 2) and choice.kept.kl_divergence == 0.0 and choice.source == 2.0
    assert meter.measured == [(), (0,), (1,), (2,), (3,), (0, 2), (0, 1)]
    assert len(meter.measured) == rounds_of(4, 2, greedy=False)


def test_a_greedy_search_sees_what_swaps_do_to_each_other(tmp_path: Path) -> None:
    meter = MadeUpMeter()
    choice = choose(meter, tmp_path, greedy=True)
    assert choice.order == [0, 2] and choice.chosen.kl_divergence == pytest.approx(0.2)
    assert sorted(choice.singles) == [0, 1, 2, 3]
    # The control and the choice are of the second round, so they are known.
    assert len(meter.measured) == rounds_of(4, 2, greedy=True) - 2


def test_a_stopped_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(MadeUpMeter(patience=3), tmp_path)
    with (tmp_path / MEASUREMENTS_FILE).open("a") as file:
        file.write('{"swapped": [2], "kl_div')  # as a kill leaves it
    meter = MadeUpMeter()
    assert choose(meter, tmp_path) == choose(MadeUpMeter(), tmp_path / "at_once")
    assert meter.measured == [(2,), (3,), (0, 2), (0, 1)]
    again = MadeUpMeter()
    choose(again, tmp_path)
    assert again.measured == []


def test_measurements_of_other_settings_are_refused(tmp_path: Path) -> None:
    choose(MadeUpMeter(), tmp_path)
    with pytest.raises(ConfigurationError, match="was measured with another tokens; name another --output"):
        Measurements(tmp_path, SETTINGS | {"tokens": 128})


@pytest.mark.parametrize("text", ["nothing\n", "{}\n", "[]\n", '{"settings": {}}\n{"swapped": 3}\n'])
def test_a_file_that_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MEASUREMENTS_FILE).write_text(text)
    with pytest.raises(ConfigurationError, match=r"measurements\.jsonl is no record of measurements"):
        Measurements(tmp_path, {})


def test_a_model_without_numbers_is_named(tmp_path: Path) -> None:
    meter = MadeUpMeter()
    meter.measure = lambda swapped: Measurement(tuple(swapped), float("nan"), 2.0)  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match="swapped layers none gives no number"):
        choose(meter, tmp_path)
