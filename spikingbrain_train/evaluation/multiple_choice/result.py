"""What multiple choice gives, as JSON keeps it and as a table. Without torch and lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from spikingbrain_train.evaluation.multiple_choice.task_files import LETTERS
from spikingbrain_train.reporting.tables import table

_NOTHING = "-"


@dataclass(frozen=True)
class Permutations:
    """The same questions under the four cyclic orders of their options.

    In order k each option stands k places further up than in the dataset, so over all four every option has
    had every letter. Who knows the answer is right under all; who prefers a letter is right under one of them
    (arXiv 2608.02689).
    """

    accuracy: tuple[float, ...]
    """Of each order, the dataset's first."""
    right_under_all: float
    """Share of questions answered right under all four: knowledge."""
    right_under_some: float
    """Share right under some orders and wrong under others: position bias."""
    consistency: float
    """Share whose answer is the same option under all four, right or wrong."""
    letters: Mapping[str, float]
    """Share of answers with each letter, over all orders; without bias a quarter each."""


@dataclass(frozen=True)
class Score:
    """Of a task or a subject."""

    questions: int
    accuracy: float
    """Share of questions whose right option is the likeliest."""
    stderr: float | None
    """Of the accuracy; None of a single question."""
    acc_norm: float | None = None
    """With likelihoods divided by the option's length, where lm-eval's definition has it."""
    acc_norm_stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """Of a task."""

    score: Score
    chance: float
    """Accuracy of guessing."""
    num_fewshot: int
    shortened: int
    """Prompts and options that lost the beginning of their prompt, because the model reads no more."""
    permutations: Permutations | None = None
    subjects: Mapping[str, Score] = field(default_factory=dict)
    all_subjects: int | None = None
    """That lm-eval defines; a task with fewer is not the whole of it."""

    def as_json(self) -> dict[str, Any]:
        """As a report keeps it; what does not apply is left out."""
        found: dict[str, Any] = {
            **_without_none(asdict(self.score)),
            "chance": self.chance,
            "num_fewshot": self.num_fewshot,
            "shortened_prompts": self.shortened,
        }
        if self.permutations is not None:
            found["permutations"] = asdict(self.permutations)
        if self.all_subjects is not None:
            found["subjects"] = {name: _without_none(asdict(each)) for name, each in self.subjects.items()}
            found["all_subjects"] = self.all_subjects
        return found


def describe(results: Mapping[str, TaskResult]) -> str:
    """Tables for a terminal."""
    rows = [("task", "questions", "shots", "accuracy", "acc_norm", "guessing")]
    for name, result in results.items():
        score = result.score
        rows.append(
            (
                _name(name, result),
                f"{score.questions:,}",
                str(result.num_fewshot),
                _with_error(score.accuracy, score.stderr),
                _with_error(score.acc_norm, score.acc_norm_stderr),
                f"{100 * result.chance:.1f} %",
            )
        )
    lines = table(rows, left=1)
    shortened = {name: result.shortened for name, result in results.items() if result.shortened}
    for name, count in shortened.items():
        lines.append(f"{name}: {count} prompts were longer than the model reads and lost their beginning")
    permuted = {name: each.permutations for name, each in results.items() if each.permutations is not None}
    if permuted:
        lines += ["", *_permutation_table(permuted)]
    return "\n".join(lines)


def _name(name: str, result: TaskResult) -> str:
    known, here = result.all_subjects, len(result.subjects)
    return name if known in (None, here) else f"{name} ({here} of {known} subjects)"


def _permutation_table(permuted: Mapping[str, Permutations]) -> Sequence[str]:
    header = ("four orders of options", "accuracy of each", "right in all", "in some", "same option")
    rows = [(*header, "answers A", *LETTERS[1:])]
    for name, each in permuted.items():
        shares = (each.right_under_all, each.right_under_some, each.consistency)
        rows.append(
            (
                name,
                " ".join(f"{100 * accuracy:.1f}" for accuracy in each.accuracy),
                *(f"{100 * share:.1f} %" for share in (*shares, *each.letters.values())),
            )
        )
    return table(rows, left=1)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{100 * value:.2f} %" if error is None else f"{100 * value:.2f} ± {100 * error:.2f} %"


def _without_none(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if value is not None}
