"""Multiple choice while a run trains: name it in ``logging.evaluators``."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.evaluation.multiple_choice.plan import TaskPlan
from spikingbrain_train.evaluation.run_tokenizer import tokenizer_of_run
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.reporting.progress import Shown


class MultipleChoice(Evaluator):
    """``tasks/<task>/accuracy`` of each task, in every evaluation of a run.

    Args:
        tasks: as for ``--tasks`` of spikingbrain-evaluate, with commas between them.
        task_data: folder with a folder for each task.
        num_fewshot: solved examples in front of every question.
        limit: questions of each task, or of each subject; None asks all.
        permutations: also ask options with letters in the other cyclic orders.
    """

    def __init__(
        self,
        tasks: str,
        task_data: str,
        num_fewshot: int = 0,
        limit: int | None = 100,
        permutations: bool = False,
    ) -> None:
        self._plan = TaskPlan.of(
            tasks, Path(task_data), num_fewshot=num_fewshot, limit=limit, permutations=permutations
        )
        self._tokenizer: TextTokenizer | None = None
        self.shown = {
            f"tasks/{asked.name}/accuracy": Shown(asked.name, "{:.3f}") for asked in self._plan.tasks
        }

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
        from spikingbrain_train.evaluation.multiple_choice.measure import by_metric, measure_tasks

        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(tokenizer_of_run(run.config))
        model = MegatronLanguageModel(run.model, run.groups, self._tokenizer, show=run.activity)
        return by_metric(measure_tasks(model, self._plan))
