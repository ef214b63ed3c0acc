"""A student against its teacher, both written by hand: agreement counted, KL divergence as torch has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.against_teacher import teacher_record
from spikingbrain_train.evaluation.against_teacher.comparison import compare
from spikingbrain_train.evaluation.against_teacher.teacher_record import record_teacher
from tests.evaluation.written_models import Next, Written

PROMPTS = [[5, 6], [20], [41, 42, 43]]


class Vocabulary:
    """Of tokens without text."""

    def __init__(self, size: int = 50) -> None:
        self.vocab_size = size

    def encode(self, text: str) -> list[int]:
        return [0]


class Unsure(Written):
    """A table of distributions by the last token."""

    def __init__(self, seed: int, following: Next | None = None, size: int = 50) -> None:
        super().__init__(following or (lambda tokens: 0), Vocabulary(size))
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(size, size, generator=generator)

    def _logits(self, tokens: list[int]) -> Tensor:
        return self.table[tokens[-1]]


def counting(step: int = 1, until: int = 10**6, then: int = 7) -> Next:
    """Goes up by ``step``, and behind so many tokens says one thing only."""
    return lambda tokens: (tokens[-1] + step) % 50 if len(tokens) < until else then


def test_agreement_before_the_first_difference_at_its_place_and_behind_the_teachers_text() -> None:
    teacher = Written(counting(), Vocabulary())
    record = record_teacher(teacher, PROMPTS, 8)
    assert record.texts[1] == [21, 22, 23, 24, 25, 26, 27, 28]
    same = compare(teacher, record)
    assert (same.agreement, same.forced_agreement, same.identical) == (1.0, 1.0, 1.0)
    assert same.mean_kl_divergence == pytest.approx(0.0, abs=1e-6)

    # Right for three tokens behind a prompt of one, for two behind one of two, for one behind one of three.
    student = Written(counting(until=4), Vocabulary())
    found = compare(student, record)
    assert list(found.same_beginnings) == [2, 3, 1]
    assert found.agreement == found.agreement_before_difference == pytest.approx(6 / 24)
    assert found.forced_agreement == pytest.approx(6 / 24)
    assert found.student.repeated_4grams > 0.2 and found.teacher.repeated_4grams == 0.0
    assert found.student.longest_loop == pytest.approx((5 + 4 + 6) / 3)
    by_position = found.by_position()
    assert by_position["still_identical"][:4] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert by_position["agreement"] == by_position["still_identical"]
    assert len(by_position["kl_divergence"]) == 8 and by_position["kl_divergence"][7] > 10


def test_one_slip_costs_little_along_the_teachers_text_and_all_of_its_own() -> None:
    record = record_teacher(Written(counting(), Vocabulary()), [[1, 2]], 10)

    def slips(tokens: list[int]) -> int:
        return (tokens[-1] + (2 if len(tokens) == 4 else 1)) % 50

    found = compare(Written(slips, Vocabulary()), record)
    assert found.forced_agreement == 0.9
    assert found.agreement == 0.2
    text = found.describe("the/teacher")
    assert "90.0 %" in text and "20.0 %" in text and "the/teacher: 1 prompts of 2 tokens" in text
    report = found.as_json("the/teacher")
    assert report["teacher"] == "the/teacher" and report["tokens_before_difference"] == 2
    assert found.metrics()["against_teacher/agreement"] == 0.2


@pytest.mark.parametrize("kept", [50, 6])
def test_kl_divergence_is_that_of_whole_distributions_or_just_below(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_record, "MOST_TOKENS", kept)
    monkeypatch.setattr(teacher_record, "_CHUNK_BYTES", 3000)  # two texts at a time
    teacher, student = Unsure(1), Unsure(2)
    record = record_teacher(teacher, PROMPTS, 9)
    found = compare(student, record)
    for prompt, text, kl in zip(PROMPTS, record.texts, found.kl_divergence, strict=True):
        last = [prompt[-1], *text[:-1]]
        exact = torch.nn.functional.kl_div(
            student.table[last].log_softmax(-1), teacher.table[last].log_softmax(-1), reduction="none",
            log_target=True,
        ).sum(-1)  # fmt: skip
        if kept == 50:
            assert kl == pytest.approx(exact.tolist(), abs=1e-5)
        else:
            assert all(0 < mine <= whole + 1e-6 for mine, whole in zip(kl, exact.tolist(), strict=True))
    assert found.mass_of_others == 0.0 if kept == 50 else 0.01 < found.mass_of_others < 0.6


def test_texts_that_end_are_compared_up_to_their_end() -> None:
    teacher = Written(counting(), Vocabulary(), end_tokens=[9])
    record = record_teacher(teacher, [[5], [30]], 6)
    assert record.texts == [[6, 7, 8, 9], [31, 32, 33, 34, 35, 36]]
    found = compare(Written(counting(), Vocabulary(), end_tokens=[8]), record)
    assert [list(text) for text in found.own] == [[True, True, True, False], [True] * 6]
    assert [len(each) for each in found.kl_divergence] == [4, 6]
    assert found.by_position()["agreement"] == [1, 1, 1, 0.5, 1, 1]


def test_another_vocabulary_is_refused() -> None:
    record = record_teacher(Written(counting(), Vocabulary()), PROMPTS, 3)
    with pytest.raises(ConfigurationError, match="knows 50 token ids and the student 51"):
        compare(Written(counting(), Vocabulary(51)), record)
