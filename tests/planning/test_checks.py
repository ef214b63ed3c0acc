"""Impossible runs are refused, and the sentence names the setting and what would be valid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import GateKind
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    LinearAttentionBackend,
    LinearAttentionContextParallel,
    ParallelConfig,
    Recompute,
    SlidingWindowContextParallel,
)
from spikingbrain_train.config.require import divisors, either, multiples_around
from spikingbrain_train.config.rope_scaling import RopeType
from spikingbrain_train.config.run import LRDecayStyle, RunConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.parallel_checks import check_world_size
from tests.config.small_model import small_model


def valid_run() -> RunConfig:
    """A run that fits any world size of 1, 2, 4 or 8."""
    return RunConfig(
        model=small_model(num_layers=8, num_attention_heads=8, num_query_groups=4),
        stage=StageConfig(train_iters=100, seq_length=64, global_batch_size=8),
        output_dir="unused",
        dry_run=True,
    )


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """``config`` with dotted settings replaced."""
    for name, value in changes.items():
        *path, leaf = name.split(".")
        target: Any = config
        for part in path:
            target = getattr(target, part)
        assert leaf in {field.name for field in dataclasses.fields(target)}
        setattr(target, leaf, value)
    return config


def test_a_valid_run_is_accepted_at_every_world_size_that_fits():
    for world_size in (1, 2, 4, 8):
        check_run_config(valid_run(), world_size)


TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
LAYOUT = "parallel.pipeline_model_parallel_layout"
VPP = "parallel.virtual_pipeline_model_parallel_size"
RAMP = "stage.batch_size_ramp"
CP, EP = "parallel.context_parallel_size", "parallel.expert_model_parallel_size"
ETP, SP = "parallel.expert_tensor_parallel_size", "parallel.sequence_parallel"
LINEAR_CP = "parallel.context_parallel.gated_linear_attention"
ULYSSES = {
    "parallel.context_parallel.sliding_window_attention": SlidingWindowContextParallel.ulysses,
    "parallel.context_parallel.head_padding": False,
}
MOE = {"model.feed_forwards": ["dense", "moe"]}
NAN, INFINITY = float("nan"), float("inf")

# (settings, world size, parts of the sentence)
REFUSED: list[tuple[dict[str, Any], int, list[str]]] = [
    # world size and degrees
    ({TP: 2, PP: 2}, 6, ["world size 6", f"{TP}=2", f"{PP}=2", "4 ranks"]),
    ({PP: 4}, 1, ["world size 1", f"{PP}=4", "4 ranks"]),
    ({"parallel.data_parallel_size": 4}, 2, ["parallel.data_parallel_size=4", "2 replicas", "to 2 or null"]),
    ({TP: 0}, 1, [TP, "at least 1"]),
    ({"parallel.data_parallel_size": 0}, 1, ["parallel.data_parallel_size=0", "at least 1"]),
    # the network over the ranks
    ({TP: 8}, 8, [f"{TP}=8", "model.num_query_groups=4", "1, 2 or 4"]),
    ({TP: 3}, 3, [f"{TP}=3", "model.num_attention_heads=8", "1, 2 or 4"]),
    ({TP: 4, "model.ffn_hidden_size": 130}, 4, [f"{TP}=4", "model.ffn_hidden_size=130", "1 or 2"]),
    ({PP: 3}, 3, [f"{PP}=3", "model.num_layers=8", "1, 2, 4 or 8", f"each stage in {LAYOUT}"]),
    ({PP: 3, LAYOUT: [4, 4]}, 3, [f"{LAYOUT}=[4,4]", "2 stages", f"{PP} is 3", "null for even"]),
    ({LAYOUT: [4, 4]}, 1, [f"{LAYOUT}=[4,4]", "2 stages", f"{PP} is 1"]),
    ({PP: 3, LAYOUT: [3, 3, 3]}, 3, [f"{LAYOUT}=[3,3,3]", "9 layers", "model.num_layers is 8"]),
    ({PP: 3, LAYOUT: [0, 4, 4]}, 3, [LAYOUT, "at least 1"]),
    ({VPP: 2}, 1, [f"{VPP}=2", f"{PP} is 1", "set it to null"]),
    ({PP: 2, VPP: 1}, 2, [VPP, "at least 2"]),
    ({PP: 2, VPP: 3}, 2, [f"{VPP}=3", "6 stages", "model.num_layers=8", "valid are 2 or 4 and null"]),
    (
        {PP: 2, VPP: 2, LAYOUT: [4, 4]},
        2,
        [f"{LAYOUT}=[4,4]", "2 virtual stages a rank, 4 in all"],
    ),
    (
        {PP: 2, VPP: 2, "stage.global_batch_size": 3, "stage.micro_batch_size": 1},
        2,
        ["stage.global_batch_size=3", "3 micro-batches", f"multiple of {PP}=2", "2 or 4"],
    ),
    (
        {PP: 2, VPP: 2, "stage.micro_batch_size": 1, "stage.global_batch_size": 8, f"{RAMP}.start": 5}
        | {f"{RAMP}.increment": 3, f"{RAMP}.samples": 40},
        2,
        [f"{RAMP}.start=5", f"multiple of {PP}=2", "4 or 6"],
    ),
    ({"parallel.sequence_parallel": True}, 1, ["parallel.sequence_parallel", TP, "2 or more"]),
    ({"parallel.overlap_param_gather": True}, 2, ["parallel.use_distributed_optimizer=true"]),
    (
        {"parallel.overlap_param_gather": True, "parallel.use_distributed_optimizer": True},
        2,
        ["parallel.overlap_grad_reduce=true"],
    ),
    ({PP: 2, CP: 2, TP: 1}, 2, ["world size 2", f"{PP}=2", f"{CP}=2", "4 ranks"]),
    ({CP: 0}, 1, [f"{CP}=0", "at least 1"]),
    # experts over the ranks
    ({EP: 0}, 1, [f"{EP}=0", "at least 1"]),
    ({ETP: 0}, 1, [f"{ETP}=0", "at least 1"]),
    ({EP: 2}, 2, [f"{EP}=2", "model.feed_forwards has no moe layer", "set it to 1"]),
    ({ETP: 1}, 2, [f"{ETP}=1", "model.feed_forwards has no moe layer", "set it to null"]),
    (MOE | {EP: 4}, 2, [f"{EP}=4", "the 2 ranks of a pipeline stage", "1 or 2"]),
    (MOE | {EP: 4, PP: 2, CP: 2}, 4, [f"{EP}=4", "1 tensor x 2 context x 1 data", "1 or 2"]),
    (MOE | {EP: 4, TP: 2, SP: True}, 4, [f"{EP}=4 x 2 expert tensor ranks", "4 ranks", "1 or 2"]),
    (MOE | {ETP: 3}, 2, [f"{ETP}=3", "the 2 ranks", "1 or 2"]),
    (MOE | {EP: 8, "model.moe.num_experts": 4}, 8, [f"{EP}=8", "model.moe.num_experts=4", "1, 2 or 4"]),
    (MOE | {EP: 4, "model.moe.num_experts": 6}, 4, [f"{EP}=4", "model.moe.num_experts=6", "1, 2, 3 or 6"]),
    (MOE | {TP: 2}, 2, [f"{TP}=2", "mixture-of-experts", "parallel.sequence_parallel=true"]),
    (
        MOE | {ETP: 4, "model.moe.moe_ffn_hidden_size": 98},
        4,
        [f"{ETP}=4", "model.moe.moe_ffn_hidden_size=98", "1, 2, 7, 14, 49 or 98"],
    ),
    (
        MOE | {TP: 4, SP: True, ETP: 1, "model.moe.moe_ffn_hidden_size": 98},
        4,
        [f"{TP}=4", "shared experts", "model.moe.moe_ffn_hidden_size=98", "1 or 2"],
    ),
    (
        {"parallel.recompute": Recompute.moe_layer},
        1,
        ["parallel.recompute=moe_layer", "no moe layer", "none or full"],
    ),
    (
        {"parallel.recompute_expert_tokens": 512},
        1,
        ["parallel.recompute_expert_tokens=512", "no moe layer", "set it to null"],
    ),
    (
        MOE | {"parallel.replicate_expert_load": 2.0},
        1,
        ["parallel.replicate_expert_load=2 ", f"{EP} is 1", "set it to null"],
    ),
    (
        MOE | {"parallel.replicate_expert_load": 2.0, EP: 2, TP: 2, SP: True},
        4,
        ["parallel.replicate_expert_load=2 ", "splits each over 2 ranks", f"{ETP}=1"],
    ),
    (
        MOE
        | {
            "parallel.replicate_expert_load": 2.0,
            EP: 2,
            "parallel.use_distributed_optimizer": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.overlap_param_gather": True,
        },
        2,
        ["parallel.replicate_expert_load=2 ", "parallel.overlap_param_gather=true"],
    ),
    (
        MOE
        | {
            "parallel.replicate_expert_load": 2.0,
            EP: 2,
            "model.moe.capacity_factor": 1.25,
            "model.moe.pad_to_capacity": True,
        },
        2,
        ["parallel.replicate_expert_load=2.0", "model.moe.pad_to_capacity=true"],
    ),
    # sequences over the ranks
    ({CP: 4, "stage.seq_length": 62}, 4, ["stage.seq_length=62", f"{CP}=4", "60 or 64"]),
    (
        {CP: 4, "model.num_sink_tokens": 6},
        4,
        ["stage.seq_length=64 + model.num_sink_tokens=6 = 70", f"{CP}=4", "62 or 66"],
    ),
    (
        {CP: 2, TP: 2, SP: True, "stage.seq_length": 62},
        4,
        ["stage.seq_length=62", f"{CP}=2", f"{TP}=2", "4 slices", "60 or 64"],
    ),
    (
        {CP: 4, "model.num_sink_tokens": 32},
        4,
        ["model.num_sink_tokens=32", "first", "slices of 24 tokens", "100 or more"],
    ),
    (
        {CP: 3, "model.mixers": ["gla", ["gla", "full"]], "parallel.context_parallel.head_padding": False}
        | {"stage.seq_length": 63, "stage.global_batch_size": 1},
        3,
        [f"{CP}=3", "8 query heads", "full attention", "head_padding=true", "1, 2, 4 or 8"],
    ),
    (
        ULYSSES | {CP: 3, "stage.seq_length": 63, "stage.global_batch_size": 1},
        3,
        [f"{CP}=3", "8 query heads", "sliding_window_attention=halo", "1, 2, 4 or 8"],
    ),
    (
        {LINEAR_CP: LinearAttentionContextParallel.ulysses, "parallel.context_parallel.head_padding": False}
        | {CP: 3, "stage.seq_length": 63, "stage.global_batch_size": 1},
        3,
        [f"{CP}=3", "8 query heads", "gated_linear_attention=allgather", "1, 2, 4 or 8"],
    ),
    ({"dry_run_rank": 2}, 2, ["dry_run_rank=2", "0 to 1"]),
    ({"dry_run_rank": -1}, 2, ["dry_run_rank=-1", "0 to 1"]),
    # the network itself
    ({"model.feed_forwards": []}, 1, ["model.feed_forwards is empty", "[dense]"]),
    (
        {"model.feed_forwards": ["moe"] * 9},
        1,
        ["model.feed_forwards", "9 feed-forwards", "model.num_layers=8"],
    ),
    ({"model.sliding_window": -5}, 1, ["model.sliding_window=-5", "at least 1"]),
    ({"model.num_sink_tokens": -1}, 1, ["model.num_sink_tokens=-1", "at least 0"]),
    (
        {"model.gla.gate": GateKind.tied},
        1,
        ["model.gla.gate=tied", "model.gla.feature_map=relu", "feature_map=sigmoid", "gate=low_rank"],
    ),
    ({"model.moe.num_experts": 0}, 1, ["model.moe.num_experts=0", "at least 1"]),
    (
        {"model.moe.router_topk": 5, "model.moe.num_experts": 4},
        1,
        ["model.moe.router_topk=5", "model.moe.num_experts=4", "4 at most"],
    ),
    ({"model.moe.num_shared_experts": -1}, 1, ["model.moe.num_shared_experts=-1", "at least 0"]),
    ({"model.moe.aux_loss_coeff": -0.1}, 1, ["model.moe.aux_loss_coeff=-0.1", "at least 0"]),
    ({"model.moe.capacity_factor": 0.0}, 1, ["model.moe.capacity_factor=0.0", "greater than 0"]),
    ({"model.moe.pad_to_capacity": True}, 1, ["model.moe.pad_to_capacity=true", "capacity_factor", "1.25"]),
    (
        {"model.moe.num_experts": 4, "model.moe.capacity_factor": 4.5, "model.moe.pad_to_capacity": True},
        1,
        ["model.moe.capacity_factor=4.5", "a capacity above the number of tokens", "at most", "= 4"],
    ),
    ({"model.moe.z_loss_coeff": NAN}, 1, ["model.moe.z_loss_coeff=nan", "finite"]),
    ({"model.mixers": [["gla", "swa"]], "model.kv_channels": 15}, 1, ["model.kv_channels=15", "even"]),
    ({"model.mixers": []}, 1, ["model.mixers is empty", "[gla,swa]"]),
    ({"model.mixers": ["gla"] * 9}, 1, ["model.mixers", "9 mixers", "model.num_layers=8"]),
    ({"model.sliding_window": 0}, 1, ["model.sliding_window=0", "at least 1"]),
    ({"model.num_query_groups": 3}, 1, ["model.num_query_groups=3", "1, 2, 4 or 8"]),
    ({"model.kv_channels": 15}, 1, ["model.kv_channels=15", "even"]),
    ({"model.hidden_size": -64}, 1, ["model.hidden_size=-64", "at least 1"]),
    ({"model.vocab_size": 0}, 1, ["model.vocab_size=0", "at least 1"]),
    ({"model.rotary_base": 0.0}, 1, ["model.rotary_base=0.0", "greater than 0"]),
    ({"model.gla.gate_low_rank_dim": 0}, 1, ["model.gla.gate_low_rank_dim=0", "at least 1"]),
    ({"model.gla.gate_logit_normalizer": 0.0}, 1, ["model.gla.gate_logit_normalizer", "greater than 0"]),
    ({"model.rope_scaling.factor": 0.5}, 1, ["model.rope_scaling.factor=0.5", "at least 1"]),
    (
        {
            "model.rope_scaling.rope_type": RopeType.llama3,
            "model.rope_scaling.low_freq_factor": 4.0,
        },
        1,
        ["model.rope_scaling.high_freq_factor=4.0", "greater than", "low_freq_factor=4.0"],
    ),
    (
        {"model.rope_scaling.factor": 8.0},
        1,
        ["model.rope_scaling.factor=8.0", "no effect", "model.rope_scaling.rope_type=llama3"],
    ),
    (
        {"model.rope_scaling.rope_type": RopeType.longrope, "model.rope_scaling.factor": 8.0},
        1,
        ["model.rope_scaling.short_factor lists 0 factors", "rope_type=longrope"],
    ),
    # lengths and batches
    ({"stage.seq_length": 0}, 1, ["stage.seq_length=0", "at least 1"]),
    (
        {TP: 2, "parallel.sequence_parallel": True, "stage.seq_length": 63},
        2,
        ["stage.seq_length=63", f"{TP}=2", "62 or 64"],
    ),
    ({"stage.seq_length": 2048}, 1, ["stage.seq_length=2048", "model.max_position_embeddings=2048"]),
    ({"stage.global_batch_size": 6}, 4, ["stage.global_batch_size=6", "4 data-parallel", "4 or 8"]),
    (
        {"stage.global_batch_size": 2, "stage.micro_batch_size": 4},
        1,
        ["stage.global_batch_size=2", "stage.micro_batch_size=4", "use 4"],
    ),
    ({"stage.micro_batch_size": 0}, 1, ["stage.micro_batch_size=0", "at least 1"]),
    # smaller steps first
    (
        {f"{RAMP}.start": 8, f"{RAMP}.samples": 9, "stage.global_batch_size": 8},
        1,
        [f"{RAMP}.start=8", "below stage.global_batch_size=8"],
    ),
    (
        {f"{RAMP}.start": 4, f"{RAMP}.increment": 8, f"{RAMP}.samples": 9, "stage.global_batch_size": 16},
        1,
        [f"{RAMP}.increment=8", "a divisor of 12"],
    ),
    (
        {f"{RAMP}.start": 3, f"{RAMP}.samples": 9, "stage.global_batch_size": 12},
        2,
        [f"{RAMP}.start=3", "replicas = 2", "2 or 4"],
    ),
    ({f"{RAMP}.start": 2}, 1, [f"{RAMP}.start=2 needs {RAMP}.samples"]),
    ({f"{RAMP}.samples": 2}, 1, [f"{RAMP}.start=null has no ramp", "or neither"]),
    ({"stage.train_iters": 0}, 1, ["stage.train_iters=0", "at least 1"]),
    # teachers
    ({"stage.kind": "align"}, 1, ["stage.kind=align", "stage.teacher is null"]),
    ({"stage.kind": "distill"}, 1, ["stage.kind=distill", "stage.teacher is null"]),
    (
        {"stage.distillation.weight": 0.5},
        1,
        [
            "stage.distillation.weight=0.5",
            "stage.kind=cpt",
            "stage.kind=distill stage.distillation.weight=0.5",
        ],
    ),
    (
        {"stage.kind": "distill", "stage.teacher": "dense", "stage.distillation.weight": 0.0},
        1,
        ["stage.distillation.weight=0.0", "stage.kind=cpt"],
    ),
    ({"stage.distillation.weight": 1.5}, 1, ["stage.distillation.weight=1.5", "at most 1"]),
    ({"stage.distillation.temperature": 0.0}, 1, ["stage.distillation.temperature", "greater than 0"]),
    (
        {"stage.kind": "align", "stage.teacher": "dense", "stage.distillation.weight": 0.5},
        1,
        ["stage.distillation.weight=0.5", "null", "stage.kind=distill"],
    ),
    (
        {"stage.kind": "align", "stage.teacher": "dense", PP: 4}
        | {"model.mixers": ["gla"] * 4 + ["full"] * 2 + ["gla", "swa"]},
        4,
        [f"{PP}=4", "layers 4 to 5 have the teacher's mixers", "1 or 2"],
    ),
    # optimizer and schedule
    ({"optimizer.lr": -1e-3}, 1, ["optimizer.lr=-0.001", "greater than 0"]),
    ({"optimizer.lr": NAN}, 1, ["optimizer.lr=nan", "finite"]),
    ({"optimizer.weight_decay": INFINITY}, 1, ["optimizer.weight_decay=inf", "finite"]),
    ({"data.train": [{"prefix": "a", "weight": NAN}]}, 1, ["data.train[0] has the weight nan", "finite"]),
    ({"optimizer.min_lr": 1.0}, 1, ["optimizer.min_lr=1.0", "optimizer.lr=0.0005"]),
    ({"optimizer.adam_beta2": 1.0}, 1, ["optimizer.adam_beta2=1.0", "below 1"]),
    ({"optimizer.adam_beta1": -0.1}, 1, ["optimizer.adam_beta1=-0.1", "at least 0"]),
    ({"optimizer.adam_eps": 0.0}, 1, ["optimizer.adam_eps=0.0", "greater than 0"]),
    ({"optimizer.clip_grad": -1.0}, 1, ["optimizer.clip_grad=-1.0", "at least 0"]),
    ({"optimizer.mixer_lr_mult": -1.0}, 1, ["optimizer.mixer_lr_mult", "at least 0"]),
    ({"optimizer.new_parameter_lr_mult": -1.0}, 1, ["optimizer.new_parameter_lr_mult", "at least 0"]),
    ({"optimizer.lr_warmup_iters": 100}, 1, ["optimizer.lr_warmup_iters=100", "below stage.train_iters=100"]),
    (
        {"optimizer.lr_decay_style": LRDecayStyle.WSD},
        1,
        ["optimizer.lr_wsd_decay_iters", "a tenth of stage.train_iters is 10"],
    ),
    (
        {
            "optimizer.lr_decay_style": LRDecayStyle.WSD,
            "optimizer.lr_wsd_decay_iters": 95,
            "optimizer.lr_warmup_iters": 10,
        },
        1,
        ["optimizer.lr_wsd_decay_iters=95", "at most 90"],
    ),
    ({"optimizer.lr_wsd_decay_iters": 10}, 1, ["optimizer.lr_wsd_decay_iters=10", "adamw_wsd"]),
    ({"optimizer.phase_starts": [0.5]}, 1, ["names 1 phases and optimizer.phase_lr_mults 0", "multiplier"]),
    (
        {"optimizer.phase_starts": [0.5, 0.25], "optimizer.phase_lr_mults": [1.0, 1.0]},
        1,
        ["optimizer.phase_starts=[0.5,0.25]", "must rise"],
    ),
    (
        {
            "optimizer.phase_starts": [0.5],
            "optimizer.phase_lr_mults": [1.0],
            "optimizer.phase_weight_decays": [0.1, 0.0],
        },
        1,
        ["optimizer.phase_weight_decays 2", "or none"],
    ),
    ({"optimizer.phase_starts": [1.5], "optimizer.phase_lr_mults": [1.0]}, 1, ["phase_starts", "below 1"]),
    # the rest
    ({"checkpoint.save_interval": 0}, 1, ["checkpoint.save_interval=0", "at least 1"]),
    ({"checkpoint.keep_last": 0}, 1, ["checkpoint.keep_last=0", "at least 1"]),
    ({"logging.log_interval": 0}, 1, ["logging.log_interval=0", "at least 1"]),
    ({"logging.eval_interval": -1}, 1, ["logging.eval_interval=-1", "at least 0"]),
    ({"data.num_workers": -1}, 1, ["data.num_workers=-1", "at least 0"]),
    ({"seed": -1}, 1, ["seed=-1", "at least 0"]),
    ({"cluster.timeout_minutes": 0.0}, 1, ["cluster.timeout_minutes=0.0", "greater than 0"]),
    ({"cluster.peak_tflops": 0.0}, 1, ["cluster.peak_tflops=0.0", "greater than 0"]),
    (
        {
            "cluster.accelerator": AcceleratorKind.cpu,
            "cluster.kernels.gated_linear_attention": LinearAttentionBackend.fla,
        },
        1,
        ["cluster.kernels.gated_linear_attention=fla", "auto or chunk or naive"],
    ),
    (
        {
            "cluster.accelerator": AcceleratorKind.cpu,
            "cluster.kernels.experts": ExpertBackend.grouped_gemm,
        },
        1,
        ["cluster.kernels.experts=grouped_gemm", "auto or sequential"],
    ),
    (
        {
            "cluster.kernels.experts": ExpertBackend.grouped_gemm,
            "model.spiking.projections": [Projection.mlp_fc2],
        },
        1,
        ["cluster.kernels.experts=grouped_gemm", "model.spiking.projections", "choose auto, which takes it"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "world_size", "parts"), REFUSED, ids=[" ".join(map(str, case[0].items())) for case in REFUSED]
)
def test_refused_with_a_sentence_that_names_setting_and_valid_value(changes, world_size, parts):
    with pytest.raises(ConfigurationError) as refusal:
        check_run_config(changed(valid_run(), changes), world_size)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_warm_up_may_take_all_but_the_last_step():
    check_run_config(changed(valid_run(), {"optimizer.lr_warmup_iters": 99}), 1)


def test_the_last_rate_has_no_part_in_a_constant_schedule():
    constant = {"optimizer.lr_decay_style": LRDecayStyle.constant, "optimizer.min_lr": 1.0}
    check_run_config(changed(valid_run(), constant), 1)


def test_odd_head_width_is_fine_without_rotary_positions():
    check_run_config(changed(valid_run(), {"model.kv_channels": 15, "model.mixers": ["gla"]}), 1)


def test_accepted_are_topologies_that_share_ranks_between_data_context_and_experts():
    experts = {EP: 4, CP: 2, "model.num_sink_tokens": 8, "stage.seq_length": 120}
    check_run_config(changed(valid_run(), MOE | experts), 8)
    check_run_config(changed(valid_run(), MOE | {TP: 2, SP: True, ETP: 1, EP: 4}), 4)
    check_run_config(changed(valid_run(), MOE | {"parallel.recompute": Recompute.moe_layer}), 1)


def test_heads_that_do_not_divide_are_fine_where_they_may_be_padded_or_are_not_split():
    layout = {CP: 3, "stage.seq_length": 63, "stage.global_batch_size": 1}
    check_run_config(
        changed(valid_run(), ULYSSES | layout | {"parallel.context_parallel.head_padding": True}), 3
    )
    halo = {"parallel.context_parallel.head_padding": False}
    check_run_config(changed(valid_run(), layout | halo), 3)


def test_the_shortest_text_that_the_refusal_names_leaves_some_in_every_slice():
    layout = {CP: 4, "model.num_sink_tokens": 32}
    check_run_config(changed(valid_run(), layout | {"stage.seq_length": 100}), 4)
    with pytest.raises(ConfigurationError, match="leave no text in the first"):
        check_run_config(changed(valid_run(), layout | {"stage.seq_length": 96}), 4)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_more_than_all_channels_cannot_be_drawn_anew(fraction):
    with pytest.raises(ConfigurationError, match="upcycling.reinit_fraction=.* between 0 .* and 1"):
        check_fields(ConversionConfig(upcycling=UpcyclingConfig(reinit_fraction=fraction)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16])
def test_expert_degrees_are_accepted_where_megatron_can_form_its_groups(world_size):
    # megatron-core: expert tensor x expert model x pipeline must divide the world.
    for pipeline in divisors(world_size):
        for expert_tensor in range(1, 5):
            for expert in range(1, 9):
                parallel = ParallelConfig(
                    pipeline_model_parallel_size=pipeline,
                    expert_model_parallel_size=expert,
                    expert_tensor_parallel_size=expert_tensor,
                )
                try:
                    check_world_size(parallel, world_size)
                    accepted = True
                except ConfigurationError:
                    accepted = False
                assert accepted == (world_size % (expert_tensor * expert * pipeline) == 0)


def test_choices_in_words():
    assert either([4]) == "4" and either([1, 2, 4]) == "1, 2 or 4"
    assert multiples_around(63, 4) == [60, 64] and multiples_around(3, 4) == [4]


@pytest.mark.parametrize("number", [1, 2, 9, 12, 28, 97, 18944])
def test_divisors_are_all_numbers_that_divide(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
