"""What trains in a stage that trains a whole model: all of it, adapters alone, or some experts alone."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, freezes_base, trains
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig


def trained_experts(model: ModelConfig) -> tuple[int, ...]:
    """Experts, by their number in every layer, beside which nothing trains; none where more than these do."""
    found = {number for kind in feed_forwards_of(model) for number in kind.trained_experts(model)}
    return tuple(sorted(found))


def trains_in_part(model: ModelConfig) -> bool:
    """Whether most of a model is frozen."""
    return freezes_base(model) or bool(trained_experts(model))


def what_trains(model: ModelConfig) -> str:
    """In words, at the beginning of a sentence in the plural."""
    if experts := trained_experts(model):
        return f"experts {', '.join(map(str, experts))} of every layer that has experts"
    alone = [kind.name for kind in LINEAR_TRANSFORMS if kind.freezes_base(model)]
    return f"the weights of model.{alone[0]}" if alone else "all parameters"


def share_trained(model: ModelConfig, weight: Weight) -> float:
    """Share of a weight's elements, over all ranks, that train: 0, 1, or that of some experts.

    Args:
        model: the network.
        weight: of a layer, by its description.
    """
    experts = trained_experts(model)
    if not experts:
        return float(trains(model, weight.name))
    is_routed = weight.copies is not None and weight.copies.routed
    return len(experts) / weight.shape[0] if is_routed else 0.0
