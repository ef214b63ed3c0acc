"""Questions of multiple-choice tasks to a language model: the likeliest option is its answer.

As SpikingBrain (arXiv 2509.05276, tables 1 to 3) and lm-eval measure it: the log likelihood of each option
behind the prompt. Prompts, options, metrics and token ids are lm-eval's own, the likelihoods ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.metrics import pooled_sample_stderr, stderr_for_metric

from spikingbrain_train.evaluation.language_model import LanguageModel, ScoreRequest
from spikingbrain_train.evaluation.language_model import Score as Likelihood
from spikingbrain_train.evaluation.multiple_choice.lm_eval_encoder import LmEvalEncoder
from spikingbrain_train.evaluation.multiple_choice.lm_eval_tasks import lm_eval_task
from spikingbrain_train.evaluation.multiple_choice.plan import AskedTask, TaskPlan, known_subjects
from spikingbrain_train.evaluation.multiple_choice.result import Permutations, Score, TaskResult
from spikingbrain_train.evaluation.multiple_choice.task_files import LETTERS, Question

_ORDERS = 4


def measure_tasks(model: LanguageModel, plan: TaskPlan) -> dict[str, TaskResult]:
    """Ask every question; all ranks of a model call it together, and all get the result.

    Args:
        model: any.
        plan: what is asked.

    Raises:
        DataError: a file has changed since the plan was made.
    """
    return {asked.name: _measure(model, plan, asked) for asked in plan.tasks}


@dataclass
class _Asked:
    """A question in one order of its options."""

    question: Question
    requests: list[ScoreRequest]
    likelihoods: list[Likelihood] = field(default_factory=list)

    def answers(self) -> list[tuple[float, bool]]:
        """As lm-eval takes them."""
        return [(each.log_prob, each.is_greedy) for each in self.likelihoods]

    def letter(self) -> int:
        """Place of the likeliest option."""
        return max(range(len(self.likelihoods)), key=lambda at: self.likelihoods[at].log_prob)


@dataclass
class _Subject:
    name: str | None
    task: Any
    """lm-eval's."""
    questions: list[list[_Asked]]
    """Each in one order, or in all."""


def _measure(model: LanguageModel, plan: TaskPlan, asked: AskedTask) -> TaskResult:
    encoder = LmEvalEncoder(model.tokenizer, model.max_length)
    orders = _ORDERS if plan.permutations and asked.task.shift is not None else 1
    subjects = []
    with model.activity(f"{asked.name}: tokenizing", None, "questions") as progress:
        for name in asked.subjects:
            questions = plan.questions(asked, name)
            defined = lm_eval_task(asked.task, name, questions, plan.examples(asked, name))
            task, prepared = defined.task, []
            for number, document in enumerate(progress.over(defined.documents)):
                orders_of_it = _in_orders(asked, document, orders)
                prepared.append([_prepare(encoder, task, each, number, plan) for each in orders_of_it])
            subjects.append(_Subject(name, task, prepared))
    every = [each for subject in subjects for question in subject.questions for each in question]
    likelihoods = iter(model.score([request for each in every for request in each.requests], what=asked.name))
    for each in every:
        each.likelihoods = [next(likelihoods) for _ in each.requests]

    scores = {subject.name: _score(subject) for subject in subjects}
    options = [len(question[0].requests) for subject in subjects for question in subject.questions]
    has_subjects = asked.task.has_subjects and not asked.named
    return TaskResult(
        score=_together(list(scores.values())),
        chance=sum(1 / number for number in options) / len(options),
        num_fewshot=plan.num_fewshot,
        shortened=encoder.shortened,
        permutations=_permutations(subjects) if orders > 1 else None,
        subjects={str(name): score for name, score in scores.items()} if has_subjects else {},
        all_subjects=len(known_subjects(asked.task)) if has_subjects else None,
    )


def _in_orders(asked: AskedTask, document: Question, orders: int) -> Iterator[Question]:
    yield document
    for places in range(1, orders):
        assert asked.task.shift is not None
        yield asked.task.shift(document, places)


def _prepare(encoder: LmEvalEncoder, task: Any, document: Question, number: int, plan: TaskPlan) -> _Asked:
    context = task.fewshot_context(document, plan.num_fewshot, gen_prefix=task.doc_to_prefix(document))
    instances = task.construct_requests(doc=document, ctx=context, metadata=(task.config.task, number, 1))
    return _Asked(document, encoder.requests(instances))


def _score(subject: _Subject) -> Score:
    """In the dataset's own order, by lm-eval's metrics."""
    task = subject.task
    values: dict[str, list[float]] = {}
    for question in subject.questions:
        for name, value in task.process_results(question[0].question, question[0].answers()).items():
            values.setdefault(name, []).append(value)
    means: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for name, aggregate in task.aggregation().items():
        means[name] = float(aggregate(values[name]))
        error = stderr_for_metric(aggregate, bootstrap_iters=1)  # a mean's is exact
        errors[name] = float(error(values[name])) if error is not None and len(values[name]) > 1 else None
    return Score(
        questions=len(subject.questions),
        accuracy=means["acc"],
        stderr=errors["acc"],
        acc_norm=means.get("acc_norm"),
        acc_norm_stderr=errors.get("acc_norm"),
    )


def _together(scores: Sequence[Score]) -> Score:
    """Of all subjects, each weighing in with its questions, as lm-eval's groups do."""
    if len(scores) == 1:
        return scores[0]
    sizes = [score.questions for score in scores]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value * size for value, size in zip(values, sizes, strict=True) if value is not None]
        return sum(known) / sum(sizes) if len(known) == len(sizes) else None

    def error(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(pooled_sample_stderr(known, sizes)) if len(known) == len(sizes) else None

    accuracy = mean([score.accuracy for score in scores])
    assert accuracy is not None
    return Score(
        questions=sum(sizes),
        accuracy=accuracy,
        stderr=error([score.stderr for score in scores]),
        acc_norm=mean([score.acc_norm for score in scores]),
        acc_norm_stderr=error([score.acc_norm_stderr for score in scores]),
    )


def _permutations(subjects: Sequence[_Subject]) -> Permutations:
    right: list[list[bool]] = []
    same, letters = [], [0] * len(LETTERS)
    for subject in subjects:
        for question in subject.questions:
            chosen = [each.letter() for each in question]
            gold = [subject.task.doc_to_target(each.question) for each in question]
            right.append([answer == _place(wanted) for answer, wanted in zip(chosen, gold, strict=True)])
            same.append(len({(letter + order) % _ORDERS for order, letter in enumerate(chosen)}) == 1)
            for letter in chosen:
                letters[letter] += 1
    count = len(right)
    return Permutations(
        accuracy=tuple(sum(each[order] for each in right) / count for order in range(_ORDERS)),
        right_under_all=sum(all(each) for each in right) / count,
        right_under_some=sum(any(each) and not all(each) for each in right) / count,
        consistency=sum(same) / count,
        letters={letter: number / sum(letters) for letter, number in zip(LETTERS, letters, strict=True)},
    )


def _place(target: Any) -> int:
    """Of the right option, which lm-eval gives as a number or as its text."""
    return int(target)


def by_metric(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Metrics of a run: ``tasks/<task>/accuracy`` and what else applies."""
    found: dict[str, float] = {}
    for name, result in results.items():
        found[f"tasks/{name}/accuracy"] = result.score.accuracy
        if result.score.acc_norm is not None:
            found[f"tasks/{name}/acc_norm"] = result.score.acc_norm
        if result.permutations is not None:
            found[f"tasks/{name}/right_under_all_orders"] = result.permutations.right_under_all
            found[f"tasks/{name}/same_option_in_all_orders"] = result.permutations.consistency
    return found
