"""What the specs of a layer's parts are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.config.import_path import object_of_kind
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ContextParallelConfig, KernelConfig
from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
from spikingbrain_train.models.rms_norm import RMSNorm


@dataclass(frozen=True)
class LayerBuild:
    """What every kind of mixer and feed-forward may ask for when its spec is made."""

    model: ModelConfig
    """Architecture of the whole decoder."""
    kernels: KernelConfig
    """Choices, with linears and experts resolved."""
    context_parallel: ContextParallelConfig
    """How mixers work on split sequences."""
    linears: ParallelLinears
    """Classes of the projections."""
    replicates_experts: bool = False
    """Whether experts with many tokens are computed on all expert-parallel ranks."""

    def mixer(self, kind: MixerKind) -> ModuleSpec:
        """The spec that a kind of mixer makes. Raises ConfigurationError where its module is not there."""
        return object_of_kind(kind.spec, f"mixer {kind.name}")(kind, self)

    def feed_forward(self, kind: FeedForwardKind) -> Any:
        """What a kind of feed-forward puts into a layer's spec as ``mlp``. Raises as :meth:`mixer`."""
        return object_of_kind(kind.spec, f"feed-forward {kind.name}")(kind, self)


def attention_submodules(build: LayerBuild) -> SelfAttentionSubmodules:
    """Projections and q/k norms of any mixer that is a SelfAttention of megatron-core."""
    qk_norm = RMSNorm if build.model.qk_layernorm else IdentityOp
    return SelfAttentionSubmodules(
        linear_qkv=build.linears.column(Projection.qkv),
        core_attention=IdentityOp,  # our mixers compute what is between the projections themselves
        linear_proj=build.linears.row(
            Projection.attention_output,
            bias=build.model.add_output_bias,
            sub_norm=build.model.attn_sub_norm,
        ),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )


def mlp_submodules(build: LayerBuild) -> MLPSubmodules:
    """Projections of any feed-forward that is an MLP of megatron-core, experts among them."""
    return MLPSubmodules(
        linear_fc1=build.linears.column(Projection.mlp_fc1, bias=build.model.add_mlp_bias),
        linear_fc2=build.linears.row(
            Projection.mlp_fc2, bias=build.model.add_mlp_bias, sub_norm=build.model.ffn_sub_norm
        ),
    )
