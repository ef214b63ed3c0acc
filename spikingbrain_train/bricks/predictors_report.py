"""What is said of predictors of activity: what they find and leave out, layer by layer, and its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.bricks.recorded_activity import Hits
from spikingbrain_train.reporting.tables import facts, table, terminal_width


@dataclass(frozen=True)
class PredictedReading:
    """The held-out text, read with the neurons that are expected to be active alone."""

    recall: float | None
    """That cut-offs were chosen for; None is a probability of one half."""
    cross_entropy: float
    """Nats per token."""
    hits: Mapping[int, Hits]
    """By layer."""

    @property
    def name(self) -> str:
        """For tables."""
        return "p >= 1/2" if self.recall is None else f"{self.recall:g}"

    @property
    def overall(self) -> Hits:
        """Of all layers."""
        whole = Hits()
        for each in self.hits.values():
            whole.add(each)
        return whole


@dataclass(frozen=True)
class PredictorsReport:
    """Everything that was measured.

    Attributes:
        hidden: width of each predictor.
        parameters: of all predictors, and of the feed-forwards that they are for.
        tokens: that were trained on, kept back for cut-offs, and held out to measure on.
        trained_cross_entropy: of the model as it is on the text that predictors learnt from.
        cross_entropy: on the held-out text.
        training: a row of numbers for each feed-forward.
        without: feed-forwards that no token was sent to, which have no predictor.
    """

    model: str
    form: str
    dtype: str
    text: str
    seq_length: int
    hidden: int
    parameters: tuple[int, int]
    tokens: tuple[int, int, int]
    trained_cross_entropy: float
    cross_entropy: float
    training: Sequence[Mapping[str, Any]]
    without: Sequence[str]
    readings: Sequence[PredictedReading]

    def as_json(self) -> dict[str, Any]:
        """Every number."""
        return {
            "model": self.model,
            "form": self.form,
            "dtype": self.dtype,
            "text": self.text,
            "seq_length": self.seq_length,
            "hidden": self.hidden,
            "predictor_parameters": self.parameters[0],
            "feed_forward_parameters": self.parameters[1],
            "tokens": dict(zip(("trained", "kept_back", "held_out"), self.tokens, strict=True)),
            "trained_cross_entropy": self.trained_cross_entropy,
            "cross_entropy": self.cross_entropy,
            "sparsity": self.readings[0].overall.sparsity,
            "feed_forwards": list(self.training),
            "without_predictor": list(self.without),
            "readings": [
                {
                    "recall_asked_for": each.recall,
                    "cross_entropy": each.cross_entropy,
                    "above": each.cross_entropy - self.cross_entropy,
                    **_numbers(each.overall),
                    "layers": [{"layer": layer, **_numbers(hits)} for layer, hits in each.hits.items()],
                }
                for each in self.readings
            ],
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        predictors, feed_forwards = self.parameters
        trained, kept_back, held_out = self.tokens
        said = [
            ("model", f"{self.model} ({self.form}, {self.dtype})"),
            (
                "text",
                f"{self.text}, windows of {self.seq_length} tokens: {trained} learnt from, {kept_back} for "
                f"cut-offs, {held_out} held out, on which everything below is measured",
            ),
            (
                "predictors",
                f"two linears with {self.hidden} between them: {predictors:,} parameters, "
                f"{predictors / feed_forwards:.1%} of the feed-forwards'",
            ),
        ]
        if self.without:
            said.append(("without one", f"{', '.join(self.without)}: no token was sent there"))
        header = ["layer", "zeros"]
        for each in self.readings:
            header += [f"found {each.name}", "left out"]
        rows = [header]
        layers = list(self.readings[0].hits)
        for layer in layers:
            rows.append(_row(str(layer), [each.hits[layer] for each in self.readings]))
        rows.append(_row("all", [each.overall for each in self.readings]))
        lines = [*facts(said, terminal_width()), "", *table(rows, 1)]
        rows = [["neurons computed", "found", "left out", "of these active", "cross entropy", "above"]]
        sparsity = self.readings[0].overall.sparsity
        rows.append(["all", "100.00%", "0.00%", f"{1 - sparsity:.2%}", f"{self.cross_entropy:.4f}", ""])
        for each in self.readings:
            hits = each.overall
            rows.append(
                [
                    f"recall {each.name}" if each.recall else each.name,
                    f"{hits.recall:.2%}",
                    f"{hits.predicted_sparsity:.2%}",
                    f"{hits.precision:.2%}",
                    f"{each.cross_entropy:.4f}",
                    f"{each.cross_entropy - self.cross_entropy:+.4f}",
                ]
            )
        return [*lines, "", *table(rows, 1)]


def _row(name: str, hits: Sequence[Hits]) -> list[str]:
    cells = [name, f"{hits[0].sparsity:.2%}"]
    for each in hits:
        cells += [f"{each.recall:.2%}", f"{each.predicted_sparsity:.2%}"]
    return cells


def _numbers(hits: Hits) -> dict[str, float]:
    return {
        "sparsity": hits.sparsity,
        "predicted_sparsity": hits.predicted_sparsity,
        "recall": hits.recall,
        "precision": hits.precision,
    }
