"""The one definition of "the same architecture": what two models must agree in to share weights.

Start-up checks, loading and resuming all read the role that stands beside every setting of a model
(config/setting.py): a new one has to decide what it is. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import feed_forwards_of, layers, mixers_of
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, starting_from
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.config.setting import Role, decisions, leaves
from spikingbrain_train.config.shown import shown
from spikingbrain_train.errors import CheckpointError


def roles() -> dict[str, Role]:
    """What every setting of a model decides, by its dotted name; plugins' settings included."""
    found = decisions(with_sections(ModelConfig)())
    return {name: decision.role for name, decision in found.items() if decision.role is not None}


_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "vocab_size", "add_qkv_bias", "add_output_bias", "add_mlp_bias"),
    *("qk_layernorm", "attn_sub_norm", "ffn_sub_norm", "share_embeddings_and_output_weights"),
)
"""What a dense source and a model converted from it agree in."""


def settings_in_use(model: ModelConfig) -> dict[str, Any]:
    """The settings that have a part in ``model``, by dotted name; lists are written out for every layer.

    Left out is what belongs to kinds of layers that the model does not have: a window without sliding-window
    layers, experts without mixtures of them, a rank without low-rank gates.
    """
    found = leaves(model) | {
        "mixers": [layer.mixer_name for layer in layers(model)],
        "feed_forwards": [layer.feed_forward.name for layer in layers(model)],
    }
    for kind in (*MIXERS, *FEED_FORWARDS):
        found |= kind.values_of_nulls(model)
    of_kinds: set[str] = set().union(
        *(mixer.all_settings(model) for mixer in MIXERS),
        *(feed_forward.all_settings(model) for feed_forward in FEED_FORWARDS),
        *(transform.all_settings(model) for transform in LINEAR_TRANSFORMS),
    )
    in_use: set[str] = set().union(
        *(mixer.settings(model) for mixer in mixers_of(model)),
        *(feed_forward.settings(model) for feed_forward in feed_forwards_of(model)),
        *(transform.settings(model) for transform in LINEAR_TRANSFORMS),
    )
    return {
        name: value
        for name, value in found.items()
        if (name in in_use or name not in of_kinds) and _of_the_model(name, model)
    }


def _of_the_model(name: str, model: ModelConfig) -> bool:
    """Whether a setting that is of no kind has a part in ``model``."""
    if name.startswith("parallel_hybrid."):
        return any(len(layer.mixers) > 1 for layer in layers(model))
    return True


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any], holder: str, *names: str) -> None:
    for name in names:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise CheckpointError(
                f"{holder} holds a model with {name}={shown(theirs[name])}, but "
                f"model.{name}={shown(ours[name])}; use model=from_checkpoint, or name a checkpoint of this "
                f"architecture"
            )


def check_same_sizes(stored: ModelConfig, model: ModelConfig, holder: str) -> None:
    """The sizes that conversion leaves alone are the same: one model can be the dense source of the other.

    Args:
        stored: the model in a checkpoint.
        model: the model of this run.
        holder: how the sentence names the checkpoint: ``stage.teacher=<folder>``.

    Raises:
        CheckpointError: names the first setting that differs, and both values.
    """
    _compare(leaves(stored), leaves(model), holder, *_SIZES)


def check_same_weights(stored: ModelConfig, model: ModelConfig, holder: str) -> None:
    """The weights of ``stored`` are those of ``model``: the same parameters in the same shapes.

    Whatever :func:`roles` does not call weights may differ, and so may sliding and full windows; what begins
    anew beside them (adapters that ``stored`` has not) is no part of either.

    Args:
        stored: the model in a checkpoint.
        model: the model that is to take its weights.
        holder: how the sentence names the checkpoint: ``checkpoint.load=<folder>``.

    Raises:
        CheckpointError: names the first setting that differs, and both values.
    """
    model = starting_from(model, stored)
    theirs, ours = settings_in_use(stored), settings_in_use(model)
    per_layer = ("mixers", "feed_forwards")
    weights = [name for name, role in roles().items() if role is Role.weights and name not in per_layer]
    # The general sizes first: without the number of layers there is nothing to hold side by side.
    _compare(theirs, ours, holder, *(name for name in weights if name in _SIZES))
    for number, (layer, wanted) in enumerate(zip(layers(stored), layers(model), strict=True)):
        if layer.families != wanted.families:
            raise CheckpointError(
                f"{holder} has mixer {layer.mixer_name} in layer {number}, but model.mixers says "
                f"{wanted.mixer_name}; change mixers with spikingbrain-convert, or use "
                f"model=from_checkpoint"
            )
    for number, (layer, wanted) in enumerate(zip(layers(stored), layers(model), strict=True)):
        if layer.feed_forward is not wanted.feed_forward:
            raise CheckpointError(
                f"{holder} has a feed-forward {layer.feed_forward.name} in layer {number}, but "
                f"model.feed_forwards says {wanted.feed_forward.name}; change feed-forwards with "
                f"spikingbrain-convert, or use model=from_checkpoint"
            )
    _compare(theirs, ours, holder, *(name for name in weights if name not in _SIZES))
