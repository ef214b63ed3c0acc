"""Multiple choice in the report of an evaluation, as pictures see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A share of right answers, of 1."""

    share: float
    error: float | None
    """Its standard error; None of a single question."""

    @classmethod
    def of(cls, task: Mapping[str, Any], name: str, error: str) -> Measured | None:
        """From a task of a report; None where it has no such score."""
        share, known = task.get(name), task.get(error)
        return None if share is None else cls(float(share), None if known is None else float(known))


@dataclass(frozen=True)
class FourOrders:
    """The same questions under the four cyclic orders of their options; shares are of 1."""

    right_under_all: float
    right_under_some: float
    letters: Mapping[str, float]
    """How often each letter was the answer."""


@dataclass(frozen=True)
class TaskScore:
    """Of a task."""

    name: str
    questions: int
    accuracy: Measured
    acc_norm: Measured | None
    """With likelihoods divided by the length of an option, where the task has it."""
    chance: float
    """Accuracy of guessing."""
    orders: FourOrders | None
    """Where they were asked for."""

    def describe(self) -> str:
        """Some words for a terminal."""
        error = "" if self.accuracy.error is None else f" ± {100 * self.accuracy.error:.1f}"
        return f"{self.name} {100 * self.accuracy.share:.1f}{error} % (guessing {100 * self.chance:.1f} %)"


def task_scores(tasks: Mapping[str, Mapping[str, Any]]) -> Sequence[TaskScore]:
    """From the part ``tasks`` of a report.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it has another form.
    """
    return [_task_score(name, task) for name, task in tasks.items()]


def _task_score(name: str, task: Mapping[str, Any]) -> TaskScore:
    accuracy = Measured.of(task, "accuracy", "stderr")
    if accuracy is None:
        raise KeyError("accuracy")
    found = task.get("permutations")
    orders = None
    if found is not None:
        letters = {str(letter): float(share) for letter, share in found["letters"].items()}
        orders = FourOrders(float(found["right_under_all"]), float(found["right_under_some"]), letters)
    return TaskScore(
        name,
        int(task["questions"]),
        accuracy,
        Measured.of(task, "acc_norm", "acc_norm_stderr"),
        float(task["chance"]),
        orders,
    )
