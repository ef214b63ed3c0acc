"""The report of an evaluation as pictures see it: the file that ``spikingbrain-evaluate --output`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.plots.choice_scores import TaskScore, task_scores

ALL = "all"
"""The column of all depths together."""


@dataclass(frozen=True)
class ProbeTable:
    """Shares of answers that were found."""

    name: str
    lengths: Sequence[str]
    depths: Sequence[str]
    """Percent, and all of them together."""
    shares: Sequence[Sequence[float]]
    """A row for each length."""


@dataclass(frozen=True)
class Report:
    """What can be drawn of one evaluation."""

    name: str
    probes: Sequence[ProbeTable] = ()
    by_position: Mapping[str, Sequence[float]] | None = None
    """Of the comparison with a teacher; None without one."""
    tasks: Sequence[TaskScore] = ()
    """Of multiple choice."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.probes and not self.tasks and self.by_position is None

    def describe(self) -> str:
        """A line for a terminal: tasks, and what was found over all depths at the longest length."""
        parts = [task.describe() for task in self.tasks]
        parts += [
            f"{each.name} {100 * each.shares[-1][-1]:.0f} % at {each.lengths[-1]}" for each in self.probes
        ]
        if self.by_position is not None:
            kl, agreement = self.by_position["kl_divergence"], self.by_position["agreement"]
            same = 100 * sum(agreement) / len(agreement)
            parts.append(f"KL {sum(kl) / len(kl):.4f} nats and {same:.0f} % of tokens as the teacher")
        return f"{self.name}: {', '.join(parts)}"

    @classmethod
    def of(cls, report: Mapping[str, Any], name: str) -> Report:
        """From what the file holds.

        Raises:
            DataError: it has another form.
        """
        try:
            probes = [
                _table(probe, lengths)
                for probe, lengths in report.get("probes", {}).get("results", {}).items()
            ]
            tasks = task_scores(report.get("tasks", {}))
            teacher = report.get("against_teacher")
            by_position = (
                None
                if teacher is None
                else {
                    key: [float(value) for value in values] for key, values in teacher["by_position"].items()
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{name} is no report of an evaluation; name a file that spikingbrain-evaluate --output wrote"
            ) from error
        return cls(name, probes, by_position, tasks)

    @classmethod
    def read(cls, path: Path) -> Report:
        """From a file. Raises DataError where it is none, or holds nothing to draw."""
        try:
            found = cls.of(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is no report of an evaluation; name a file that spikingbrain-evaluate --output wrote"
            ) from error
        if found.is_empty:
            raise DataError(
                f"{path} holds neither multiple choice nor probes nor a comparison with a teacher, which "
                "pictures are made of; evaluate with --tasks, --probes or --teacher"
            )
        return found


def _table(name: str, lengths: Mapping[str, Mapping[str, Any]]) -> ProbeTable:
    depths = sorted({depth for cells in lengths.values() for depth in cells["by_depth"]}, key=float)
    shares = []
    for cells in lengths.values():
        of_depths = [cells["by_depth"].get(depth, {}).get("accuracy", float("nan")) for depth in depths]
        shares.append([float(share) for share in (*of_depths, cells["accuracy"])])
    return ProbeTable(
        name,
        [_tokens(int(length)) for length in lengths],
        [*(f"{100 * float(depth):g}%" for depth in depths), ALL],
        shares,
    )


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
