"""What the comparison of a student with its teacher gave. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.evaluation.against_teacher.repetition import Repetition
from spikingbrain_train.reporting.tables import table


@dataclass(frozen=True)
class TeacherComparison:
    """Numbers of every place of every text; texts may differ in length."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    """Of the longest text of the teacher."""
    kl_divergence: Sequence[Sequence[float]]
    """KL(teacher || student) along the teacher's texts, in nats."""
    forced: Sequence[Sequence[bool]]
    """Whether the student's likeliest token is the teacher's, behind the teacher's text so far."""
    own: Sequence[Sequence[bool]]
    """Whether the text that the student writes by itself has the teacher's token at the same place."""
    student: Repetition
    teacher: Repetition
    mass_of_others: float
    """Probability, to the teacher, of the tokens that its KL divergence takes for one."""

    @property
    def mean_kl_divergence(self) -> float:
        """Over all tokens of the teacher's texts."""
        return _mean_of_all(self.kl_divergence)

    @property
    def forced_agreement(self) -> float:
        """Share of the teacher's tokens that the student would have written, too, behind the same text."""
        return _mean_of_all(self.forced)

    @property
    def agreement(self) -> float:
        """Share of the teacher's tokens that stand at the same place of the student's own text."""
        return _mean_of_all(self.own)

    @property
    def same_beginnings(self) -> Sequence[int]:
        """Of each text, tokens before the first difference."""
        return [next((at for at, same in enumerate(text) if not same), len(text)) for text in self.own]

    @property
    def agreement_before_difference(self) -> float:
        """Share of the teacher's tokens in front of the first difference."""
        total = sum(map(len, self.own))
        return sum(self.same_beginnings) / total if total else 0.0

    @property
    def identical(self) -> float:
        """Share of texts without a difference."""
        return sum(all(text) for text in self.own) / len(self.own)

    def by_position(self) -> dict[str, list[float]]:
        """Means over the texts that reach each position."""
        beginnings = self.same_beginnings
        still = [
            [at < same for at in range(len(text))] for same, text in zip(beginnings, self.own, strict=True)
        ]
        return {
            "kl_divergence": _means(self.kl_divergence),
            "forced_agreement": _means(self.forced),
            "agreement": _means(self.own),
            "still_identical": _means(still),
        }

    def as_json(self, teacher: str) -> dict[str, Any]:
        """The part ``against_teacher`` of a report."""
        beginnings = self.same_beginnings
        return {
            "teacher": teacher,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "kl_divergence": self.mean_kl_divergence,
            "teacher_mass_taken_together": self.mass_of_others,
            "forced_agreement": self.forced_agreement,
            "agreement": self.agreement,
            "agreement_before_difference": self.agreement_before_difference,
            "tokens_before_difference": sum(beginnings) / len(beginnings),
            "identical": self.identical,
            "repetition": {"student": _repetition(self.student), "teacher": _repetition(self.teacher)},
            "by_position": self.by_position(),
        }

    def metrics(self) -> dict[str, float]:
        """``against_teacher/<name>`` -> number."""
        return {
            "against_teacher/agreement": self.agreement,
            "against_teacher/forced_agreement": self.forced_agreement,
            "against_teacher/agreement_before_difference": self.agreement_before_difference,
            "against_teacher/kl_divergence": self.mean_kl_divergence,
            "against_teacher/repeated_4grams": self.student.repeated_4grams,
        }

    def describe(self, teacher: str) -> str:
        """Tables for a terminal."""
        beginnings = self.same_beginnings
        mean = sum(beginnings) / len(beginnings)
        agreement = [
            ["the student and its teacher", ""],
            ["KL(teacher || student) along the teacher's text", f"{self.mean_kl_divergence:.4f} nats"],
            ["same token, behind the teacher's text", _percent(self.forced_agreement)],
            ["same token at its place, each in its own text", _percent(self.agreement)],
            ["tokens before the first difference", _percent(self.agreement_before_difference)],
            ["  of each text", f"{mean:.1f} tokens"],
            ["texts without a difference", _percent(self.identical)],
        ]
        rows = [
            ["in their own texts", "student", "teacher"],
            ["repeated 4-grams", *(_percent(each.repeated_4grams) for each in self._both)],
            *(
                [f"distinct {n}-grams", *(_percent(each.distinct[n]) for each in self._both)]
                for n in (1, 2, 3)
            ),
            ["longest loop, tokens", *(f"{each.longest_loop:.1f}" for each in self._both)],
            ["texts that loop for a quarter", *(_percent(each.looping) for each in self._both)],
        ]
        head = (
            f"against the teacher {teacher}: {self.prompts} prompts of {self.prompt_tokens} tokens of "
            f"held-out text, up to {self.new_tokens} greedy tokens each"
        )
        return "\n".join([head, *table(agreement, left=1), "", *table(rows, left=1)])

    @property
    def _both(self) -> tuple[Repetition, Repetition]:
        return self.student, self.teacher


def _repetition(found: Repetition) -> dict[str, Any]:
    return {
        "repeated_4grams": found.repeated_4grams,
        "distinct": {str(n): share for n, share in found.distinct.items()},
        "longest_loop": found.longest_loop,
        "looping": found.looping,
    }


def _mean_of_all(texts: Sequence[Sequence[float]]) -> float:
    count = sum(map(len, texts))
    return sum(map(sum, texts)) / count if count else 0.0


def _means(texts: Sequence[Sequence[float]]) -> list[float]:
    longest = max(map(len, texts), default=0)
    columns = ([float(text[at]) for text in texts if at < len(text)] for at in range(longest))
    return [sum(column) / len(column) for column in columns]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
