"""What probes gave: how many answers were found at each length and depth. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spikingbrain_train.evaluation.probes.plan import ProbePlan, length_name
from spikingbrain_train.evaluation.probes.sample import Probe
from spikingbrain_train.reporting.tables import table


@dataclass
class Cell:
    """Answers of one probe at one length, and at one depth or all of them."""

    answers: int = 0
    """That were asked for."""
    found: int = 0
    """All of whose tokens were the likeliest."""
    tokens: int = 0
    """Of all answers."""
    nats: float = 0.0
    """Minus the log probability of all answers."""
    written: int | None = None
    """That generated text contained; None where none was generated."""

    @property
    def accuracy(self) -> float:
        """Share of answers found: by likelihood where that was asked for, else in generated text."""
        count = self.found if self.tokens else self.written or 0
        return count / self.answers if self.answers else 0.0

    def add(self, other: Cell) -> None:
        """Count the answers of ``other``, too."""
        self.answers += other.answers
        self.found += other.found
        self.tokens += other.tokens
        self.nats += other.nats
        if other.written is not None:
            self.written = (self.written or 0) + other.written

    def as_json(self) -> dict[str, Any]:
        """Numbers of a file."""
        numbers: dict[str, Any] = {"accuracy": self.accuracy, "answers": self.answers}
        if self.tokens:
            numbers["nats_per_token"] = self.nats / self.tokens
        if self.written is not None:
            numbers["generated_accuracy"] = self.written / self.answers
        return numbers


@dataclass
class LengthResult:
    """A probe at one length."""

    total: Cell = field(default_factory=Cell)
    by_depth: dict[float, Cell] = field(default_factory=dict)
    """Empty where answers lie at no depth of their own."""

    def count(self, cell: Cell, depth: float | None) -> None:
        """Count an answer at its depth, and among all."""
        self.total.add(cell)
        if depth is not None:
            self.by_depth.setdefault(depth, Cell()).add(cell)


@dataclass
class ProbeResults:
    """What was measured with one model."""

    plan: ProbePlan
    declared_length: int
    """Of the model, in tokens."""
    found: dict[str, dict[int, LengthResult]] = field(default_factory=dict)
    """Name of a probe -> length -> what was found."""
    text: dict[str, str] | None = None
    """Name and digest of the text in which needles were hidden; None where none was read."""

    def as_json(self) -> dict[str, Any]:
        """The part ``probes`` of a report."""
        return {
            "seed": self.plan.seed,
            "samples": self.plan.samples,
            "scoring": self.plan.scoring.value,
            "declared_length": self.declared_length,
            "text": self.text,
            "results": {
                name: {
                    str(length): {
                        **result.total.as_json(),
                        "by_depth": {
                            f"{depth:g}": cell.as_json() for depth, cell in sorted(result.by_depth.items())
                        },
                    }
                    for length, result in lengths.items()
                }
                for name, lengths in self.found.items()
            },
        }

    def metrics(self) -> dict[str, float]:
        """``probes/<probe>/<length>`` -> share of answers found."""
        return {
            f"probes/{name}/{length_name(length)}": result.total.accuracy
            for name, lengths in self.found.items()
            for length, result in lengths.items()
        }

    def describe(self) -> str:
        """A table for each probe: lengths by depths, in percent."""
        return "\n\n".join("\n".join(self._table(probe)) for probe in self.plan.probes)

    def _table(self, probe: Probe) -> Sequence[str]:
        lengths = self.found[probe.name]
        depths = sorted({depth for result in lengths.values() for depth in result.by_depth})
        scoring = self.plan.scoring
        scored = any(result.total.tokens for result in lengths.values())
        generated = scoring.generates and probe.is_written
        head = ["length", *(f"{100 * depth:g} %" for depth in depths), "all", "answers"]
        if scored:
            head.append("nats/token")
        if scored and generated:
            head.append("generated")
        rows = [head]
        for length, result in lengths.items():
            total = result.total
            beyond = "*" if length > self.declared_length else ""
            row = [
                f"{length_name(length)}{beyond}",
                *(_percent(result.by_depth[depth].accuracy) for depth in depths),
                _percent(total.accuracy),
                str(total.answers),
            ]
            if scored:
                row.append(f"{total.nats / total.tokens:.3f}")
            if scored and generated:
                row.append(_percent((total.written or 0) / total.answers))
            rows.append(row)
        how = "that greedy decoding gives" if scored else "in generated text"
        lines = [f"{probe.title}: % of answers {how}, by depth", *table(rows, left=1)]
        if any(length > self.declared_length for length in lengths):
            lines.append(f"* beyond the {self.declared_length:,} tokens that the model declares")
        return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
