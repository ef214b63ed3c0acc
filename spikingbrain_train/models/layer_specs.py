"""What a layer is made of: one megatron-core ModuleSpec per layer.

To add a mixer, write its op and its module and add one line to ``SELF_ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelLinearBackend
from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention
from spikingbrain_train.models.mixers.softmax_attention import SoftmaxCoreAttention
from spikingbrain_train.models.rms_norm import RMSNorm


@dataclass(frozen=True)
class ParallelLinears:
    """The classes behind the projections of every layer."""

    column: type
    row: type

    @staticmethod
    def of(backend: ParallelLinearBackend) -> ParallelLinears:
        """The classes of a resolved backend (``auto`` is resolved by the accelerator seam before)."""
        if backend is ParallelLinearBackend.transformer_engine:
            from megatron.core.extensions.transformer_engine import (
                TEColumnParallelLinear,
                TERowParallelLinear,
            )

            return ParallelLinears(TEColumnParallelLinear, TERowParallelLinear)
        assert backend is ParallelLinearBackend.megatron, f"unresolved parallel_linear backend {backend}"
        return ParallelLinears(ColumnParallelLinear, RowParallelLinear)


def _attention_submodules(
    model: ModelConfig, linears: ParallelLinears, core_attention: Callable
) -> SelfAttentionSubmodules:
    qk_norm = RMSNorm if model.qk_layernorm else IdentityOp
    return SelfAttentionSubmodules(
        linear_qkv=linears.column,
        core_attention=core_attention,
        linear_proj=linears.row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )


def _softmax_attention(
    model: ModelConfig, kernels: KernelConfig, linears: ParallelLinears, window: int | None
) -> ModuleSpec:
    core = partial(SoftmaxCoreAttention, window=window, backend=kernels.softmax_attention)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=_attention_submodules(model, linears, core),
    )


def _full(model: ModelConfig, kernels: KernelConfig, linears: ParallelLinears) -> ModuleSpec:
    return _softmax_attention(model, kernels, linears, window=None)


def _swa(model: ModelConfig, kernels: KernelConfig, linears: ParallelLinears) -> ModuleSpec:
    return _softmax_attention(model, kernels, linears, window=model.sliding_window)


def _gla(model: ModelConfig, kernels: KernelConfig, linears: ParallelLinears) -> ModuleSpec:
    return ModuleSpec(
        module=GatedLinearAttention,
        params={"gla": model.gla, "backend": kernels.gated_linear_attention},
        submodules=_attention_submodules(model, linears, IdentityOp),
    )


SELF_ATTENTION: dict[Mixer, Callable[[ModelConfig, KernelConfig, ParallelLinears], ModuleSpec]] = {
    Mixer.full: _full,
    Mixer.swa: _swa,
    Mixer.gla: _gla,
}
"""The registry of mixers: what stands in for ``self_attention`` in a layer of each kind."""


def mlp_spec(linears: ParallelLinears) -> ModuleSpec | partial:
    """SwiGLU feed-forward (megatron-core 0.19 wants a builder where 0.16 wants a ModuleSpec)."""
    submodules = MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def layer_spec(mixer: Mixer, model: ModelConfig, kernels: KernelConfig) -> ModuleSpec:
    """One decoder layer: norm, mixer, residual, norm, feed-forward, residual."""
    linears = ParallelLinears.of(kernels.parallel_linear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=SELF_ATTENTION[mixer](model, kernels, linears),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_spec(linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    model: ModelConfig, kernels: KernelConfig, first_layer: int, num_layers: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage.

    Args:
        model: architecture of the whole decoder.
        kernels: resolved kernel choices.
        first_layer: 0-based index of the stage's first layer.
        num_layers: layers of the stage.
    """
    mixers = model.layer_mixers()[first_layer : first_layer + num_layers]
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(mixer, model, kernels) for mixer in mixers], layer_norm=RMSNorm
    )
