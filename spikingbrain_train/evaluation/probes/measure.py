"""Ask a model the questions of probes.

A text is read once, together with its right answer: that every token of it is the likeliest one behind those
before it is what greedy decoding would have written, and needs no decoding. So probes run under any topology,
context parallelism included, at the price of a forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spikingbrain_train.evaluation.language_model import LanguageModel, Score, ScoreRequest
from spikingbrain_train.evaluation.probes.haystacks import Text
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.plan import ProbePlan, length_name
from spikingbrain_train.evaluation.probes.result import Cell, LengthResult, ProbeResults
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

_ROOM_TO_WRITE = 32
"""Tokens beyond those of the answers that a generated text may have."""


class _OfModel:
    """A model's tokenizer as probes see it."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def materials_of(model: LanguageModel, plan: ProbePlan) -> Materials:
    """Tokenizer of the model, with the token that begins its texts if it has one, and text of the plan."""
    tokenizer = model.tokenizer
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if tokenizer.encode("a")[: len(begin)] != begin:
        begin = []
    text = None if plan.text is None else Text.read(plan.text)
    return Materials(_OfModel(tokenizer, model.vocab_size), begin, text)


def measure_probes(model: LanguageModel, plan: ProbePlan, *, warns: bool = True) -> ProbeResults:
    """All probes at all lengths; all ranks of the model call it together, and all get the result.

    Args:
        model: that is asked.
        plan: what.
        warns: of lengths beyond what the model declares, once; they are measured all the same.

    Raises:
        ConfigurationError: a length that does not hold a question, before anything is measured.
        DataError: the plan's text is none.
    """
    materials = materials_of(model, plan)
    for probe in plan.probes:
        next(plan.questions(probe, plan.lengths[0], materials))
    if warns:
        _warn_of_lengths(model, plan)
    results = ProbeResults(plan, model.max_length)
    for probe in plan.probes:
        results.found[probe.name] = {
            length: _measure(model, plan, probe, length, materials) for length in plan.lengths
        }
    results.text = materials.haystacks.text_read
    return results


def _warn_of_lengths(model: LanguageModel, plan: ProbePlan) -> None:
    beyond = [length_name(length) for length in plan.lengths if length > model.max_length]
    if beyond and model.is_main_process:
        print(
            f"warning: probes of {', '.join(beyond)} are longer than the {model.max_length:,} tokens that "
            "the model declares (max_position_embeddings); they show how it does beyond them",
            file=sys.stderr,
            flush=True,
        )


def _measure(
    model: LanguageModel, plan: ProbePlan, probe: Probe, length: int, materials: Materials
) -> LengthResult:
    samples = list(plan.questions(probe, length, materials))
    what = f"{probe.name} at {length_name(length)}"
    scored = plan.scoring.scores or not probe.is_written
    nothing = [None] * len(samples)
    scores = _score(model, samples, what) if scored else nothing
    texts = _generate(model, samples, what) if plan.scoring.generates and probe.is_written else nothing
    result = LengthResult()
    for sample, score, text in zip(samples, scores, texts, strict=True):
        for answer in sample.answers:
            cell = Cell(answers=1)
            if score is not None:
                cell.tokens = answer.stop - answer.start
                cell.found = int(all(score.greedy[answer.start : answer.stop]))
                cell.nats = -sum(score.log_probs[answer.start : answer.stop])
            if text is not None:
                cell.written = int(answer.text.lower() in text.lower())
            result.count(cell, None if answer.depth is None else plan.nearest_depth(answer.depth))
    return result


def _score(model: LanguageModel, samples: Sequence[ProbeSample], what: str) -> Sequence[Score | None]:
    requests = [ScoreRequest(sample.context, sample.continuation) for sample in samples]
    return model.score(requests, what=what)


def _generate(model: LanguageModel, samples: Sequence[ProbeSample], what: str) -> Sequence[str | None]:
    """Text behind each prompt, which is read once."""
    most = max(len(sample.continuation) for sample in samples) + _ROOM_TO_WRITE
    end = model.tokenizer.end_tokens
    prompts = [sample.context for sample in samples]
    written = model.generate(prompts, most, end_tokens=end, what=f"generating for {what}")
    return [model.tokenizer.decode(ids) for ids in written]
