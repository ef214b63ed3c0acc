"""Texts for which ``spikingbrain-bricks route`` has chosen adapters, as spikingbrain-evaluate measures them.

Each is read with every adapter that was chosen for any of them, and with none: what routing gives, and what
the best choice would have.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.measurement import Measurement, Part
from spikingbrain_train.evaluation.routed_prompts import routed_prompts
from spikingbrain_train.evaluation.score_batches import ScoreRequest
from spikingbrain_train.reporting.tables import table

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.language_model import LanguageModel


def routed_of(arguments: argparse.Namespace) -> RoutedTexts | None:
    """What ``--routed`` asks for, None without it.

    Raises:
        DataError: the file is none of ``route``, or has no prompts.
    """
    if arguments.routed is None:
        return None
    return RoutedTexts(arguments.routed, *routed_prompts(arguments.routed), arguments.seq_length)


@dataclass(frozen=True)
class _Losses:
    """Of some texts: predicted tokens, and nats of all of them together."""

    texts: int
    tokens: int
    chosen: float
    best: float
    without: float

    def as_json(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "cross_entropy": self.chosen / self.tokens,
            "cross_entropy_of_the_best": self.best / self.tokens,
            "cross_entropy_without_adapters": self.without / self.tokens,
        }


class RoutedTexts(Measurement):
    """The part ``routed`` of a report; behind it the model computes with no adapter.

    Args:
        path: of the choices.
        texts: that were routed.
        choices: the adapter of each.
        length: tokens of a text that are read at most.
    """

    def __init__(self, path: Path, texts: Sequence[str], choices: Sequence[str], length: int) -> None:
        self.path, self.texts, self.choices, self.length = path, texts, choices, length

    def measure(self, model: LanguageModel) -> Part:
        """Raises DataError: a text has too few tokens."""
        requests = [self._request(model, text) for text in self.texts]
        nats: dict[str | None, list[float]] = {}
        for choice in (*dict.fromkeys(self.choices), None):
            model.choose(choice)
            what = f"reading with {choice}" if choice is not None else "reading without adapters"
            nats[choice] = [-score.log_prob for score in model.score(requests, what=what)]
        tokens = [len(continuation) for _, continuation in requests]
        of_each = {name: self._losses(nats, tokens, name) for name in dict.fromkeys(self.choices)}
        whole = self._losses(nats, tokens, None)
        numbers = {
            "file": str(self.path),
            **whole.as_json(),
            "adapters": {name: losses.as_json() for name, losses in of_each.items()},
        }
        return Part("routed", numbers, "\n".join(_lines(self.path, of_each, whole)))

    def _request(self, model: LanguageModel, text: str) -> ScoreRequest:
        ids = model.tokenizer.encode(text)[: self.length]
        if len(ids) < 2:
            raise DataError(
                f"--routed {self.path} has the prompt {text!r}, of which no token can be predicted from one "
                "in front of it; give each at least two tokens"
            )
        return ScoreRequest(ids[:1], ids[1:])

    def _losses(
        self, nats: Mapping[str | None, Sequence[float]], tokens: Sequence[int], name: str | None
    ) -> _Losses:
        """Of the texts of one adapter; None: of all."""
        mine = [index for index, choice in enumerate(self.choices) if name in (None, choice)]
        return _Losses(
            texts=len(mine),
            tokens=sum(tokens[index] for index in mine),
            chosen=sum(nats[self.choices[index]][index] for index in mine),
            best=sum(min(each[index] for which, each in nats.items() if which is not None) for index in mine),
            without=sum(nats[None][index] for index in mine),
        )


def _lines(path: Path, of_each: Mapping[str, _Losses], whole: _Losses) -> list[str]:
    rows = [["nats per token", "texts", "tokens", "chosen", "best of them", "without"]]
    for name, losses in (*of_each.items(), ("all", whole)):
        means = (nats / losses.tokens for nats in (losses.chosen, losses.best, losses.without))
        rows.append([name, str(losses.texts), f"{losses.tokens:,}", *(f"{mean:.4f}" for mean in means)])
    return [f"routed by {path}, each text with its adapter", "", *table(rows, 1)]
