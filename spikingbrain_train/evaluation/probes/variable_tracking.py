"""Variable tracking as RULER asks for it (arXiv 2404.06654): assignments to follow through noise."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from spikingbrain_train.evaluation.probes.haystacks import NOISE
from spikingbrain_train.evaluation.probes.layout import AnswerPart, Needle, lay_out
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.names import variables
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_HOPS, _DIGITS = 4, 5
_LETTERS, _LETTERS_OF_EXAMPLE = 5, 3


class VariableTracking(Probe):
    """One chain of four hops: five variables hold the value that is asked about.

    An example with shorter names and little noise precedes the question, as there.
    """

    name = "variable_tracking"
    title = "variable tracking: a chain of 4 hops (RULER vt)"
    at_depths = False

    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        segments = materials.segments
        chain = variables(_HOPS + 1, _LETTERS, random)
        value, value_of_example = random.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), 2)
        depths = sorted(random.random() for _ in chain)
        example = _example(variables(_HOPS + 1, _LETTERS_OF_EXAMPLE, random), str(value_of_example))
        answer = [AnswerPart(segments.inside(f" {chain[0]}"), chain[0])]
        for variable in chain[1:]:
            answer += [
                AnswerPart(segments.inside(",")),
                AnswerPart(segments.inside(f" {variable}"), variable),
            ]
        return lay_out(
            length,
            name=self.name,
            head=segments.first(example + _TASK),
            take=materials.haystacks.noise_lines.take,
            needles=[
                Needle(at, segments.line(f"{line}\n"))
                for at, line in zip(depths, _assignments(chain, str(value)), strict=True)
            ],
            tail=segments.line(_question(str(value), len(chain))),
            answer=answer,
        )


def _assignments(chain: Sequence[str], value: str) -> list[str]:
    later = [f"VAR {name} = VAR {before}" for before, name in zip(chain, chain[1:], strict=False)]
    return [f"VAR {chain[0]} = {value}", *later]


def _question(value: str, count: int) -> str:
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: "
        "According to the chain(s) of variable assignment in the text above, "
        f"{count} variables are assigned the value {value}, they are:"
    )


def _example(chain: Sequence[str], value: str) -> str:
    noise = " ".join(NOISE)
    lines = [line for assignment in _assignments(chain, value) for line in (noise, assignment)]
    return _TASK + "\n".join(lines) + f"\n{_question(value, len(chain))} {', '.join(chain)}\n\n"
