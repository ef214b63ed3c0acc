"""What a user of the package would write: a callback and an evaluator in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class CountSteps(Callback):
    """Counts the steps of a run over all of its lives, and the hooks of this one.

    Args:
        first: where to start to count.
    """

    def __init__(self, first: int = 0) -> None:
        self._steps = first
        self._mean_loss = torch.zeros(())
        self._called: list[str] = []

    def start(self) -> None:
        self._called.append(f"start at {self.run.state.iteration}")

    def step_begin(self) -> None:
        self._called.append("step_begin")

    def vote(self, losses: Any) -> int:
        self._called.append("vote")
        return self.run.groups.rank

    def agreed(self, number: int) -> None:
        self._called.append(f"agreed on {number}")

    def before_update(self, grad_norm: float) -> None:
        assert grad_norm > 0
        self._called.append("before_update")

    def report_due(self, report: Report) -> None:
        self._mean_loss += report.metrics["train/loss"]
        report.metrics["count/steps"] = self._steps + 1
        self._called.append("report_due")

    def step_end(self) -> None:
        self._steps += 1
        self._called.append("step_end")

    def before_evaluation(self) -> None:
        self._called.append("before_evaluation")

    def after_evaluation(self, report: Report) -> None:
        report.metrics["count/evaluations"] = sum(name == "before_evaluation" for name in self._called)
        self._called.append("after_evaluation")

    def log(self, report: Report) -> None:
        assert self.run.groups.is_main_process
        self._called.append(f"log of {report.iteration}")

    def before_save(self) -> None:
        self._called.append("before_save")

    def after_snapshot(self) -> None:
        self._called.append("after_snapshot")

    def after_save(self, folder: Path) -> None:
        self._called.append(f"after_save of {folder.name}")

    def end(self, error: BaseException | None) -> None:
        found = {"steps": self._steps, "loss": self._mean_loss.item(), "called": self._called}
        path = Path(self.run.config.output_dir) / f"counted_{self.run.groups.rank}.json"
        path.write_text(json.dumps(found))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "loss": self._mean_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._mean_loss = state["steps"], state["loss"]


class OwnNumber(Evaluator):
    """Measures nothing but its own setting."""

    def __init__(self, value: float) -> None:
        self._value = value

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        return {"own/value": self._value, "own/iteration": float(run.iteration)}


class Misspelt(Callback):
    def step_ends(self) -> None: ...


class OtherArguments(Callback):
    def before_update(self) -> None: ...  # type: ignore[override]


class KeepsAnObject(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"path": Path()}


class NoCallback:
    """It has the hooks and is no subclass."""

    def start(self) -> None: ...
