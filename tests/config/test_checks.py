"""Impossible runs are refused, and the sentence names the setting and what would be valid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from spikingbrain_train.config.checks import check_run_config, divisors
from spikingbrain_train.config.errors import ConfigurationError
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import AcceleratorKind, LinearAttentionBackend
from spikingbrain_train.config.run import LRDecayStyle, RunConfig, StageConfig, StageKind


def valid_run() -> RunConfig:
    """A run that fits any world size of 1, 2, 4 or 8."""
    return RunConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=8,
            num_query_groups=4,
            kv_channels=16,
            vocab_size=512,
            max_position_embeddings=1024,
        ),
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
    ({PP: 3}, 3, [f"{PP}=3", "model.num_layers=8", "1, 2, 4 or 8"]),
    ({"parallel.sequence_parallel": True}, 1, ["parallel.sequence_parallel", TP, "2 or more"]),
    ({"parallel.overlap_param_gather": True}, 2, ["parallel.use_distributed_optimizer=true"]),
    (
        {"parallel.overlap_param_gather": True, "parallel.use_distributed_optimizer": True},
        2,
        ["parallel.overlap_grad_reduce=true"],
    ),
    # the network itself
    ({"model.mixers": []}, 1, ["model.mixers is empty", "[gla,swa]"]),
    ({"model.mixers": [Mixer.gla] * 9}, 1, ["model.mixers", "9 mixers", "model.num_layers=8"]),
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
        {"model.rope_scaling.factor": 8.0, "model.rope_scaling.low_freq_factor": 4.0},
        1,
        ["model.rope_scaling.high_freq_factor=4.0", "greater than", "low_freq_factor=4.0"],
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
    ({"stage.train_iters": 0}, 1, ["stage.train_iters=0", "at least 1"]),
    # teachers
    ({"stage.kind": StageKind.align}, 1, ["stage.kind=align", "stage.teacher is null"]),
    ({"stage.distillation.weight": 0.5}, 1, ["stage.distillation.weight=0.5", "stage.teacher is null"]),
    ({"stage.distillation.weight": 1.5}, 1, ["stage.distillation.weight=1.5", "between 0", "and 1"]),
    ({"stage.distillation.temperature": 0.0}, 1, ["stage.distillation.temperature", "greater than 0"]),
    (
        {"stage.kind": StageKind.align, "stage.teacher": "dense", "stage.distillation.weight": 0.5},
        1,
        ["stage.distillation.weight", "0", "stage.kind=cpt"],
    ),
    # optimizer and schedule
    ({"optimizer.lr": -1e-3}, 1, ["optimizer.lr=-0.001", "greater than 0"]),
    ({"optimizer.lr": NAN}, 1, ["optimizer.lr=nan", "finite"]),
    ({"optimizer.weight_decay": INFINITY}, 1, ["optimizer.weight_decay=inf", "finite"]),
    ({"data.train_weights": [1.0, NAN]}, 1, ["data.train_weights=nan", "finite"]),
    ({"optimizer.min_lr": 1.0}, 1, ["optimizer.min_lr=1.0", "optimizer.lr=0.0005"]),
    ({"optimizer.adam_beta2": 1.0}, 1, ["optimizer.adam_beta2=1.0", "below 1"]),
    ({"optimizer.adam_beta1": -0.1}, 1, ["optimizer.adam_beta1=-0.1", "at least 0"]),
    ({"optimizer.adam_eps": 0.0}, 1, ["optimizer.adam_eps=0.0", "greater than 0"]),
    ({"optimizer.clip_grad": -1.0}, 1, ["optimizer.clip_grad=-1.0", "at least 0"]),
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
        ["cluster.kernels.gated_linear_attention=fla", "auto or chunk or recurrent"],
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


def test_odd_head_width_is_fine_without_rotary_positions():
    check_run_config(changed(valid_run(), {"model.kv_channels": 15, "model.mixers": [Mixer.gla]}), 1)


@pytest.mark.parametrize("number", [1, 2, 9, 12, 28, 97, 18944])
def test_divisors_are_all_numbers_that_divide(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
