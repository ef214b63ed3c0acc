"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of tokens, then their keys again.

Keys and values are single tokens of the model's vocabulary, between random ones that are neither. All pairs
are asked for, in another order; each answer lies at the depth of its pair.
"""

from __future__ import annotations

from random import Random

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.probes.haystacks import Hay
from spikingbrain_train.evaluation.probes.layout import AnswerPart, Needle, lay_out
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

_PAIRS, _FEWEST_PAIRS = 32, 2
_OTHERS = 1024
"""Tokens that noise is drawn from."""


class AssociativeRecall(Probe):
    """32 pairs of tokens spread evenly over the context, fewer where it or the vocabulary is small."""

    name = "associative_recall"
    title = "associative recall: 32 pairs of tokens (MQAR)"
    at_depths = False
    is_written = False

    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        begin = materials.segments.begin
        tokens = materials.distinct_tokens(2 * _PAIRS + _OTHERS, random)
        # As much noise as pairs at least, from tokens that are in none of them.
        pairs = min(_PAIRS, len(tokens) // 3, (length - len(begin)) // 6)
        if pairs < _FEWEST_PAIRS:
            raise ConfigurationError(
                f"the probe {self.name} takes at least {6 * _FEWEST_PAIRS} tokens and a vocabulary of 6, "
                f"but a length of {length} and a vocabulary of {materials.tokenizer.vocab_size} are asked "
                "for; raise the shortest length, or leave the probe out"
            )
        keys, values, others = tokens[:pairs], tokens[pairs : 2 * pairs], tokens[2 * pairs :]
        depths = [(index + random.random()) / pairs for index in range(pairs)]
        order = random.sample(range(pairs), pairs)
        answer: list[AnswerPart] = []
        for index in order[1:]:
            answer += [
                AnswerPart([keys[index]]),
                self._value(values[index], depths[index], materials),
            ]
        return lay_out(
            length,
            name=self.name,
            head=list(begin),
            take=lambda room: Hay([], [[random.choice(others)] for _ in range(room)]),
            needles=[Needle(at, [key, value]) for at, key, value in zip(depths, keys, values, strict=True)],
            tail=[keys[order[0]]],
            answer=[self._value(values[order[0]], depths[order[0]], materials), *answer],
        )

    @staticmethod
    def _value(token: int, depth: float, materials: Materials) -> AnswerPart:
        return AnswerPart([token], materials.tokenizer.decode([token]), depth)
