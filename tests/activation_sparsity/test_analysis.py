"""Fitting a threshold, and what is said of counts, on a model whose losses are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikingbrain_train.activation_sparsity.analysis import Fit, Readings
from spikingbrain_train.activation_sparsity.gate_records import GateRecords, LayerCounts, Part
from spikingbrain_train.activation_sparsity.gated_model import GatedModel
from spikingbrain_train.activation_sparsity.report import Read, SparsityReport

INSIDE = torch.tensor([[0.0, 2.0, 0.0, 0.3], [0.0, 1.0, 0.5, 0.0]])
"""[2 tokens, 4 channels]."""


class WrittenDown(GatedModel):
    """Its loss is a function of the threshold."""

    def __init__(self, loss: Callable[[float], float], threshold: float = 0.0) -> None:
        self.name, self.threshold, self.read = "written down", threshold, []
        self._loss = loss
        self.language_model: Any = SimpleNamespace(score=self._score)

    def _score(self, requests: Any, what: str) -> list[Any]:
        return [SimpleNamespace(log_prob=-self._loss(self.read[-1]), log_probs=(0.0,)) for _ in requests]

    @contextmanager
    def gates(self, threshold: float) -> Iterator[GateRecords]:
        self.read.append(threshold)
        records = GateRecords()
        for layer in (0, 1):
            records.add(Part(layer, "mlp"), INSIDE.masked_fill(threshold > INSIDE, 0) + layer)
        yield records


def fit(loss: Callable[[float], float], budget: float, threshold: float = 0.0) -> tuple[Fit, list[float]]:
    model = WrittenDown(loss, threshold)
    return Readings(model, [[1, 2]]).fit(budget), model.read


@pytest.mark.parametrize("edge", [0.003, 0.0137, 0.4, 7.0])
def test_the_fitted_threshold_is_the_largest_within_the_budget(edge: float) -> None:
    """A loss that rises with the square: budget 0.01 is reached at the edge. Found to 5 %, from below."""
    found, read = fit(lambda t: 3 + 0.01 * (t / edge) ** 2, 0.01)
    assert found.threshold <= edge <= (found.refused or 0) and found.threshold >= 0.94 * edge
    assert len(read) == len(set(read)) <= 25


def test_a_dip_behind_a_rise_is_not_taken() -> None:
    """Of a curve that goes up and down again, the part before the rise."""
    found, _ = fit(lambda t: 3.0 if t < 0.1 or t > 0.5 else 4.0, 0.01)
    assert 0.09 <= found.threshold < 0.1


def test_a_fit_starts_at_the_models_own_threshold_and_may_stay_there() -> None:
    found, read = fit(lambda t: 3.0 + 100 * (t - 0.2), 0.001, threshold=0.2)
    assert found.threshold == pytest.approx(0.2, rel=0.05) and min(read) == 0.2
    endless, _ = fit(lambda t: 3.0, 0.01)
    assert endless.refused is None and endless.threshold > 10


def test_counts_of_a_layer() -> None:
    records = GateRecords()
    records.add(Part(0, "mlp", (0, 1)), INSIDE[:1])
    records.add(Part(0, "mlp", (0, 1)), INSIDE[1:])
    assert records.layers() == {0: LayerCounts(8, 4, 4, never_active=1, always_active=1)}
    # Data-parallel ranks have the same channels, tensor-parallel ones others.
    other = GateRecords()
    other.add(Part(0, "mlp", (0, 1)), torch.ones(2, 4))
    other.add(Part(0, "mlp", (0, 0)), torch.zeros(4, 4))
    assert GateRecords.merged([records, other]).layers() == {0: LayerCounts(32, 12, 8, 4, 1)}


def test_the_report_says_what_was_counted() -> None:
    readings = Readings(WrittenDown(lambda t: 3 + t), [[1, 2]])
    readings.at(0.4)
    found = readings.fit(0.45)
    read = Read("m", "m/", "Hugging Face, X", False, "float32", "text", tokens=2, windows=1, seq_length=2)
    report = SparsityReport(read, readings.own, readings.all, found)
    values = report.as_json()
    assert values["sparsity"] == 4 / 16 and values["active_per_token"] == 6.0
    assert [each["sparsity"] for each in values["layers"]] == [0.5, 0.0]
    assert [(each["layers"], each["from"]) for each in values["histogram"] if each["layers"]] == [
        (1, 0.0),
        (1, 0.5),
    ]
    assert [each["sparsity"] for each in values["thresholds"] if each["threshold"] == 0.4] == [5 / 16]
    text = "\n".join(report.lines())
    assert f"fatrelu_threshold={found.threshold:g}" in text and "--hf m --output m-fatrelu-checkpoint" in text
