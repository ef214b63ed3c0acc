"""What a layer is made of: one megatron-core ModuleSpec per layer.

To add a mixer, write its op and its module and add one line to ``SELF_ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import (
    FeedForward,
    GateEncoding,
    Mixer,
    ModelConfig,
    SpikingProjection,
)
from spikingbrain_train.config.parallel import ContextParallelConfig, KernelConfig
from spikingbrain_train.models.feed_forward import feed_forward_spec
from spikingbrain_train.models.mixers.gated_linear_attention import (
    GatedLinearAttention,
    LowRankDownProjection,
)
from spikingbrain_train.models.mixers.parallel_hybrid import ParallelHybrid, ParallelHybridSubmodules
from spikingbrain_train.models.mixers.softmax_attention import SoftmaxAttention
from spikingbrain_train.models.parallel_linears import ParallelLinears
from spikingbrain_train.models.rms_norm import RMSNorm


@dataclass(frozen=True)
class MixerBuild:
    """What the spec of a mixer is made from."""

    model: ModelConfig
    kernels: KernelConfig
    context_parallel: ContextParallelConfig
    linears: ParallelLinears


def _attention_submodules(build: MixerBuild) -> SelfAttentionSubmodules:
    qk_norm = RMSNorm if build.model.qk_layernorm else IdentityOp
    return SelfAttentionSubmodules(
        linear_qkv=build.linears.column(SpikingProjection.qkv),
        core_attention=IdentityOp,  # our mixers compute what is between the projections themselves
        linear_proj=build.linears.row(SpikingProjection.attention_output),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )


def _softmax_attention(build: MixerBuild, window: int | None) -> ModuleSpec:
    return ModuleSpec(
        module=SoftmaxAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "window": window,
            "backend": build.kernels.softmax_attention,
            "context_parallel": build.context_parallel.sliding_window_attention,
        },
        submodules=_attention_submodules(build),
    )


def _full(build: MixerBuild) -> ModuleSpec:
    return _softmax_attention(build, window=None)


def _swa(build: MixerBuild) -> ModuleSpec:
    return _softmax_attention(build, window=build.model.sliding_window)


def _gate_projections(build: MixerBuild) -> dict[str, type]:
    """Classes of W1 and W2 of the low-rank gate. Encoded once, W2 reads what W1 made of spikes."""
    up: type = ColumnParallelLinear
    if build.model.spiking.gate_encoding is GateEncoding.each_matrix:
        up = build.linears.encoded(SpikingProjection.gate, up)
    down = build.linears.encoded(SpikingProjection.gate, LowRankDownProjection)
    return {"gate_down_proj": down, "gate_up_proj": up}


def _gla(build: MixerBuild) -> ModuleSpec:
    return ModuleSpec(
        module=GatedLinearAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "gla": build.model.gla,
            "backend": build.kernels.gated_linear_attention,
            "context_parallel": build.context_parallel.gated_linear_attention,
            **_gate_projections(build),
        },
        submodules=_attention_submodules(build),
    )


def _parallel_hybrid(build: MixerBuild, softmax_branch: Callable[[MixerBuild], ModuleSpec]) -> ModuleSpec:
    return ModuleSpec(
        module=ParallelHybrid,
        params={"parallel_hybrid": build.model.parallel_hybrid},
        submodules=ParallelHybridSubmodules(
            softmax_attention=softmax_branch(build), linear_attention=_gla(build)
        ),
    )


SELF_ATTENTION: dict[Mixer, Callable[[MixerBuild], ModuleSpec]] = {
    Mixer.full: _full,
    Mixer.swa: _swa,
    Mixer.gla: _gla,
    Mixer.gla_swa: partial(_parallel_hybrid, softmax_branch=_swa),
    Mixer.gla_full: partial(_parallel_hybrid, softmax_branch=_full),
}
"""The registry of mixers: what stands in for ``self_attention`` in a layer of each kind."""


def layer_spec(
    mixer: Mixer,
    model: ModelConfig,
    kernels: KernelConfig,
    context_parallel: ContextParallelConfig | None = None,
    *,
    feed_forward: FeedForward = FeedForward.dense,
) -> ModuleSpec:
    """One decoder layer: norm, mixer, residual, norm, feed-forward, residual.

    Args:
        mixer: the layer's sequence mixer.
        model: architecture of the whole decoder.
        kernels: choices with linears and experts resolved.
        context_parallel: how mixers work on split sequences; None takes the defaults.
        feed_forward: the layer's feed-forward.
    """
    linears = ParallelLinears(kernels.parallel_linear, model.spiking)
    build = MixerBuild(model, kernels, context_parallel or ContextParallelConfig(), linears)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=of_kind(mixer, SELF_ATTENTION, "the modules of a mixer")(build),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=feed_forward_spec(feed_forward, kernels, linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    model: ModelConfig,
    kernels: KernelConfig,
    first_layer: int,
    num_layers: int,
    context_parallel: ContextParallelConfig | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage.

    Args:
        model: architecture of the whole decoder.
        kernels: choices with linears and experts resolved.
        first_layer: 0-based index of the stage's first layer.
        num_layers: layers of the stage.
        context_parallel: as in :func:`layer_spec`.
    """
    layers = list(zip(model.layer_mixers(), model.layer_feed_forwards(), strict=True))
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(mixer, model, kernels, context_parallel, feed_forward=feed_forward)
            for mixer, feed_forward in layers[first_layer : first_layer + num_layers]
        ],
        layer_norm=RMSNorm,
    )
