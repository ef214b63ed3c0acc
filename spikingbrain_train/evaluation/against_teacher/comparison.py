"""A student held against what was recorded of its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.against_teacher.repetition import repetition
from spikingbrain_train.evaluation.against_teacher.result import TeacherComparison
from spikingbrain_train.evaluation.against_teacher.teacher_record import (
    TeacherRecord,
    along_texts,
    log_prob_of_others,
)
from spikingbrain_train.evaluation.language_model import LanguageModel


def compare(student: LanguageModel, record: TeacherRecord) -> TeacherComparison:
    """Let the student go on from the same prompts, and read the teacher's texts. All ranks call it together.

    Args:
        student: the model.
        record: of the teacher.

    Raises:
        ConfigurationError: the two have other vocabularies.
    """
    if student.vocab_size != record.vocab_size:
        raise ConfigurationError(
            f"the teacher knows {record.vocab_size} token ids and the student {student.vocab_size}; name "
            "the dense source of the student as its teacher"
        )
    kl: list[list[float]] = []
    forced: list[list[bool]] = []
    for index, log_probs_TV in along_texts(student, record, "student: reading"):
        kl.append(_kl_divergence(record, index, log_probs_TV).tolist())
        forced.append((log_probs_TV.argmax(-1).cpu() == torch.tensor(record.texts[index])).tolist())
    longest = max(map(len, record.texts))
    texts = student.generate(
        record.prompts, longest, end_tokens=student.tokenizer.end_tokens, what="student: generating"
    )
    own = [matches(text, teacher) for text, teacher in zip(texts, record.texts, strict=True)]
    return TeacherComparison(
        prompts=len(texts),
        prompt_tokens=max(map(len, record.prompts)),
        new_tokens=longest,
        kl_divergence=kl,
        forced=forced,
        own=own,
        student=repetition(texts),
        teacher=repetition(record.texts),
        mass_of_others=record.mass_of_others,
    )


def matches(text: Sequence[int], teacher: Sequence[int]) -> list[bool]:
    """Of each of the teacher's tokens, whether the other text has it at the same place."""
    return [at < len(text) and text[at] == token for at, token in enumerate(teacher)]


def _kl_divergence(record: TeacherRecord, index: int, log_probs_TV: Tensor) -> Tensor:
    """KL(teacher || student) [T] float64 in nats, on the CPU, of the distributions as they were kept."""
    ids = record.token_ids[index].to(log_probs_TV.device)
    student = torch.cat(
        (log_probs_TV.gather(-1, ids.long()), log_prob_of_others(log_probs_TV, ids).unsqueeze(-1)), dim=-1
    )
    teacher = torch.cat((record.log_probs[index], record.others[index].unsqueeze(-1)), dim=-1).double()
    difference = teacher - student.double().cpu()
    # What the teacher never says costs nothing, whatever the student thinks of it: 0 log 0 is 0.
    return torch.where(teacher > float("-inf"), teacher.exp() * difference, 0.0).sum(-1)
