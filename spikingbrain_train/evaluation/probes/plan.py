"""Which probes are made, of which lengths, and how their answers are scored. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.registry import PROBES
from spikingbrain_train.evaluation.probes.sample import Probe, ProbeSample

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES, SEED = 10, 1234
_LENGTH = re.compile(r"(\d+)(k|m)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_LONGEST = 1 << 24


class Scoring(Enum):
    """How an answer counts as found."""

    likelihood = "likelihood"
    """Each of its tokens is the likeliest one behind the prompt and the right tokens before it."""
    generation = "generation"
    """The text that greedy decoding writes behind the prompt contains it."""
    both = "both"

    @property
    def scores(self) -> bool:
        """Whether likelihoods are asked for."""
        return self is not Scoring.generation

    @property
    def generates(self) -> bool:
        """Whether text is generated."""
        return self is not Scoring.likelihood


@dataclass(frozen=True)
class ProbePlan:
    """What is measured; see :meth:`of` for how users write it."""

    probes: tuple[Probe, ...]
    lengths: tuple[int, ...]
    """Tokens, ascending."""
    depths: tuple[float, ...] = DEPTHS
    """0 to 1, ascending."""
    samples: int = SAMPLES
    """Of each length and depth."""
    seed: int = SEED
    scoring: Scoring = Scoring.likelihood
    text: Path | None = None
    """What needles are hidden in; None takes Python's documentation topics."""

    @classmethod
    def of(
        cls,
        probes: str,
        lengths: str,
        *,
        depths: str = "",
        samples: int = SAMPLES,
        seed: int = SEED,
        scoring: str = Scoring.likelihood.value,
        text: Path | None = None,
        prefix: str = "--probe-",
    ) -> ProbePlan:
        """A plan as it is written on a command line and in a config.

        Args:
            probes: names with commas between them, or ``all``.
            lengths: tokens, ``1k,4k,128k``; a k is 1024.
            depths: percent, ``0,50,100``; empty takes 0, 25, 50, 75 and 100.
            samples: of each length and depth.
            seed: of all that is drawn.
            scoring: a :class:`Scoring`.
            text: file of the text in which needles are hidden; None takes Python's documentation topics.
            prefix: of the names of settings in sentences.

        Raises:
            ConfigurationError: a name or number that does not fit, named by its setting.
        """
        if samples < 1:
            raise ConfigurationError(f"{prefix}samples is {samples}; give at least 1")
        if scoring not in [each.value for each in Scoring]:
            raise ConfigurationError(
                f"{prefix}scoring is {scoring}; choose one of {', '.join(each.value for each in Scoring)}"
            )
        if text is not None and not text.is_file():
            raise ConfigurationError(f"{prefix}text {text} is not a file; name a text file")
        return cls(
            _probes(probes, "--probes" if prefix == "--probe-" else f"{prefix}probes"),
            tuple(
                sorted({_length(word, f"{prefix}lengths") for word in _words(lengths, f"{prefix}lengths")})
            ),
            _depths(depths, f"{prefix}depths") if depths else DEPTHS,
            samples,
            seed,
            Scoring(scoring),
            text,
        )

    def questions(self, probe: Probe, length: int, materials: Materials) -> Iterator[ProbeSample]:
        """All samples of a probe at a length, the same for the same seed whatever else is measured.

        Raises:
            ConfigurationError: so few tokens do not hold the question.
        """
        for depth in self.depths if probe.at_depths else (0.0,):
            for index in range(self.samples):
                random = Random(f"{self.seed}/{probe.name}/{length}/{depth:g}/{index}")
                yield probe.sample(length, depth, random, materials)

    def nearest_depth(self, depth: float) -> float:
        """Of the plan's depths."""
        return min(self.depths, key=lambda each: abs(each - depth))


def length_name(length: int) -> str:
    """Tokens in few characters, as they are asked for: 1024 is 1k, 1000 is 1000."""
    for name, unit in (("m", 1 << 20), ("k", 1 << 10)):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def _words(text: str, setting: str) -> Sequence[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigurationError(f"{setting} is empty; name one at least")
    return words


def _probes(text: str, setting: str) -> tuple[Probe, ...]:
    names = _words(text, setting)
    if names == ["all"]:
        return tuple(PROBES.values())
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise ConfigurationError(
            f"{setting} names {', '.join(unknown)}, which is no probe; choose among {', '.join(PROBES)}, "
            "or all"
        )
    return tuple(PROBES[name] for name in dict.fromkeys(names))


def _length(word: str, setting: str) -> int:
    match = _LENGTH.fullmatch(word)
    length = int(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0
    if not 0 < length <= _LONGEST:
        raise ConfigurationError(
            f"{setting} has {word}, which is no number of tokens; write 1k,4k,16k or 1000 (a k is 1024)"
        )
    return length


def _depths(text: str, setting: str) -> tuple[float, ...]:
    found = set()
    for word in _words(text, setting):
        try:
            percent = float(word.removesuffix("%"))
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise ConfigurationError(f"{setting} has {word}; give percent from 0 (the beginning) to 100")
        found.add(percent / 100)
    return tuple(sorted(found))
