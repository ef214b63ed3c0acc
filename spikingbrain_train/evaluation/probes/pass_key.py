"""The pass key (Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300): a number in noise."""

from __future__ import annotations

from random import Random

from spikingbrain_train.evaluation.probes.layout import AnswerPart, Needle, lay_out
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.names import number
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_DIGITS = 5


class PassKey(Probe):
    """Five digits, said twice in one place of the noise."""

    name = "passkey"
    title = "pass key: 5 digits in noise"

    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        segments, key = materials.segments, number(_DIGITS, random)
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        return lay_out(
            length,
            name=self.name,
            head=segments.first(_HEAD),
            take=materials.haystacks.noise.take,
            needles=[Needle(depth, segments.inside(needle))],
            tail=segments.inside("\nWhat is the pass key? The pass key is"),
            answer=[AnswerPart(segments.inside(f" {key}"), key, depth)],
        )
