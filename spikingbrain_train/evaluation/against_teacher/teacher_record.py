"""What is kept of a teacher, so that it need not lie in memory beside its student.

That is its texts, and how likely it found the tokens at their places.

Of each distribution the likeliest tokens are kept, and the log probability of all others together. A KL
divergence of such distributions is at most that of the whole ones (nothing is lost but what tells the others
apart), and equal where the vocabulary is no larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.evaluation.language_model import LanguageModel, ScoreRequest

MOST_TOKENS = 2048
"""Of a distribution, that are kept."""
_CHUNK_BYTES = 256 << 20
"""Of log probabilities of one model at a time."""


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher's continuations of some prompts. All tensors are on the CPU."""

    vocab_size: int
    """Token ids that the teacher knows."""
    prompts: list[list[int]]
    texts: list[list[int]]
    """What it goes on with, greedily, to the token that ends a text at most."""
    token_ids: list[Tensor]
    """Of each text [tokens, K] int32: the likeliest tokens at its places."""
    log_probs: list[Tensor]
    """Of each text [tokens, K] float32: of these."""
    others: list[Tensor]
    """Of each text [tokens] float32: log probability of all other tokens together, -inf without any."""

    @property
    def mass_of_others(self) -> float:
        """Mean probability of the tokens that were not kept."""
        return float(torch.cat(self.others).exp().mean()) if self.others else 0.0


def record_teacher(
    teacher: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> TeacherRecord:
    """Let a teacher go on, and read what it says again. All of its ranks call it together.

    Args:
        teacher: the model.
        prompts: token ids, at least one each.
        new_tokens: that it writes at most.
    """
    texts = teacher.generate(
        prompts, new_tokens, end_tokens=teacher.tokenizer.end_tokens, what="teacher: generating"
    )
    record = TeacherRecord(teacher.vocab_size, [list(prompt) for prompt in prompts], texts, [], [], [])
    most = min(MOST_TOKENS, teacher.vocab_size)
    for _, log_probs_TV in along_texts(teacher, record, "teacher: reading"):
        kept, ids = log_probs_TV.topk(most, dim=-1)
        record.token_ids.append(ids.int().cpu())
        record.log_probs.append(kept.cpu())
        record.others.append(log_prob_of_others(log_probs_TV, ids).cpu())
    return record


def along_texts(model: LanguageModel, record: TeacherRecord, what: str) -> Iterator[tuple[int, Tensor]]:
    """A model's distributions along the teacher's texts: (index of a text, [tokens, vocab_size] float32)."""
    requests = [ScoreRequest(prompt, text) for prompt, text in zip(record.prompts, record.texts, strict=True)]
    longest = max((len(text) for text in record.texts), default=1)
    step = max(1, _CHUNK_BYTES // (4 * model.vocab_size * longest))
    for first in range(0, len(requests), step):
        chunk = requests[first : first + step]
        shown = what if len(requests) <= step else f"{what} from text {first + 1} of {len(requests)} on"
        yield from enumerate(model.log_probs(chunk, what=shown), first)


def log_prob_of_others(log_probs_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """[T]: log of the summed probability of all tokens but ``ids_TK``, -inf without any."""
    return log_probs_TV.scatter(-1, ids_TK.long(), float("-inf")).logsumexp(-1)
