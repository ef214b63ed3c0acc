"""The one definition of "the same architecture": what two models must agree in to share weights.

Start-up checks, loading and resuming all read the role that stands beside every setting of a model
(config/setting.py): a new one has to decide what it is. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from spikingbrain_train.config.model import FeedForward, Mixer, ModelConfig, SpikingProjection
from spikingbrain_train.config.setting import Role, decisions, leaves
from spikingbrain_train.errors import CheckpointError

ROLES: dict[str, Role] = {
    name: decision.role for name, decision in decisions(ModelConfig()).items() if decision.role is not None
}
"""What every setting of a model decides, by its dotted name."""

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "vocab_size", "add_qkv_bias", "qk_layernorm", "share_embeddings_and_output_weights"),
)
"""What a dense source and a model converted from it agree in."""


def settings_in_use(model: ModelConfig) -> dict[str, Any]:
    """The settings that have a part in ``model``, by dotted name; lists are written out for every layer.

    Left out is what belongs to kinds of layers that the model does not have: a window without sliding-window
    layers, experts without mixtures of them, a rank without low-rank gates.
    """
    mixers, feed_forwards = model.layer_mixers(), model.layer_feed_forwards()
    found = leaves(model) | {
        "mixers": mixers,
        "feed_forwards": feed_forwards,
        "moe.moe_ffn_hidden_size": model.expert_ffn_hidden_size,
    }
    has_linear = any(mixer.has_linear_branch for mixer in mixers)
    has_gate = has_linear and model.gla.gate.has_parameters
    has_softmax = any(mixer.softmax_branch for mixer in mixers)
    has_scaling = has_softmax and model.rope_scaling.factor != 1
    present = {
        "ffn_hidden_size": FeedForward.dense in feed_forwards,
        "sliding_window": any(mixer.softmax_branch is Mixer.swa for mixer in mixers),
        "gla.gate_low_rank_dim": has_gate,
        "gla.gate_logit_normalizer": has_gate,
        "gla.init_gate_bias_min": has_gate,
        "gla.init_gate_bias_max": has_gate,
        "gla.init_gate_std": has_gate,
        "spiking.k": bool(model.spiking.projections),
        "spiking.gate_encoding": SpikingProjection.gate in model.spiking.projections,
        "rope_scaling.factor": has_softmax,
        "moe": FeedForward.moe in feed_forwards,
        "gla": has_linear,
        "parallel_hybrid": any(mixer.is_parallel_hybrid for mixer in mixers),
        "rotary_base": has_softmax,
        "rope_scaling": has_scaling,
    }
    return {
        name: value
        for name, value in found.items()
        if present.get(name, True)
        and (name == "rope_scaling.factor" or present.get(name.split(".")[0], True))
    }


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(shown(entry) for entry in value)}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _branches(mixer: Mixer) -> tuple[bool, bool]:
    """What decides the parameters of a mixer: full and sliding-window attention have the same."""
    return mixer.has_linear_branch, mixer.softmax_branch is not None


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

    Whatever :data:`ROLES` does not call weights may differ, and so may sliding and full windows.

    Args:
        stored: the model in a checkpoint.
        model: the model that is to take its weights.
        holder: how the sentence names the checkpoint: ``checkpoint.load=<folder>``.

    Raises:
        CheckpointError: names the first setting that differs, and both values.
    """
    theirs, ours = settings_in_use(stored), settings_in_use(model)
    per_layer = ("mixers", "feed_forwards")
    weights = [name for name, role in ROLES.items() if role is Role.weights and name not in per_layer]
    # The general sizes first: without the number of layers there is nothing to hold side by side.
    _compare(theirs, ours, holder, *(name for name in weights if name in _SIZES))
    for layer, (mixer, wanted) in enumerate(zip(theirs["mixers"], ours["mixers"], strict=True)):
        if _branches(mixer) != _branches(wanted):
            raise CheckpointError(
                f"{holder} has mixer {mixer.name} in layer {layer}, but model.mixers says {wanted.name}; "
                f"change mixers with tools/convert_checkpoint.py, or use model=from_checkpoint"
            )
    pairs = zip(theirs["feed_forwards"], ours["feed_forwards"], strict=True)
    for layer, (feed_forward, wanted_feed_forward) in enumerate(pairs):
        if feed_forward is not wanted_feed_forward:
            raise CheckpointError(
                f"{holder} has a feed-forward {feed_forward.name} in layer {layer}, but model.feed_forwards "
                f"says {wanted_feed_forward.name}; change feed-forwards with tools/convert_checkpoint.py, or "
                f"use model=from_checkpoint"
            )
    _compare(theirs, ours, holder, *(name for name in weights if name not in _SIZES))
