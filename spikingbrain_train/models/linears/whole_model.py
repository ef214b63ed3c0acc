"""The transforms of all linears of a model: what their schedules set, and what is counted of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from spikingbrain_train.architecture.linear_transforms import LinearTransformKind, transforms_of
from spikingbrain_train.config.import_path import object_of_kind
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.linear_transform import (
    HasTransforms,
    LinearTransform,
    TransformStatistics,
)


def transforms_in(module: torch.nn.Module, name: str) -> list[LinearTransform]:
    """The transforms of one kind in a module, one for each linear (or mixer's queries) that it is applied to.

    Args:
        module: this rank's part of a model, or of a layer.
        name: of the kind.
    """
    owners = [each for each in module.modules() if isinstance(each, HasTransforms)]
    return [each.transforms[name] for each in owners if name in each.transforms]


def transform_class(kind: LinearTransformKind) -> type[LinearTransform]:
    """What transforms the linears of a kind. Raises ConfigurationError where it cannot be imported."""
    return object_of_kind(kind.transform, f"linear transform {kind.name}")


def set_attributes(module: torch.nn.Module, name: str, values: Mapping[str, Any]) -> None:
    """Set what a kind's schedule, or a choice among its parts, says on all its transforms in a module."""
    for transform in transforms_in(module, name):
        for attribute, value in values.items():
            assert hasattr(transform, attribute), f"{name} has no {attribute} to be set"
            setattr(transform, attribute, value)


def choose(module: torch.nn.Module, model: ModelConfig, choice: str | None) -> None:
    """Compute from here on with one of the adapters that stand beside the weights, the others off.

    Args:
        module: this rank's part of the model.
        model: the network.
        choice: by name; None switches all of them off.
    """
    for kind in transforms_of(model):
        if choice is None or choice in kind.choices(model):
            set_attributes(module, kind.name, kind.choosing(model, choice))


@contextmanager
def collect_statistics(
    module: torch.nn.Module, model: ModelConfig, device: torch.device, tokens: int | None = None
) -> Iterator[dict[str, list[TransformStatistics]]]:
    """Count what all transforms do while the context lasts.

    Every rank counts its part, and has statistics of the same kinds and layers: sum ``counts`` over all ranks
    for the whole model's.

    Args:
        module: this rank's part of a model.
        model: the network.
        device: where counts are kept.
        tokens: that each linear counts of this rank's next input, spread over it, where its transform can
            count few; None counts everything.

    Returns:
        Statistics of each layer of the whole decoder by the name of their kind, of the kinds that count
        something.
    """
    found: dict[str, list[TransformStatistics]] = {}
    here = [each for each in module.modules() if isinstance(each, TransformerLayer)]
    try:
        for kind in transforms_of(model):
            if tokens is not None and not transform_class(kind).counts_few_tokens:
                continue
            counting = [transform_class(kind).new_statistics(device) for _ in range(model.num_layers)]
            statistics = [each for each in counting if each is not None]
            if not statistics:
                continue
            found[kind.name] = statistics
            for layer in here:
                for transform in transforms_in(layer, kind.name):
                    transform.statistics = statistics[layer.layer_number - 1]
                    transform.tokens_to_count = tokens
        yield found
    finally:
        for name in found:
            for transform in transforms_in(module, name):
                transform.statistics = None
                transform.tokens_to_count = None
