"""The layers of the model, equal ones in one row."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from spikingbrain_train.architecture.layers import Layer, layers
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.reporting.tables import packed, spans, table

Key = TypeVar("Key", bound=Hashable)

_WIDEST_SPANS = 40


def alike(keys: Iterable[Key], numbers: Iterable[int] | None = None) -> dict[Key, list[int]]:
    """Which layers are the same: what they are -> their ``numbers``, by default from 0 on."""
    found: dict[Key, list[int]] = {}
    for number, key in zip(itertools.count() if numbers is None else numbers, keys, strict=False):
        found.setdefault(key, []).append(number)
    return found


def layer_rows(layer_numbers: Sequence[int], cells: Sequence[str]) -> list[list[str]]:
    """Rows of a table for layers that are the same: their numbers, how many, and ``cells``.

    Numbers that follow no pattern go on in rows of their own.
    """
    lines = packed(spans(layer_numbers).split(", "), ", ", _WIDEST_SPANS)
    rows = [[lines[0], str(len(layer_numbers)), *cells]]
    return rows + [[line, "", *[""] * len(cells)] for line in lines[1:]]


def layers_section(plan: Plan) -> Section:
    """The layers, with the parameters of the whole model."""
    model = plan.config.model
    groups = [(numbers, layer, *_parameters(plan, layer)) for layer, numbers in alike(layers(model)).items()]
    values = [
        {
            "layers": numbers,
            "mixer": layer.mixer_name,
            "feed_forward": layer.feed_forward.name,
            "mixer_parameters": mixer,
            "feed_forward_parameters": feed_forward,
            "parameters": whole,
        }
        for numbers, layer, mixer, feed_forward, whole in groups
    ]

    def text(width: int) -> list[str]:
        rows = [["layers", "number", "mixer", "feed-forward", "of mixer", "of feed-forward", "in all"]]
        for numbers, layer, *parameters in groups:
            cells = [layer.mixer_name, layer.feed_forward.name, *map(quantity, parameters)]
            rows += layer_rows(numbers, cells)
        return ["parameters of the model's layers (each; counted from 0)", *table(rows, left=4)]

    return Section("layers", values, text)


def _parameters(plan: Plan, layer: Layer) -> tuple[int, int, int]:
    model = plan.config.model
    return (
        sum(weight.numel for weight in layer.mixer_weights(model)),
        sum(weight.numel for weight in layer.feed_forward_weights(model)),
        sum(weight.numel for weight in layer.weights(model)),
    )
