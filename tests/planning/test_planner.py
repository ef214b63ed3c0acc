"""The plan is exact about parameters and agrees with independent counts of arithmetic."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spikingbrain_train.architecture.branches import in_order
from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import Layer, dense_source, has_experts
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.sizes import visible_keys
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
)
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig, Recompute
from spikingbrain_train.config.run import OptimizerConfig, OptimizerKind, Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.activations import layer_working
from spikingbrain_train.planning.costs import (
    active_parameters,
    forward_flops_per_token,
    mixer_core_flops,
    new_parameters,
    stage_parameters,
    stage_routed_expert_parameters,
    total_parameters,
)
from spikingbrain_train.planning.in_flight import most_in_flight
from spikingbrain_train.planning.planner import (
    Plan,
    check_disk_space,
    launched_world_size,
    plan_run,
)
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.runtime.accelerator import detect
from tests.distributed.pool import RankPool

LLAMA = ModelConfig(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=500,  # not a multiple of the padding
    max_position_embeddings=256,
    mixers=["gla", "swa", "full", "gla"],
    gla=GatedLinearAttentionConfig(gate_low_rank_dim=6),
)
MODELS = {
    "llama-like, untied": LLAMA,
    "tied": dataclasses.replace(LLAMA, share_embeddings_and_output_weights=True),
    "qwen2-like, with bias": dataclasses.replace(LLAMA, add_qkv_bias=True),
    "qwen3-like, with q/k norms": dataclasses.replace(LLAMA, qk_layernorm=True),
}


def run_of(model: ModelConfig, parallel: ParallelConfig | None = None, **stage: object) -> RunConfig:
    settings: dict = {"train_iters": 100, "seq_length": 64, "global_batch_size": 8, **stage}
    return RunConfig(
        model=model,
        parallel=parallel or ParallelConfig(),
        stage=StageConfig(**settings),
        precision=Precision.bf16,
        output_dir="run",
    )


EXPERTS = dataclasses.replace(
    LLAMA,
    feed_forwards=["dense", "moe"],
    moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=2, moe_ffn_hidden_size=40),
)
SPIKINGBRAIN_76B_LIKE = dataclasses.replace(
    EXPERTS,
    mixers=[["gla", "swa"], ["gla", "full"]],
    gla=GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
    num_sink_tokens=6,
    add_qkv_bias=True,
)
HYBRIDS = {
    "two branches, low-rank gate, sinks": dataclasses.replace(
        LLAMA, mixers=[["gla", "swa"], ["gla", "full"]], num_sink_tokens=6, qk_layernorm=True
    ),
    "options of linear layers": dataclasses.replace(
        LLAMA,
        gla=GatedLinearAttentionConfig(
            qk_norm=True, rotary=True, num_query_groups=LLAMA.num_attention_heads, output_gate=True
        ),
    ),
    "experts": EXPERTS,
    "experts only, none shared": dataclasses.replace(
        LLAMA, feed_forwards=["moe"], moe=MoEConfig(num_experts=8, num_shared_experts=0)
    ),
    "76B-like": SPIKINGBRAIN_76B_LIKE,
    "76B-like, spiking": dataclasses.replace(
        SPIKINGBRAIN_76B_LIKE, spiking=SpikingConfig(projections=list(Projection))
    ),
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters on one rank."""

    all: int
    routed_experts: int
    """Those that data-parallel ranks don't reduce together; only marked where experts are spread."""
    new: int


def _built_parameters(
    groups: ProcessGroups, parallel: ParallelConfig, names: list[str]
) -> tuple[int, dict[str, Counts]]:
    """This rank's pipeline stage, and the parameters of the modules that megatron-core builds for it."""
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.transformer_config import transformer_config

    kernels = resolve_kernels(KernelConfig(), detect("cpu"))
    counts = {}
    for name in names:
        model = (MODELS | HYBRIDS)[name]
        config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
        parameters = list(build_model(model, config, kernels, groups.device).parameters())
        counts[name] = Counts(
            all=sum(p.numel() for p in parameters),
            routed_experts=sum(p.numel() for p in parameters if not getattr(p, "allreduce", True)),
            new=sum(p.numel() for p in parameters if getattr(p, "is_new_parameter", False)),
        )
    return groups.pipeline_model_parallel_rank, counts


@pytest.mark.parametrize(
    ("degrees", "world_size"),
    [
        ({}, 1),
        ({"tensor": 2, "sequence_parallel": True}, 2),
        ({"tensor": 2, "sequence_parallel": True, "pipeline": 2}, 4),
        ({"pipeline": 2}, 2),
        ({"context": 2}, 2),
        ({"expert": 2}, 2),
        ({"expert": 2, "context": 2}, 2),
        ({"expert": 2, "pipeline": 2}, 4),
        ({"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor_parallel_size": 1}, 2),
        ({"tensor": 2, "sequence_parallel": True, "expert": 2}, 4),
    ],
    ids=str,
)
def test_parameters_per_rank_are_those_of_the_built_model(
    ranks: RankPool, degrees: dict, world_size: int
) -> None:
    shards = {"tensor", "pipeline", "expert"}
    settings = {f"{name}_model_parallel_size" if name in shards else name: n for name, n in degrees.items()}
    if "context" in settings:
        settings["context_parallel_size"] = settings.pop("context")
    parallel = ParallelConfig(**settings)
    models = {name: m for name, m in (MODELS | HYBRIDS).items() if has_experts(m) or "expert" not in degrees}
    results = ranks.run(
        _built_parameters, parallel, list(models), world_size=world_size, parallel=parallel, timeout=240
    )
    assert {stage for stage, _ in results} == set(range(parallel.pipeline_model_parallel_size))
    for stage, built in results:
        for name, model in models.items():
            assert built[name].all == stage_parameters(model, parallel, stage), name
            if parallel.expert_model_parallel_size > 1:
                planned = stage_routed_expert_parameters(model, parallel, stage)
                assert built[name].routed_experts == planned, name
    if world_size == 1:
        _, built = results[0]
        assert {name: counts.new for name, counts in built.items()} == {
            name: new_parameters(model) for name, model in models.items()
        }


def test_the_76b_has_the_parameters_of_its_parts() -> None:
    hidden, width, heads, groups, ffn, vocabulary = 3584, 128, 28, 4, 18944, 152064
    projections = hidden * width * (heads + groups + groups) + width * (heads + 2 * groups) + hidden * hidden
    mixer = 2 * projections + width + 2 * hidden + 2  # two branches, output norm, branch norms and weights
    swiglu = 3 * hidden * ffn
    dense, experts = 7 * swiglu, 21 * (16 * swiglu + swiglu + 16 * hidden)
    rest = 28 * 2 * hidden + hidden + 2 * vocabulary * hidden + 128 * hidden
    model = to_run_config(compose_run(["model=spikingbrain_76b", "dry_run=true"])).model
    assert total_parameters(model) == 28 * mixer + dense + experts + rest
    assert active_parameters(model) == total_parameters(model) - 21 * 15 * swiglu


def test_the_ranks_of_all_stages_hold_the_model_once() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    model = dataclasses.replace(SPIKINGBRAIN_76B_LIKE, vocab_size=512)  # needs no padding
    stages = range(parallel.pipeline_model_parallel_size)
    once = sum(stage_parameters(model, parallel, stage) for stage in stages)
    others = sum(stage_routed_expert_parameters(model, parallel, stage) for stage in stages)
    assert once + others == total_parameters(model)


def transformers_model(model: ModelConfig):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attn_implementation": "eager",
    }
    if model.qk_layernorm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    if model.add_qkv_bias:
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


@pytest.mark.parametrize("name", MODELS)
def test_dense_totals_are_those_of_transformers(name: str) -> None:
    model = dataclasses.replace(
        dense_source(MODELS[name]), hidden_size=64
    )  # Qwen2 fixes heads x width = hidden
    assert total_parameters(model) == transformers_model(model).num_parameters()


def test_dense_forward_flops_are_those_that_torch_counts() -> None:
    model, length = dense_source(LLAMA), 40
    reference = transformers_model(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.zeros(1, length, dtype=torch.long))
    # transformers' eager attention computes the whole T x T square and masks it; only the triangle is needed.
    # Its rotary frequencies are one small product per position, which is no arithmetic of the model.
    square = 4 * model.num_attention_heads * model.kv_channels * length * length * model.num_layers
    triangle = (
        4 * model.num_attention_heads * model.kv_channels * sum(range(1, length + 1)) * model.num_layers
    )
    rotary = length * model.kv_channels
    counted = counter.get_total_flops() - square + triangle
    assert counted - rotary <= forward_flops_per_token(model, length) * length <= counted


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("window", [None, 1, 8, 64])
def test_visible_keys_are_those_of_the_mask(length: int, window: int | None) -> None:
    mask = torch.ones(length, length).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    assert visible_keys(length, window) == pytest.approx(mask.sum().item() / length, rel=1e-12)


def core_flops(model: ModelConfig, mixer: str, length: int) -> float:
    return MIXERS[mixer].core_flops(model, length)


def test_linear_attention_costs_the_same_per_token_at_any_length() -> None:
    assert core_flops(LLAMA, "gla", 128) == core_flops(LLAMA, "gla", 131072)
    windowed = dataclasses.replace(LLAMA, sliding_window=16)
    assert core_flops(windowed, "swa", 131072) < 4 * 4 * 16 * 16
    assert core_flops(LLAMA, "full", 131072) > 1000 * core_flops(windowed, "swa", 131072)


def test_two_branches_cost_as_much_as_both_alone() -> None:
    for softmax in ("swa", "full"):
        layer = Layer(in_order([MIXERS["gla"], MIXERS[softmax]]), FEED_FORWARDS["dense"])
        alone = core_flops(LLAMA, softmax, 64) + core_flops(LLAMA, "gla", 64)
        assert mixer_core_flops(LLAMA, layer, 64) == alone


@pytest.mark.parametrize("window", [None, 8, 64])
def test_sinks_are_keys_of_every_token_and_queries_of_their_own(window: int | None) -> None:
    length, sinks = 40, 6
    mask = torch.ones(length, length).tril()
    mask = mask if window is None else mask.triu(1 - window)
    pairs = mask.sum().item() + (length + sinks) * sinks  # sinks see sinks, and text sees sinks
    model = dataclasses.replace(LLAMA, sliding_window=window or 1, num_sink_tokens=sinks)
    flops = core_flops(model, "full" if window is None else "swa", length)
    per_pair = 4 * model.num_attention_heads * model.kv_channels
    assert flops * length == pytest.approx(pairs * per_pair, rel=1e-12)


def test_a_token_pays_for_the_experts_that_it_is_routed_to() -> None:
    experts, more = EXPERTS, dataclasses.replace(EXPERTS.moe, num_experts=64)
    routers = 2 * (64 - 4) * LLAMA.hidden_size * 2  # two layers of experts, two FLOPs per element
    wider = dataclasses.replace(experts, moe=more)
    assert forward_flops_per_token(wider, 64) - forward_flops_per_token(experts, 64) == routers
    top_3 = dataclasses.replace(experts, moe=dataclasses.replace(experts.moe, router_topk=3))
    expert = 2 * 2 * (3 * 40 * experts.hidden_size)
    assert forward_flops_per_token(top_3, 64) - forward_flops_per_token(experts, 64) == expert


def flops_of(config: RunConfig) -> float:
    return kind_of(config.stage).flops_per_token(config)


def test_training_counts_backward_twice_and_the_teacher_once() -> None:
    forward, teacher = forward_flops_per_token(LLAMA, 64), forward_flops_per_token(dense_source(LLAMA), 64)
    assert flops_of(run_of(LLAMA)) == 3 * forward
    distilled = run_of(LLAMA, kind="distill", teacher="dense")
    assert flops_of(distilled) == 3 * forward + teacher
    aligned = flops_of(run_of(LLAMA, kind="align", teacher="dense"))
    assert (
        forward_flops_per_token(dense_source(LLAMA), 64, output_layer=False) < aligned < 3 * forward + teacher
    )


def test_quantities_of_a_step() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    plan = plan_run(run_of(LLAMA, parallel, micro_batch_size=2, global_batch_size=24), world_size=12)
    assert plan.data_parallel_size == 3
    assert plan.micro_batches == 4
    assert plan.tokens_per_step == 24 * 64
    assert plan.total_tokens == 24 * 64 * 100
    assert plan.pipeline_bubble == 1 / 5
    assert [stage.virtual_stages for stage in plan.stages] == [[range(0, 2)], [range(2, 4)]]
    assert [layer.mixer_name for layer in plan.stages[1].kinds] == ["full", "gla"]


def test_virtual_stages_take_turns_and_shrink_the_bubble() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    plan = plan_run(run_of(LLAMA, parallel, global_batch_size=8), world_size=2)
    assert plan.pipeline_bubble == 1 / (2 * 8 + 1)
    first, second = plan.stages
    assert first.virtual_stages == [range(0, 1), range(2, 3)]
    assert second.virtual_stages == [range(1, 2), range(3, 4)]
    whole = plan_run(run_of(LLAMA, global_batch_size=8), world_size=1).stages[0].parameters
    copied = LLAMA.padded_vocab_size(1) * LLAMA.hidden_size * LLAMA.share_embeddings_and_output_weights
    assert first.parameters + second.parameters == whole + copied


@pytest.mark.parametrize("kept", [[1.0], [1.0, 1.0], [3.0, 1.0, 2.0]])
@pytest.mark.parametrize("micro_batches", [4, 8, 40])
def test_what_is_in_flight_is_what_the_schedule_holds(kept: list[float], micro_batches: int) -> None:
    """Against megatron-core's own table of its schedule and number of passes ahead."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    ranks = 4
    for rank in range(ranks):
        found = most_in_flight(kept, rank, ranks, micro_batches)
        if len(kept) == 1:
            assert found == min(ranks - rank, micro_batches)
            continue
        table = [chunk for _, chunk in get_schedule_table(micro_batches, len(kept), ranks)]
        ahead = min((ranks - rank - 1) * 2 + (len(kept) - 1) * ranks, len(table))
        held, most = sum(kept[chunk] for chunk in table[:ahead]), 0.0
        for step, chunk in enumerate(table[ahead:]):
            held += kept[chunk]
            most = max(most, held)
            held -= kept[len(kept) - 1 - table[step]]
        assert found == max(most, held)


class TestMemory:
    def total(self, config: RunConfig, world_size: int = 1) -> float:
        return max(stage.memory.total for stage in plan_run(config, world_size).stages)

    def test_weights_gradients_and_optimizer_follow_from_the_parameters(self) -> None:
        (stage,) = plan_run(run_of(LLAMA), 1).stages
        parameters = stage.parameters
        assert stage.memory.weights == 2 * parameters
        assert stage.memory.gradients == 4 * parameters
        assert stage.memory.optimizer == 12 * parameters
        single = dataclasses.replace(run_of(LLAMA), precision=Precision.fp32)
        (stage,) = plan_run(single, 1).stages
        assert (stage.memory.weights, stage.memory.optimizer) == (4 * parameters, 8 * parameters)

    def test_muon_keeps_one_number_less_of_each_element_of_a_matrix(self) -> None:
        """tests/training/test_muon.py holds the state that is built to the plan."""
        run = run_of(dataclasses.replace(LLAMA, mixers=["full"]))
        muon = dataclasses.replace(run, optimizer=OptimizerConfig(kind=OptimizerKind.muon))
        (adamw_stage,), (stage,) = plan_run(run, 1).stages, plan_run(muon, 1).stages
        hidden, width = LLAMA.hidden_size, LLAMA.ffn_hidden_size
        heads = LLAMA.kv_channels * (2 * LLAMA.num_attention_heads + 2 * LLAMA.num_query_groups)
        matrices = LLAMA.num_layers * hidden * (heads + 3 * width)
        assert adamw_stage.memory.optimizer - stage.memory.optimizer == 4 * matrices
        assert plan_run(run, 1).checkpoint_bytes - plan_run(muon, 1).checkpoint_bytes == 4 * matrices

    def test_the_distributed_optimizer_is_shared_by_the_replicas(self) -> None:
        sharded = ParallelConfig(use_distributed_optimizer=True)
        (whole,), (share,) = (
            plan_run(run_of(LLAMA, parallel), 4).stages for parallel in (ParallelConfig(), sharded)
        )
        assert share.memory.optimizer == whole.memory.optimizer / 4
        assert share.memory.gradients == whole.memory.gradients

    def test_recomputation_and_splitting_save_memory(self) -> None:
        for parallel, world_size in (
            (ParallelConfig(recompute=Recompute.full), 1),
            (ParallelConfig(tensor_model_parallel_size=2), 2),
            (ParallelConfig(pipeline_model_parallel_size=4), 4),
        ):
            long = {"seq_length": 256}
            assert self.total(run_of(LLAMA, parallel, **long), world_size) < self.total(run_of(LLAMA, **long))

    def test_sequence_parallelism_saves_activations_only(self) -> None:
        tensor = ParallelConfig(tensor_model_parallel_size=2)
        both = dataclasses.replace(tensor, sequence_parallel=True)
        (without,), (with_it,) = (plan_run(run_of(LLAMA, parallel), 2).stages for parallel in (tensor, both))
        assert with_it.memory.activations < without.memory.activations
        assert with_it.parameters == without.parameters

    def test_the_first_pipeline_stage_holds_most_micro_batches(self) -> None:
        same = dataclasses.replace(LLAMA, mixers=["swa"])
        stages = plan_run(run_of(same, ParallelConfig(pipeline_model_parallel_size=4)), 4).stages
        (layer,) = stages[0].kinds
        config = run_of(same)
        passing = config.stage.seq_length * layer_working(config, layer)  # of one layer, in every stage
        first, second, third, _ = (stage.memory.activations - passing for stage in stages)
        assert first == pytest.approx(2 * third) and second == pytest.approx(1.5 * third)

    def test_stages_are_as_long_as_the_layout_has_them(self) -> None:
        layout = ParallelConfig(pipeline_model_parallel_size=3, pipeline_model_parallel_layout=[1, 2, 1])
        same = dataclasses.replace(LLAMA, mixers=["swa"])
        first, second, third = plan_run(run_of(same, layout), 3).stages
        of_stages = [stage.virtual_stages for stage in (first, second, third)]
        assert of_stages == [[range(1)], [range(1, 3)], [range(3, 4)]]
        even = ParallelConfig(pipeline_model_parallel_size=4)
        ends = [stage.parameters for stage in plan_run(run_of(same, even), 4).stages]
        assert [first.parameters, second.parameters, third.parameters] == [ends[0], 2 * ends[1], ends[3]]

    def test_a_slice_of_the_sequence_takes_its_share_of_the_activations(self) -> None:
        # Without a vocabulary to speak of, whose gradient is as large on any slice.
        model = dataclasses.replace(SPIKINGBRAIN_76B_LIKE, vocab_size=1, make_vocab_size_divisible_by=1)
        long = {"seq_length": (1 << 20) - model.num_sink_tokens, "global_batch_size": 4}
        (whole,) = plan_run(run_of(model, **long), 1).stages
        (slice_,) = plan_run(run_of(model, ParallelConfig(context_parallel_size=4), **long), 4).stages
        # And what mixers keep to see beyond a slice; tests/planning/test_activations.py measures it.
        share = whole.memory.activations / 4
        assert share < slice_.memory.activations < 1.25 * share
        assert slice_.parameters == whole.parameters

    def test_every_level_of_recomputation_keeps_less(self) -> None:
        levels = [Recompute.none, Recompute.moe_activation, Recompute.moe_feed_forward, Recompute.moe_layer]
        deep = dataclasses.replace(SPIKINGBRAIN_76B_LIKE, num_layers=32)
        totals = [self.total(run_of(deep, ParallelConfig(recompute=level))) for level in levels]
        assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(levels)
        assert self.total(run_of(deep, ParallelConfig(recompute=Recompute.full))) < totals[-1]

    def test_busy_experts_compute_again_what_evenly_loaded_ones_keep(self) -> None:
        """Text and sinks; with two expert-parallel ranks twice as many are sent to each expert."""
        deep = dataclasses.replace(SPIKINGBRAIN_76B_LIKE, num_layers=32)

        def total(most: int | None, **changes: object) -> float:
            return self.total(run_of(deep, ParallelConfig(recompute_expert_tokens=most, **changes)))

        tokens = -(-(64 + deep.num_sink_tokens) * deep.moe.router_topk // deep.moe.num_experts)
        assert total(tokens) == total(None) > total(tokens - 1)
        assert total(tokens, expert_model_parallel_size=2) < total(None, expert_model_parallel_size=2)
        again = {"recompute": Recompute.moe_activation}
        assert total(tokens - 1, **again) < min(total(None, **again), total(tokens - 1))
        for level in (Recompute.moe_feed_forward, Recompute.moe_layer, Recompute.full):
            assert total(1, recompute=level) == total(None, recompute=level)

    def test_experts_are_sharded_over_the_ranks_that_hold_the_same_ones(self) -> None:
        parallel = ParallelConfig(
            context_parallel_size=2, expert_model_parallel_size=4, use_distributed_optimizer=True
        )
        (stage,) = plan_run(run_of(EXPERTS, parallel), 8).stages
        experts = stage_routed_expert_parameters(EXPERTS, parallel, 0)
        # 8 ranks: all hold the other parameters, 8 / 4 each expert.
        assert stage.memory.optimizer == 12 * (experts / 2 + (stage.parameters - experts) / 8)

    def test_alignment_trains_little_and_keeps_a_teacher(self) -> None:
        (trained,) = plan_run(run_of(LLAMA), 1).stages
        (aligned,) = plan_run(run_of(LLAMA, kind="align", teacher="dense"), 1).stages
        assert aligned.memory.gradients < trained.memory.gradients / 2
        assert aligned.memory.teacher == 2 * stage_parameters(dense_source(LLAMA), ParallelConfig(), 0)
        assert trained.memory.teacher == 0


class TestWorldSize:
    def test_the_launcher_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "6")
        assert launched_world_size(run_of(LLAMA)) == 6

    def test_without_a_launcher_there_is_one_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert launched_world_size(run_of(LLAMA, ParallelConfig(pipeline_model_parallel_size=4))) == 1

    def test_a_dry_run_takes_what_the_config_asks_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        config = run_of(LLAMA, ParallelConfig(pipeline_model_parallel_size=4, data_parallel_size=8))
        config.dry_run = True
        assert launched_world_size(config) == 32
        config.parallel.data_parallel_size = None
        assert launched_world_size(config) == 4
        config.parallel.expert_model_parallel_size = 6
        assert launched_world_size(config) == 24

    @pytest.mark.parametrize("value", ["0", "two", "-1", ""])
    def test_a_damaged_environment_is_refused(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(ConfigurationError, match=f"WORLD_SIZE={value} is not a positive number"):
            launched_world_size(run_of(LLAMA))


class TestDiskSpace:
    @pytest.fixture
    def plan(self, tmp_path) -> Plan:
        config = run_of(LLAMA)
        config.output_dir = str(tmp_path / "not" / "there")
        return plan_run(config, 1)

    def with_free(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))

    def test_room_for_one_checkpoint_is_enough(self, plan, monkeypatch) -> None:
        self.with_free(monkeypatch, plan.checkpoint_bytes)
        check_disk_space(plan)

    def test_less_is_refused_with_both_sizes(self, plan, monkeypatch) -> None:
        self.with_free(monkeypatch, plan.checkpoint_bytes - 1)
        with pytest.raises(ConfigurationError, match="output_dir=.*MiB of free space.*takes .* MiB"):
            check_disk_space(plan)

    def test_a_checkpoint_is_weights_and_optimizer_state(self, plan) -> None:
        assert plan.checkpoint_bytes == total_parameters(LLAMA) * (2 + 12)
