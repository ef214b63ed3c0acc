"""How a question is laid out: head, haystack with its needles, question, beginning of the answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.probes.haystacks import Hay
from spikingbrain_train.evaluation.probes.sample import Answer, ProbeSample


@dataclass(frozen=True)
class Needle:
    """What is hidden."""

    depth: float
    """0 stands in front of the haystack's first whole piece, 1 behind its last."""
    ids: list[int]


@dataclass(frozen=True)
class AnswerPart:
    """A piece of the answer."""

    ids: list[int]
    text: str | None = None
    """What was asked for; None for what stands between two answers."""
    depth: float | None = None
    """Where it was hidden."""


def lay_out(
    length: int,
    *,
    name: str,
    head: list[int],
    take: Callable[[int], Hay],
    needles: Sequence[Needle],
    tail: list[int],
    answer: Sequence[AnswerPart],
) -> ProbeSample:
    """A sample of exactly ``length`` tokens.

    Args:
        length: tokens.
        name: of the probe.
        head: what precedes the haystack.
        take: gives so many tokens of the haystack.
        needles: in the order in which those of equal depth are to stand.
        tail: what follows the haystack: the question, and the beginning of its answer.
        answer: pieces of the rest of it.

    Raises:
        ConfigurationError: without any haystack it is longer.
    """
    fixed = len(head) + sum(len(needle.ids) for needle in needles) + len(tail)
    fixed += sum(len(part.ids) for part in answer)
    if fixed > length:
        raise ConfigurationError(
            f"the probe {name} takes at least {fixed} tokens with this tokenizer, but a length of {length} "
            "is asked for; raise the shortest length, or leave the probe out"
        )
    hay = take(length - fixed)
    ends = list(accumulate((len(piece) for piece in hay.pieces), initial=len(hay.begun)))
    hidden: list[list[list[int]]] = [[] for _ in ends]
    for needle in needles:
        hidden[_nearest(ends, needle.depth * ends[-1])].append(needle.ids)
    context = [*head, *hay.begun]
    for before, piece in zip(hidden, [*hay.pieces, []], strict=True):
        for ids in [*before, piece]:
            context += ids
    context += tail
    continuation: list[int] = []
    answers = []
    for part in answer:
        start = len(continuation)
        continuation += part.ids
        if part.text is not None:
            answers.append(Answer(start, len(continuation), part.text, part.depth))
    return ProbeSample(context, continuation, answers)


def _nearest(ends: Sequence[int], wanted: float) -> int:
    """Index of the end that lies nearest, of equally near ones the first."""
    above = min(bisect_left(ends, wanted), len(ends) - 1)
    return above - 1 if above > 0 and wanted - ends[above - 1] <= ends[above] - wanted else above
