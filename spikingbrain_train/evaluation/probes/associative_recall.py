"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then all keys again.

Keys and values are single tokens of the model's vocabulary. Unlike there, where a sequence is nothing but
such tokens, a pair is a line ``key: value`` between lines of noise: models that have only read text know such
lists, and of bare random tokens they recall next to nothing (SmolLM2-135M: 1 of 16 pairs, of lines 10).
"""

from __future__ import annotations

from random import Random

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.probes.layout import AnswerPart, Needle, lay_out
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

_PAIRS, _FEWEST_PAIRS = 32, 2


class AssociativeRecall(Probe):
    """32 pairs spread evenly over the context, fewer where it or the vocabulary is small.

    All of them are asked for, in another order; each answer lies at the depth of its pair.
    """

    name = "associative_recall"
    title = "associative recall: 32 pairs of tokens in noise (MQAR)"
    at_depths = False
    is_written = False

    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        segments, noise = materials.segments, materials.haystacks.noise_lines
        between, behind = segments.inside(":"), segments.line("\n")
        used = {*segments.begin, *between, *behind, *(token for piece in noise.pieces for token in piece)}
        tokens = materials.distinct_tokens(2 * _PAIRS, random, without=used)
        # Twice each, and no more of the text than half of it.
        pairs = min(_PAIRS, len(tokens) // 2, length // (4 * (2 + len(between) + len(behind))))
        if pairs < _FEWEST_PAIRS:
            raise ConfigurationError(
                f"the probe {self.name} finds no room for {_FEWEST_PAIRS} pairs of tokens in a length of "
                f"{length} and a vocabulary of {materials.tokenizer.vocab_size}; raise the shortest length, "
                "or leave the probe out"
            )
        keys, values = tokens[:pairs], tokens[pairs : 2 * pairs]
        depths = [(index + random.random()) / pairs for index in range(pairs)]
        order = random.sample(range(pairs), pairs)
        answer: list[AnswerPart] = []
        for number, index in enumerate(order):
            asked = [*behind, keys[index], *between] if number else []
            text = materials.tokenizer.decode([values[index]])
            answer += [AnswerPart(asked), AnswerPart([values[index]], text, depths[index])]
        return lay_out(
            length,
            name=self.name,
            head=list(segments.begin),
            take=noise.take,
            needles=[
                Needle(at, [key, *between, value, *behind])
                for at, key, value in zip(depths, keys, values, strict=True)
            ],
            tail=[keys[order[0]], *between],
            answer=answer,
        )
