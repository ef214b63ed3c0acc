"""Mixtures of gated experts (SpikingBrain, arXiv 2509.05276, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, gcd
from typing import Any

from spikingbrain_train.architecture.feed_forwards import (
    ACTIVATION_SETTINGS,
    FEED_FORWARDS,
    Activations,
    FeedForwardKind,
    activation_settings,
    describe_activation,
    gated_weights,
)
from spikingbrain_train.architecture.initializers import Constant, Normal, OfRecipe
from spikingbrain_train.architecture.linear_transforms import freezes_base, keeps_its_input
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, rank_tokens
from spikingbrain_train.architecture.weights import Copies, Split, Weight
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.model import ActivationFunc, ModelConfig, RouterWeights
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.run import RunConfig

_DECAY = "moe.router_bias_decay_iters"


def expert_width(model: ModelConfig) -> int:
    """Intermediate channels of one expert."""
    return model.moe.moe_ffn_hidden_size or model.ffn_hidden_size


def active_channels(model: ModelConfig) -> int:
    """Intermediate channels of all experts that a token is sent to, shared ones included."""
    return (model.moe.router_topk + model.moe.num_shared_experts) * expert_width(model)


def _experts_of_a_token(model: ModelConfig) -> float:
    """Routed experts that compute for a token, with the padding up to their capacity."""
    moe = model.moe
    if moe.capacity_factor is None:
        return moe.router_topk
    return moe.router_topk * (moe.capacity_factor if moe.pad_to_capacity else min(1.0, moe.capacity_factor))


def _router_weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Every rank holds them whole."""
    moe, hidden = model.moe, model.moe.router_hidden_size
    common: dict[str, Any] = {"group": "router", "split": Split.none}
    reads = hidden or model.hidden_size
    last = OfRecipe("router")
    found = [Weight("router.weight", ("router",), ((moe.num_experts, reads),), init=last, **common)]
    if hidden is not None:
        first, shape = Normal(model.hidden_size**-0.5), (hidden, model.hidden_size)
        found.append(Weight("router.hidden_weight", ("router_hidden",), (shape,), init=first, **common))
    if moe.router_bias:
        zeros, shape_1 = Constant(0.0), (moe.num_experts,)
        found.append(
            Weight("router.bias", ("router_bias",), (shape_1,), init=zeros, is_trained=False, **common)
        )
    return tuple(found)


class MixtureOfExpertsKind(FeedForwardKind):
    """Softmax router, top-k of the routed experts, and shared experts that see all tokens."""

    name = "moe"
    words = "mixture-of-experts layers"
    spec = "spikingbrain_train.models.feed_forwards.moe.spec:spec"
    routes_tokens = True
    export_module = "spikingbrain_train.hf.moe_spikingbrain"
    tensor_names = {
        "router": "router.weight",
        "router_hidden": "router.hidden_weight",
        "router_bias": "router.bias",
    }
    hf_layers = {"qwen3_moe": "moe", "spikingbrain": "moe"}

    def check(self, model: ModelConfig) -> None:
        require(
            not model.add_mlp_bias,
            "model.feed_forwards has mixture-of-experts layers, but model.add_mlp_bias=true: experts have no "
            "biases; keep dense feed-forwards in every layer",
        )
        require(
            not model.ffn_sub_norm,
            "model.feed_forwards has mixture-of-experts layers, but model.ffn_sub_norm=true: experts have no "
            "norms; keep dense feed-forwards in every layer",
        )

        require(
            not model.moe.trained or not freezes_base(model),
            "model.moe.trained lists experts that train alone, and so do the adapters of the model; set it "
            "to [], or merge the adapters first with spikingbrain-bricks merge",
        )

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        tensor, experts = parallel.tensor_model_parallel_size, model.moe.num_experts
        require(
            tensor == 1 or parallel.sequence_parallel,
            f"model.feed_forwards has mixture-of-experts layers, whose tokens are split over the "
            f"parallel.tensor_model_parallel_size={tensor} ranks; set parallel.sequence_parallel=true, or "
            f"the tensor degree to 1",
        )
        require(
            experts % parallel.expert_model_parallel_size == 0,
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} does not divide "
            f"model.moe.num_experts={experts}; valid are {either(divisors(experts))}",
        )
        require(
            parallel.replicate_expert_load is None or not model.moe.pad_to_capacity,
            f"parallel.replicate_expert_load={parallel.replicate_expert_load} evens out what experts get, "
            f"but model.moe.pad_to_capacity=true gives all of them as much; set one of them back",
        )
        require(
            parallel.replicate_expert_load is None or not model.moe.trained,
            f"parallel.replicate_expert_load={parallel.replicate_expert_load} copies experts to ranks whose "
            f"own stay as they are under model.moe.trained; set the former to null, or the latter to []",
        )
        width, expert_tensor = expert_width(model), parallel.expert_tensor_size
        name = "ffn_hidden_size" if model.moe.moe_ffn_hidden_size is None else "moe.moe_ffn_hidden_size"
        require(
            width % expert_tensor == 0,
            f"parallel.expert_tensor_parallel_size={expert_tensor} does not divide model.{name}={width}, "
            f"the width of an expert; valid are {either(divisors(width))}",
        )
        shared_width = model.moe.num_shared_experts * width
        require(
            shared_width % tensor == 0,
            f"parallel.tensor_model_parallel_size={tensor} does not divide the width of the shared experts, "
            f"model.moe.num_shared_experts={model.moe.num_shared_experts} x model.{name}={width}; "
            f"valid are {either(divisors(gcd(shared_width, model.num_query_groups)))}",
        )

    def check_source(self, model: ModelConfig) -> None:
        width = model.ffn_hidden_size
        require(
            expert_width(model) == width,
            f"moe.moe_ffn_hidden_size={model.moe.moe_ffn_hidden_size} differs from the source's feed-forward "
            f"of {width}, of which every expert is a copy; set it to {width} or null",
        )

    def all_settings(self, model: ModelConfig) -> set[str]:
        return {f"moe.{name}" for name in vars(model.moe)} | ACTIVATION_SETTINGS

    def settings(self, model: ModelConfig) -> set[str]:
        unread = ACTIVATION_SETTINGS if model.moe.router_bias else ACTIVATION_SETTINGS | {_DECAY}
        return self.all_settings(model) - unread | activation_settings(model)

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        return {"moe.moe_ffn_hidden_size": expert_width(model)}

    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """Router (E h), routed experts (E times 3 f h), shared experts as one feed-forward.

        A router with a hidden layer of r channels has r h and E r, one with biases E more.
        """
        moe, width = model.moe, expert_width(model)
        weights = {
            RouterWeights.softmax: 1.0 if moe.norm_topk_prob else moe.router_topk / moe.num_experts,
            RouterWeights.ones: float(moe.router_topk),
        }
        of_routed = entry_of(moe.router_weights, weights, "the weights of experts")
        outputs = moe.num_shared_experts + of_routed
        routers = _router_weights(model)
        routed = tuple(
            replace(
                weight.below("experts.experts."),
                group="routed experts",
                split=Split.experts,
                active=(moe.router_topk, moe.num_experts),
                copies=Copies(moe.num_experts, routed=True, channel_axis=axis, outputs=outputs),
            )
            for axis, weight in enumerate(gated_weights(model, width))
        )
        shared = tuple(
            replace(
                weight.below("shared_experts."),
                group="shared experts",
                copies=Copies(moe.num_shared_experts, routed=False, channel_axis=axis, outputs=outputs),
            )
            for axis, weight in enumerate(gated_weights(model, width))
        )
        return (*routers, *routed, *(shared if moe.num_shared_experts else ()))

    def activations(self, config: RunConfig) -> Activations:
        """Experts are taken to be evenly loaded."""
        model, parallel = config.model, config.parallel
        tensor, element = parallel.tensor_model_parallel_size, bytes_per_element(config.precision)
        moe, width = model.moe, expert_width(model)
        experts_of_a_token = _experts_of_a_token(model)
        # Tensor-parallel ranks route a share of the tokens each; the experts' tensor ranks gather them.
        # Logits, probabilities and their choice, and what a hidden layer gives.
        router = (3 * moe.num_experts + (moe.router_hidden_size or 0)) * FP32 / tensor
        row = model.hidden_size * element / tensor
        dispatched = experts_of_a_token * row * parallel.expert_tensor_size  # what the experts read
        routed = experts_of_a_token * width * element / tensor
        activation = routed + moe.num_shared_experts * width * element / tensor
        matrices = 2 * activation  # gate and up
        encoded = 0.0
        if moe.num_shared_experts and keeps_its_input(model, "mlp_fc1"):
            encoded = row if parallel.sequence_parallel else row * tensor  # what the shared expert reads
        # Weights of tokens are part of a fused SwiGLU; elsewhere they multiply what is kept for that.
        weighted = 0.0 if model.activation_func is ActivationFunc.silu else routed
        everything = router + dispatched + activation + weighted + matrices + encoded
        has_copy = keeps_its_input(model, "mlp_fc2")  # what fc2 keeps is not the activation
        levels = {
            Recompute.none: 0.0,
            Recompute.full: 0.0,  # with the whole layer
            Recompute.moe_activation: router + weighted + (0.0 if has_copy else activation),
            Recompute.moe_feed_forward: router + activation + weighted + matrices + encoded,
            Recompute.moe_layer: everything,
        }
        recomputed = entry_of(parallel.recompute, levels, "the activations of experts")
        if self._experts_are_busy(config):  # gate, up and product, of which a level frees some anyway
            first_level = parallel.recompute is Recompute.moe_activation
            recomputed += 3 * routed + weighted
            recomputed -= weighted + (0.0 if has_copy else routed) if first_level else 0.0
        return Activations(everything - recomputed, recomputed)

    def computes_again(self, config: RunConfig, weight: Weight) -> bool:
        is_routed = weight.copies is not None and weight.copies.routed
        return super().computes_again(config, weight) or (is_routed and self._experts_are_busy(config))

    def _experts_are_busy(self, config: RunConfig) -> bool:
        """Whether evenly loaded experts have more tokens than those that keep their activations."""
        most, parallel = config.parallel.most_expert_tokens, config.parallel
        ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
        sent = rank_tokens(config) / parallel.tensor_model_parallel_size * ranks
        of_an_expert = sent * _experts_of_a_token(config.model) / config.model.moe.num_experts
        return most is not None and of_an_expert > most

    def most_kept_by_experts(self, config: RunConfig) -> float | None:
        model, most = config.model, config.parallel.most_expert_tokens
        if most is None:
            return None
        # Gate, up and product, the latter also weighted where no fused SwiGLU does that.
        tensors = 3 if model.activation_func is ActivationFunc.silu else 4
        channels = expert_width(model) / config.parallel.expert_tensor_size
        experts = model.moe.num_experts // config.parallel.expert_model_parallel_size
        return experts * most * tensors * channels * bytes_per_element(config.precision)

    def copies_of_experts(self, config: RunConfig) -> tuple[int, float] | None:
        model, load = config.model, config.parallel.replicate_expert_load
        if load is None:
            return None
        # Each of them gets more than `load` times the mean, and all of them no more than all tokens.
        most = ceil(model.moe.num_experts / load) - 1
        return most, 3 * model.hidden_size * expert_width(model) * bytes_per_element(config.precision)

    def working(self, config: RunConfig) -> float:
        """As a dense one, of routed and shared experts; evenly loaded, and all at once."""
        model, tensor = config.model, config.parallel.tensor_model_parallel_size
        experts = _experts_of_a_token(model) + model.moe.num_shared_experts
        return 2 * experts * expert_width(model) * bytes_per_element(config.precision) / tensor

    def dispatched_bytes(self, config: RunConfig) -> float:
        """A hidden state for each expert that the token is sent to, or that has room for it.

        Tensor-parallel ranks route a share of the tokens each.
        """
        row = config.model.hidden_size * bytes_per_element(config.precision)
        return _experts_of_a_token(config.model) * row / config.parallel.tensor_model_parallel_size

    def megatron_settings(
        self, model: ModelConfig, parallel: ParallelConfig, layers: Sequence[bool]
    ) -> dict[str, Any]:
        moe, width = model.moe, expert_width(model)
        return {
            "num_moe_experts": moe.num_experts,
            "moe_layer_freq": [int(has) for has in layers],
            "moe_ffn_hidden_size": width,
            "moe_shared_expert_intermediate_size": moe.num_shared_experts * width or None,
            "moe_router_topk": moe.router_topk,
            "norm_topk_prob": moe.norm_topk_prob,
            "router_weights": moe.router_weights,
            "router_hidden_size": moe.router_hidden_size,
            "router_bias": moe.router_bias,
            "router_bias_decay_iters": moe.router_bias_decay_iters,
            "moe_router_pre_softmax": True,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": moe.aux_loss_coeff,
            "moe_z_loss_coeff": moe.z_loss_coeff,
            "moe_expert_capacity_factor": moe.capacity_factor,
            "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        }

    def without_dropping(self, model: ModelConfig) -> ModelConfig:
        return replace(model, moe=replace(model.moe, capacity_factor=None, pad_to_capacity=False))

    def num_experts(self, model: ModelConfig) -> int:
        return model.moe.num_experts

    def trained_experts(self, model: ModelConfig) -> tuple[int, ...]:
        return tuple(sorted(model.moe.trained))

    def drops_tokens(self, model: ModelConfig) -> bool:
        return model.moe.capacity_factor is not None

    def describe(self, model: ModelConfig) -> str | None:
        moe, activation = model.moe, describe_activation(model)
        return (
            f"{moe.num_experts} experts, top-{moe.router_topk}, + {moe.num_shared_experts} shared of width "
            f"{expert_width(model)}" + (f", {activation}" if activation else "")
        )


MOE = FEED_FORWARDS.register(MixtureOfExpertsKind())
