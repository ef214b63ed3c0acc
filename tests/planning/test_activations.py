"""The planner's inventory of activations against what autograd holds on to after a forward pass.

Layers run for real on the CPU with its kernels, with the fused SwiGLU of GPUs and, where it says so, with a
stand-in for flash-linear-attention that keeps what the library keeps. The bound of 4 % leaves room for what
the inventory leaves out: statistics of norms, indices of the router, an fp32 buffer of the CPU's logsigmoid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    QuantizationConfig,
    SpikingConfig,
)
from spikingbrain_train.config.lora import LoraConfig, LoraTarget
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import (
    ActivationFunc,
    DeltaRuleActivation,
    FeatureMap,
    GatedDeltaRuleConfig,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
)
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ClusterConfig,
    ContextParallelConfig,
    KernelConfig,
    LinearAttentionBackend,
    LinearAttentionContextParallel,
    ParallelConfig,
    Recompute,
    SlidingWindowContextParallel,
)
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.activations import (
    activation_bytes,
    layer_activations,
    layer_weight_copies,
    layer_working,
)
from spikingbrain_train.runtime.accelerator import detect
from tests.distributed.pool import RankPool
from tests.models.kept_bytes import kept_bytes

BOUND = 0.04
LENGTH = 512  # of a sequence, sinks included
DENSE = ModelConfig(
    num_layers=1,
    hidden_size=256,
    ffn_hidden_size=640,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=1024,
    max_position_embeddings=LENGTH,
    mixers=["swa"],
    sliding_window=64,
    add_qkv_bias=True,
)
GLA = replace(DENSE, mixers=["gla"])
MAMBA = replace(DENSE, mixers=["mamba"])
TWO_BRANCHES = replace(
    DENSE,
    mixers=[["gla", "swa"]],
    gla=GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
    num_sink_tokens=32,
)
EXPERTS = replace(
    DENSE, feed_forwards=["moe"], moe=MoEConfig(num_experts=4, router_topk=1, num_shared_experts=1)
)
SPIKES = SpikingConfig(projections=list(Projection))
ROUNDED = Int8InputsConfig([Projection.qkv, Projection.mlp_fc1, Projection.mlp_fc2])
ADAPTERS = LoraConfig(names=["one", "two"], ranks=[32])
IN_MAMBA = [LoraTarget.in_proj, LoraTarget.out_proj]
OPTIONS = GatedLinearAttentionConfig(qk_norm=True, rotary=True, num_query_groups=4, output_gate=True)
DELTA = replace(DENSE, mixers=["gdn"])
DELTA_OPTIONS = GatedDeltaRuleConfig(
    num_query_groups=8, short_convolution=4, activation=DeltaRuleActivation.silu, output_gate=True
)
FP8 = Fp8Config(Fp8Format.hybrid)
METHODS = {
    "all-gather and halo": ContextParallelConfig(),
    "all-scan and halo": ContextParallelConfig(LinearAttentionContextParallel.allscan),
    "Ulysses": ContextParallelConfig(
        LinearAttentionContextParallel.ulysses, SlidingWindowContextParallel.ulysses
    ),
}


@dataclass(frozen=True)
class Case:
    """One layer on one or more context-parallel ranks."""

    model: ModelConfig
    precision: Precision = Precision.bf16
    recompute: Recompute = Recompute.none
    fla: bool = False
    context: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)

    def config(self, ranks: int = 1) -> RunConfig:
        linear = LinearAttentionBackend.fla if self.fla else LinearAttentionBackend.chunk
        return RunConfig(
            model=self.model,
            parallel=ParallelConfig(
                context_parallel_size=ranks, context_parallel=self.context, recompute=self.recompute
            ),
            cluster=ClusterConfig(
                accelerator=AcceleratorKind.cpu,
                kernels=KernelConfig(gated_linear_attention=linear, gated_delta_rule=linear),
            ),
            precision=self.precision,
            fp8=self.fp8,
            stage=StageConfig(
                seq_length=LENGTH - self.model.num_sink_tokens, global_batch_size=1, train_iters=1
            ),
            output_dir="run",
        )


CASES = {
    "window": Case(DENSE),
    "window, fp32": Case(DENSE, Precision.fp32),
    "window, q and k norms": Case(replace(DENSE, qk_layernorm=True)),
    "window, sub-norms": Case(replace(DENSE, attn_sub_norm=True, ffn_sub_norm=True)),
    "window, sub-norms, spiking, fp32": Case(
        replace(DENSE, attn_sub_norm=True, ffn_sub_norm=True, spiking=SPIKES), Precision.fp32
    ),
    "GLA, sub-norms": Case(replace(GLA, attn_sub_norm=True, ffn_sub_norm=True)),
    "delta rule, sub-norms": Case(replace(DELTA, attn_sub_norm=True, ffn_sub_norm=True)),
    "window, sinks": Case(replace(DENSE, num_sink_tokens=32)),
    "ReLU": Case(replace(DENSE, activation_func=ActivationFunc.relu)),
    "FATReLU, fp32": Case(replace(DENSE, activation_func=ActivationFunc.fatrelu), Precision.fp32),
    "full attention": Case(replace(DENSE, mixers=["full"])),
    "GLA, low-rank gate": Case(GLA),
    "GLA, low-rank gate, fp32": Case(GLA, Precision.fp32),
    "GLA, low-rank gate, fla": Case(GLA, fla=True),
    **{
        f"GLA, options, {name}": Case(replace(GLA, gla=OPTIONS), **changes)
        for name, changes in {"bf16": {}, "fp32": {"precision": Precision.fp32}, "fla": {"fla": True}}.items()
    },
    "GLA, tied gate, fla": Case(replace(GLA, gla=TWO_BRANCHES.gla), fla=True),
    "Mamba": Case(MAMBA),
    "Mamba, fp32": Case(MAMBA, Precision.fp32),
    "Mamba, no feed-forward": Case(replace(MAMBA, feed_forwards=["no_mlp"]), Precision.fp32),
    "Mamba, norms, fp32": Case(
        replace(MAMBA, mamba=MambaConfig(state_size=8, bc_dt_norm=True)), Precision.fp32
    ),
    "two branches": Case(TWO_BRANCHES),
    "two branches, fp32": Case(TWO_BRANCHES, Precision.fp32),
    "two branches, fla": Case(TWO_BRANCHES, fla=True),
    "two branches of softmax attention": Case(replace(DENSE, mixers=[["swa", "full"]])),
    "three branches": Case(replace(TWO_BRANCHES, mixers=[["gla", "swa", "full"]])),
    "three branches, spiking": Case(replace(TWO_BRANCHES, mixers=[["gla", "swa", "full"]], spiking=SPIKES)),
    "delta rule": Case(DELTA),
    "delta rule, fp32": Case(DELTA, Precision.fp32),
    "delta rule, fla": Case(DELTA, fla=True),
    "delta rule, q and k norms": Case(replace(DELTA, qk_layernorm=True)),
    "delta rule, options": Case(replace(DELTA, gdn=DELTA_OPTIONS)),
    "delta rule, options, fp32": Case(replace(DELTA, gdn=DELTA_OPTIONS), Precision.fp32),
    "delta rule, options, fla": Case(replace(DELTA, gdn=DELTA_OPTIONS), fla=True),
    "experts": Case(EXPERTS),
    "experts, fp32": Case(EXPERTS, Precision.fp32),
    "experts, ReLU": Case(replace(EXPERTS, activation_func=ActivationFunc.relu)),
    "experts, top-2": Case(replace(EXPERTS, moe=replace(EXPERTS.moe, router_topk=2))),
    "window, INT8 keys and values": Case(
        replace(DENSE, quantization=QuantizationConfig(keys_and_values=True))
    ),
    "window, q and k norms, INT8 keys and values": Case(
        replace(DENSE, qk_layernorm=True, quantization=QuantizationConfig(keys_and_values=True))
    ),
    "window, spiking": Case(replace(DENSE, spiking=SPIKES)),
    "window, adapters": Case(replace(DENSE, lora=ADAPTERS)),
    "window, adapters, fp32": Case(replace(DENSE, lora=ADAPTERS), Precision.fp32),
    "GLA, adapters": Case(replace(GLA, lora=ADAPTERS)),
    "window, spiking, adapters": Case(replace(DENSE, spiking=SPIKES, lora=ADAPTERS)),
    "window, INT8 inputs, adapters": Case(replace(DENSE, int8_inputs=ROUNDED, lora=ADAPTERS)),
    "window, INT8 inputs, adapters, fp32": Case(
        replace(DENSE, int8_inputs=ROUNDED, lora=ADAPTERS), Precision.fp32
    ),
    "Mamba, adapters": Case(replace(MAMBA, lora=replace(ADAPTERS, target_modules=IN_MAMBA))),
    "experts, adapters": Case(replace(EXPERTS, moe=replace(EXPERTS.moe, router_topk=2), lora=ADAPTERS)),
    "window, FP8": Case(DENSE, fp8=FP8),
    "GLA, low-rank gate, FP8": Case(GLA, fp8=FP8),
    "GLA, options, fla, FP8": Case(replace(GLA, gla=OPTIONS), fla=True, fp8=FP8),
    "delta rule, fla, FP8": Case(DELTA, fla=True, fp8=FP8),
    "Mamba, FP8": Case(MAMBA, fp8=FP8),
    "two branches, fla, FP8": Case(TWO_BRANCHES, fla=True, fp8=FP8),
    "experts, top-2, FP8": Case(replace(EXPERTS, moe=replace(EXPERTS.moe, router_topk=2)), fp8=FP8),
    "window, adapters, FP8": Case(replace(DENSE, lora=ADAPTERS), fp8=FP8),
    "window, sub-norms, FP8": Case(replace(DENSE, attn_sub_norm=True, ffn_sub_norm=True), fp8=FP8),
    "GLA, fixed decay": Case(replace(GLA, gla=GatedLinearAttentionConfig(gate=GateKind.fixed))),
    "GLA, fixed decay, fla": Case(
        replace(GLA, gla=GatedLinearAttentionConfig(gate=GateKind.fixed)), fla=True
    ),
    "GLA, options, spiking": Case(replace(GLA, gla=OPTIONS, spiking=SPIKES)),
    "GLA, spiking": Case(replace(GLA, spiking=SPIKES)),
    "two branches, spiking": Case(replace(TWO_BRANCHES, spiking=SPIKES)),
    "experts, spiking": Case(replace(EXPERTS, spiking=SPIKES)),
    **{
        f"{name}, {level.name}": Case(model, recompute=level)
        for level in (Recompute.moe_activation, Recompute.moe_feed_forward, Recompute.moe_layer)
        for name, model in (
            ("experts", EXPERTS),
            ("experts, ReLU", replace(EXPERTS, activation_func=ActivationFunc.relu)),
            ("experts, spiking", replace(EXPERTS, spiking=SPIKES)),
            (
                "dense beside experts",
                replace(EXPERTS, num_layers=2, feed_forwards=["dense", "moe"]),
            ),
        )
    },
}


class _StandInForFla(torch.autograd.Function):
    """Keeps what fla's ChunkGLAFunction keeps of float32 gates: q, k, v, their sums and scores inside
    chunks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
        scores = torch.zeros(*q.shape[:3], 64, dtype=torch.float32)
        ctx.save_for_backward(q.contiguous(), k.contiguous(), v.contiguous(), log_gate.cumsum(1), scores)
        return torch.zeros_like(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError


class _StandInForDeltaRule(torch.autograd.Function):
    """Keeps what fla's ChunkGatedDeltaRuleFunction keeps: q, k, v, sums of gates, betas, and the inverse of
    every chunk's triangular system."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, beta: Tensor) -> Tensor:
        inverse = torch.zeros(*q.shape[:3], 64, dtype=k.dtype)
        ctx.save_for_backward(q.contiguous(), k, v, log_gate.cumsum(1), beta, inverse)
        return torch.zeros_like(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError


@contextmanager
def _fla(wanted: bool) -> Iterator[None]:
    from spikingbrain_train.ops.gated_delta_rule import dispatch as delta_rule
    from spikingbrain_train.ops.gated_linear_attention import dispatch

    delta = ModuleType("fla.ops.gated_delta_rule")
    delta.chunk_gated_delta_rule = lambda *inputs, **_: (_StandInForDeltaRule.apply(*inputs), None)  # type: ignore[attr-defined]
    module = ModuleType("fla.ops.gla")
    module.chunk_gla = lambda q, k, v, g, **_: (_StandInForFla.apply(q, k, v, g), None)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            for name in ("fla", "fla.ops"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, "fla.ops.gla", module)
            patch.setitem(sys.modules, "fla.ops.gated_delta_rule", delta)
            for each in (dispatch, delta_rule):
                patch.setattr(each, "choose_backend", lambda *_: "fla")
        yield


def _model(groups: ProcessGroups, case: Case) -> Any:
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.transformer_config import transformer_config

    run = case.config(groups.collection.cp.size())
    config = transformer_config(run.model, run.parallel, run.precision, on_cpu=True, fp8=run.fp8)
    config.bias_activation_fusion = True  # as on GPUs
    kernels = resolve_kernels(KernelConfig(), detect("cpu"))
    return build_model(run.model, config, kernels, groups.device, run.parallel.context_parallel).train()


def _kept_by_layers(groups: ProcessGroups, cases: list[Case]) -> list[list[float]]:
    """Per case and layer: bytes per token of this rank's slice."""
    cp = groups.collection.cp
    results = []
    for case in cases:
        model, held = _model(groups, case), []
        sinks, tokens = case.model.num_sink_tokens, LENGTH // cp.size()
        layout = SequenceLayout(LENGTH - sinks, sinks, cp.rank(), cp.size())
        for layer in model.decoder.layers:
            hidden = torch.randn(tokens, 1, case.model.hidden_size, dtype=model.config.params_dtype)
            angles = torch.randn(tokens, 1, 1, case.model.kv_channels)
            with torch.compiler.set_stance("force_eager"), _fla(case.fla), kept_bytes(model, held):
                output, _ = layer(
                    hidden.requires_grad_(), None, rotary_pos_emb=angles, packed_seq_params=layout
                )
        results.append([number / tokens for number in held])
    return results


def _planned(case: Case, ranks: int) -> list[float]:
    config = case.config(ranks)
    if case.fp8.format is None:
        return [layer_activations(config, layer).kept for layer in layers(case.model)]
    return [
        layer_activations(config, layer, in_fp8=True).kept
        + layer_weight_copies(config, layer, in_fp8=True).kept / LENGTH
        for layer in layers(case.model)
    ]


def _assert_close(measured: list[float], planned: list[float]) -> None:
    errors = [plan / real - 1 for real, plan in zip(measured, planned, strict=True)]
    assert all(abs(error) <= BOUND for error in errors), (measured, planned, errors)


@pytest.fixture(scope="module")
def kept(ranks: RankPool) -> dict[str, list[float]]:
    (results,) = ranks.run(_kept_by_layers, list(CASES.values()), world_size=1, parallel=ParallelConfig())
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_layer_keeps_what_is_planned(name: str, kept: dict[str, list[float]]) -> None:
    _assert_close(kept[name], _planned(CASES[name], 1))


def test_fp8_weights_are_kept_as_transformer_engine_keeps_them() -> None:
    """On GPUs for the forward and for the backward pass; of layers in FP8, for each micro-batch in flight."""
    of_a_layer = 768 * 256 + 512 * 256 + 3 * 640 * 256
    kept = {}
    for accelerator in (AcceleratorKind.cpu, AcceleratorKind.cuda):
        for at_the_end in (0, 1):
            fp8 = Fp8Config(Fp8Format.hybrid, num_layers_at_end_in_bf16=at_the_end)
            config = Case(replace(DENSE, num_layers=4), fp8=fp8).config()
            config.cluster = replace(config.cluster, accelerator=accelerator)
            kept[accelerator, at_the_end] = activation_bytes(config, 0, 1)
    for at_the_end in (0, 1):
        more = kept[AcceleratorKind.cuda, at_the_end] - kept[AcceleratorKind.cpu, at_the_end]
        assert more == (4 - at_the_end) * of_a_layer


def test_dropout_of_adapters_keeps_what_is_planned(ranks: RankPool) -> None:
    """Planned is the mask of GPUs, a byte a channel; torch's on a CPU has the activations' number format."""
    case = Case(replace(DENSE, lora=replace(ADAPTERS, dropout=0.1)))
    ((measured,),) = ranks.run(_kept_by_layers, [case], world_size=1, parallel=ParallelConfig())
    channels = 2 * (5 * 256 + 512 + 640)  # q, k, v, gate, up; o; down: of two adapters
    (planned,) = _planned(case, 1)
    _assert_close(measured, [planned + channels * (2 - 1)])


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_keeps_what_is_planned(method: str, ranks: RankPool) -> None:
    cases = [
        Case(model, fla=fla, context=METHODS[method])
        for model in (DENSE, GLA, DELTA, TWO_BRANCHES, replace(TWO_BRANCHES, mixers=[["gla", "full"]]))
        for fla in (False, True)
    ]
    per_rank = ranks.run(
        _kept_by_layers, cases, world_size=2, parallel=ParallelConfig(context_parallel_size=2)
    )
    for index, case in enumerate(cases):
        # The first rank holds the sinks, the others text and a state from the ranks before; the plan takes
        # the fullest branch of any rank.
        (planned,), fullest = _planned(case, 2), max(results[index][0] for results in per_rank)
        assert (1 - BOUND) * fullest <= planned <= 1.1 * fullest, (case, fullest, planned)


def _kept_by_model(groups: ProcessGroups, case: Case) -> int:
    model, held = _model(groups, case), []
    tokens = torch.zeros(1, LENGTH - case.model.num_sink_tokens, dtype=torch.int64)
    with torch.compiler.set_stance("force_eager"), kept_bytes(model, held):
        model(tokens, tokens)
    return held[0]


@pytest.mark.parametrize("level", [Recompute.none, Recompute.moe_feed_forward, Recompute.full])
def test_a_model_keeps_what_is_planned_before_its_logits(level: Recompute, ranks: RankPool) -> None:
    model = replace(
        TWO_BRANCHES,
        num_layers=3,
        feed_forwards=["dense", "moe", "moe"],
        moe=EXPERTS.moe,
    )
    case = Case(model, recompute=level)
    (held,) = ranks.run(_kept_by_model, case, world_size=1, parallel=ParallelConfig())
    config = case.config()
    # What comes and goes: the logits of a chunk, and of one layer what is computed again, and gradients.
    passing = LENGTH * max(
        layer_activations(config, layer).recomputed + layer_working(config, layer) for layer in layers(model)
    )
    passing += LENGTH * model.vocab_size * 2
    assert activation_bytes(config, 0, 1) - passing == pytest.approx(held, rel=BOUND)


def _gradients(groups: ProcessGroups, cases: list[Case]) -> list[dict[str, Tensor]]:
    """Of the same weights and tokens."""
    first, results = None, []
    for case in cases:
        model = _model(groups, case)
        first = first or {name: x.clone() for name, x in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(first[name])
        tokens = torch.arange(LENGTH - case.model.num_sink_tokens).unsqueeze(0)
        with torch.compiler.set_stance("force_eager"):
            loss, _ = model(tokens, tokens)
            loss.backward()
        results.append({name: x.grad for name, x in model.named_parameters()})
    return results


def test_computing_dense_feed_forwards_again_changes_no_gradient(ranks: RankPool) -> None:
    model = replace(EXPERTS, num_layers=2, feed_forwards=["dense", "moe"])
    levels = (Recompute.none, Recompute.moe_feed_forward, Recompute.moe_layer)
    cases = [Case(model, recompute=level) for level in levels]
    ((kept, *again),) = ranks.run(_gradients, cases, world_size=1, parallel=ParallelConfig())
    for gradients in again:
        assert all(torch.equal(gradients[name], kept[name]) for name in kept)
