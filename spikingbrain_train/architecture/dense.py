"""The dense feed-forward of Qwen and Llama models: a SwiGLU, or gated by another activation."""

from __future__ import annotations

from spikingbrain_train.architecture.feed_forwards import (
    ACTIVATION_SETTINGS,
    FEED_FORWARDS,
    Activations,
    FeedForwardKind,
    activation_settings,
    describe_activation,
    gated_weights,
)
from spikingbrain_train.architecture.initializers import NearestSubNorm
from spikingbrain_train.architecture.sizes import bytes_per_element
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import RunConfig


class DenseKind(FeedForwardKind):
    """``down(act(gate x) * (up x))`` of ``model.ffn_hidden_size`` channels."""

    name = "dense"
    spec = "spikingbrain_train.models.feed_forwards.dense:spec"
    is_of_the_source = True
    export_module = "spikingbrain_train.hf.mlp_spikingbrain"
    hf_layers = dict.fromkeys(("llama", "qwen3_moe", "gla_swa", "spikingbrain"), "mlp")

    def all_settings(self, model: ModelConfig) -> set[str]:
        return {"ffn_hidden_size", *ACTIVATION_SETTINGS}

    def settings(self, model: ModelConfig) -> set[str]:
        return {"ffn_hidden_size", *activation_settings(model)}

    def describe(self, model: ModelConfig) -> str | None:
        return describe_activation(model)

    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        width = model.ffn_hidden_size
        into, out = gated_weights(model, width)
        norm = Weight(
            "linear_fc2.sub_norm.weight", ("ffn_sub_norm",), ((width,),), "norms", init=NearestSubNorm()
        )
        norms = (norm,) if model.ffn_sub_norm else ()
        if not model.add_mlp_bias:
            return (into, *norms, out)
        biases = ("mlp_gate_bias", "mlp_up_bias")
        return (
            into,
            Weight("linear_fc1.bias", biases, ((width,),) * 2, "feed-forward"),
            *norms,
            out,
            Weight(
                "linear_fc2.bias", ("mlp_down_bias",), ((model.hidden_size,),), "feed-forward", Split.none
            ),
        )

    def activations(self, config: RunConfig) -> Activations:
        """Gate, up and their product, also normed where it is."""
        element, tensor = bytes_per_element(config.precision), config.parallel.tensor_model_parallel_size
        tensors = 3 + config.model.ffn_sub_norm
        kept = tensors * config.model.ffn_hidden_size * element / tensor
        again = config.parallel.recompute in (Recompute.moe_feed_forward, Recompute.moe_layer)
        return Activations(0.0, kept) if again else Activations(kept)

    def working(self, config: RunConfig) -> float:
        """Gradients of gate, up and their product, where the product itself is no longer needed."""
        element, tensor = bytes_per_element(config.precision), config.parallel.tensor_model_parallel_size
        done_with = 1 + config.model.ffn_sub_norm
        return (3 - done_with) * config.model.ffn_hidden_size * element / tensor


DENSE = FEED_FORWARDS.register(DenseKind())
