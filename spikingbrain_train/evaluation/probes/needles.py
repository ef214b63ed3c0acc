"""Needles as RULER asks for them (arXiv 2404.06654): single ones, and one of several.

============== =============== ============================================
here           there           what is hidden in what
============== =============== ============================================
needle         niah_single_1   number in noise
needle_text    niah_single_2   number in a text
needle_uuid    niah_single_3   UUID in a text
multikey       niah_multikey_1 number beside three others, in a text
multikey_lines niah_multikey_2 number among nothing but others
multikey_uuid  niah_multikey_3 UUID named by a UUID, among nothing but others
============== =============== ============================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random

from spikingbrain_train.evaluation.probes.haystacks import Hay
from spikingbrain_train.evaluation.probes.layout import AnswerPart, Needle, lay_out
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.names import number, uuid, words
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

_DIGITS = 7


class Among(Enum):
    """What a needle is hidden in."""

    noise = "noise"
    text = "a text"
    needles = "other needles"


@dataclass(frozen=True)
class NeedleProbe(Probe):
    """One needle is asked for, at a depth of its own.

    Args:
        name: of the probe.
        title: in tables.
        among: what it is hidden in.
        others: needles with other keys beside it, at random depths.
        uuid_keys: keys are UUIDs, else words.
        uuid_values: values are UUIDs, else numbers of seven digits.
    """

    name: str
    title: str
    among: Among
    others: int = 0
    uuid_keys: bool = False
    uuid_values: bool = False

    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        segments, haystacks = materials.segments, materials.haystacks
        what, value = ("uuid", uuid(random)) if self.uuid_values else ("number", number(_DIGITS, random))
        head = segments.first(
            f"A special magic {what} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards.\n"
        )
        encode = self._encode_prose if self.among is Among.text else self._encode_line

        def needle(key: str, hidden: str) -> list[int]:
            return encode(materials, f"One of the special magic {what}s for {key} is: {hidden}.")

        keys = self._keys(random)
        asked = keys(1)[0]
        needles = [Needle(depth, needle(asked, value))]
        for key in keys(self.others):
            needles.append(Needle(random.random(), needle(key, self._value(random))))
        question = (
            f"What is the special magic {what} for {asked} mentioned in the provided text? "
            f"The special magic {what} for {asked} mentioned in the provided text is"
        )

        def take(tokens: int) -> Hay:
            if self.among is Among.noise:
                return haystacks.noise_lines.take(tokens)
            if self.among is Among.text:
                return haystacks.prose.take_from_anywhere(tokens, random)
            return self._take_needles(tokens, needle, keys, random)

        is_prose = self.among is Among.text
        return lay_out(
            length,
            name=self.name,
            head=head,
            take=take,
            needles=needles,
            tail=segments.inside(f"\n{question}") if is_prose else segments.line(question),
            answer=[AnswerPart(segments.inside(f" {value}"), value, depth)],
        )

    def _encode_prose(self, materials: Materials, text: str) -> list[int]:
        return materials.segments.inside(f" {text}")

    def _encode_line(self, materials: Materials, text: str) -> list[int]:
        return materials.segments.line(f"{text}\n")

    def _keys(self, random: Random) -> Callable[[int], list[str]]:
        """Gives so many keys that it has not given before."""
        given: set[str] = set()

        def more(count: int) -> list[str]:
            found: list[str] = []
            while len(found) < count:
                wanted = count - len(found)
                fresh = [uuid(random) for _ in range(wanted)] if self.uuid_keys else words(wanted, random)
                for key in fresh:
                    if key not in given:
                        given.add(key)
                        found.append(key)
            return found

        return more

    def _value(self, random: Random) -> str:
        return uuid(random) if self.uuid_values else number(_DIGITS, random)

    def _take_needles(
        self,
        tokens: int,
        needle: Callable[[str, str], list[int]],
        keys: Callable[[int], list[str]],
        random: Random,
    ) -> Hay:
        pieces: list[list[int]] = []
        while tokens >= len(piece := needle(keys(1)[0], self._value(random))):
            pieces.append(piece)
            tokens -= len(piece)
        return Hay(piece[len(piece) - tokens :], pieces)


NEEDLES = (
    NeedleProbe("needle", "needle: number in noise (RULER niah_single_1)", Among.noise),
    NeedleProbe("needle_text", "needle: number in a text (RULER niah_single_2)", Among.text),
    NeedleProbe("needle_uuid", "needle: UUID in a text (RULER niah_single_3)", Among.text, uuid_values=True),
    NeedleProbe("multikey", "multi-key: one of 4 numbers (RULER niah_multikey_1)", Among.text, others=3),
    NeedleProbe("multikey_lines", "multi-key: one line of many (RULER niah_multikey_2)", Among.needles),
    NeedleProbe(
        "multikey_uuid",
        "multi-key: one UUID of many (RULER niah_multikey_3)",
        Among.needles,
        uuid_keys=True,
        uuid_values=True,
    ),
)
