"""What the published SpikingBrain-7B classes want to find in a hybrid's export, and what they cannot hold.

They always have q/k/v biases, and the vLLM plugin also wants lm_head.weight of tied models. An export carries
both: a class that draws the biases it does not find computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.conversion.hf_names import GLA_SWA_NAMES
from spikingbrain_train.conversion.mapping import Parameter, model_parameters

QKV_BIASES = ("q_bias", "k_bias", "v_bias")
_GATE_RANK = 16
_GATE_NORMALIZER = 16.0


@dataclass(frozen=True)
class Completion:
    """A tensor of an export that holds nothing of its own."""

    name: str
    shape: Shape
    beside: Parameter
    """The parameter whose number format it has, and whose values where it is a copy."""
    is_copy: bool
    """Whether it repeats ``beside`` (the tied output layer); else it is zero (a bias)."""


def completions(model: ModelConfig) -> Iterator[Completion]:
    """Tensors that the published classes want beside those of ``model``, in the gla_swa format."""
    for parameter in model_parameters(model):
        roles = parameter.roles
        if roles == ("q_weight", "k_weight", "v_weight") and not model.add_qkv_bias:
            for role, shape in zip(QKV_BIASES, parameter.hf_shapes, strict=True):
                name = GLA_SWA_NAMES[role].format(layer=parameter.layer)
                yield Completion(name, shape[:1], parameter, is_copy=False)
        elif roles == ("embedding",) and model.share_embeddings_and_output_weights:
            yield Completion(GLA_SWA_NAMES["output"], parameter.hf_shapes[0], parameter, is_copy=True)


def published_class_lacks(model: ModelConfig) -> list[str]:
    """What of a hybrid the published modelling code does not compute, in words; empty if it computes all."""
    mixers = model.layer_mixers()
    softmax_layers = [layer for layer, mixer in enumerate(mixers) if mixer is not Mixer.gla]
    full_layers = [layer for layer, mixer in enumerate(mixers) if mixer is Mixer.full]
    published_layers = list(range(1, model.num_layers, 2))
    return [
        words
        for words, is_so in (
            (
                f"head_dim {model.kv_channels}",
                model.kv_channels * model.num_attention_heads != model.hidden_size,
            ),
            ("q/k norms", model.qk_layernorm),
            (f"softmax attention in layers {softmax_layers}", softmax_layers != published_layers),
            (f"full attention in layers {full_layers}", bool(full_layers)),
            ("Llama 3's rotary scaling", model.rope_scaling.factor != 1.0),
            (f"gate of rank {model.gla.gate_low_rank_dim}", model.gla.gate_low_rank_dim != _GATE_RANK),
            (
                f"gate normalizer of {model.gla.gate_logit_normalizer:g}",
                model.gla.gate_logit_normalizer != _GATE_NORMALIZER,
            ),
        )
        if is_so
    ]
