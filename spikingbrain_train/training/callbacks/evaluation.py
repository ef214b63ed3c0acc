"""When a run measures its model on what it does not train on."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class Evaluation(Callback):
    """Evaluates before the first step, every ``logging.eval_interval`` steps and after the last.

    Args:
        evaluators: what is measured, in this order; one that does not apply to the run is left out.
    """

    def __init__(self, evaluators: Sequence[Evaluator]) -> None:
        self._evaluators = evaluators

    def start(self) -> None:
        if self.run.state.iteration == 0:
            self._evaluate()

    def step_end(self) -> None:
        run = self.run
        interval = run.config.logging.eval_interval
        is_due = interval > 0 and run.state.iteration % interval == 0
        # Who asks to stop does not wait long: the checkpoint comes first, and nothing after it.
        if run.is_last_step or (is_due and run.stop_reason is None):
            self._evaluate()

    def _evaluate(self) -> None:
        run = self.run
        evaluated = EvaluatedRun(
            model=run.state.model,
            config=run.config,
            groups=run.groups,
            iteration=run.state.iteration,
            held_out=run.data.held_out,
            activity=run.activity,
        )
        evaluators = [each for each in self._evaluators if each.applies(evaluated)]
        if not evaluators:
            return
        run.callbacks.before_evaluation()
        report = Report(run.state.iteration, {})
        for evaluator in evaluators:
            report.metrics |= evaluator.evaluate(evaluated)
            report.shown |= evaluator.shown
        run.callbacks.after_evaluation(report)
        run.report(report)
