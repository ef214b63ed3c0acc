"""What a layer is made of: one megatron-core ModuleSpec per layer, made by the specs of its kinds."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from spikingbrain_train.architecture.layers import Layer, layers
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ContextParallelConfig, KernelConfig
from spikingbrain_train.models.layer_build import LayerBuild
from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
from spikingbrain_train.models.mixers import parallel_hybrid
from spikingbrain_train.models.rms_norm import RMSNorm


def layer_build(
    model: ModelConfig,
    kernels: KernelConfig,
    context_parallel: ContextParallelConfig | None = None,
    *,
    replicates_experts: bool = False,
) -> LayerBuild:
    """What the specs of a model's layers are made from.

    Args:
        model: architecture of the whole decoder.
        kernels: choices with linears and experts resolved.
        context_parallel: how mixers work on split sequences; None takes the defaults.
        replicates_experts: whether those with many tokens are computed on all expert-parallel ranks.
    """
    linears = ParallelLinears(kernels.parallel_linear, model)
    methods = context_parallel or ContextParallelConfig()
    return LayerBuild(model, kernels, methods, linears, replicates_experts)


def layer_spec(layer: Layer, build: LayerBuild) -> ModuleSpec:
    """One decoder layer: norm, mixer, residual, and, if there is one, norm, feed-forward, residual."""
    if len(layer.mixers) == 1:
        mixer = build.mixer(layer.mixers[0])
    else:
        mixer = parallel_hybrid.spec(layer.mixers, build)
    # megatron-core's defaults for what is not there pass their input on.
    feed_forward = {}
    if layer.feed_forward.is_there:
        feed_forward = {
            "pre_mlp_layernorm": RMSNorm,
            "mlp": build.feed_forward(layer.feed_forward),
            "mlp_bda": get_bias_dropout_add,
        }
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            **feed_forward,
        ),
    )


def block_spec(
    build: LayerBuild, first_layer: int, num_layers: int, fp8: Fp8Config | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage.

    Args:
        build: what specs are made from.
        first_layer: 0-based index of the stage's first layer.
        num_layers: layers of the stage.
        fp8: what linears multiply while they train, in the layers that it says; None: the weights' format.
    """
    of_the_stage = list(enumerate(layers(build.model)))[first_layer : first_layer + num_layers]
    builds = {False: build, True: replace(build, linears=replace(build.linears, fp8=fp8))}
    in_fp8 = [fp8 is not None and fp8.in_layer(number, build.model.num_layers) for number, _ in of_the_stage]
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(layer, builds[is_fp8]) for (_, layer), is_fp8 in zip(of_the_stage, in_fp8, strict=True)
        ],
        layer_norm=RMSNorm,
    )
