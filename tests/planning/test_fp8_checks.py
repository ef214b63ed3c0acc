"""FP8 where it cannot be, or would not be what was meant, is refused before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import launched_world_size
from tests.planning.test_precision import store_run


def config_of(*settings: str) -> RunConfig:
    return to_run_config(compose_run(["dry_run=true", "fp8.format=hybrid", "precision=bf16", *settings]))


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "fp32": (["precision=fp32"], "precision=fp32; set precision=bf16, or fp8.format=null"),
    "MetaX": (["cluster=c550"], "needs NVIDIA GPUs, but cluster.accelerator=metax"),
    "A800": (["cluster=a800"], "cluster.fp8_peak_tflops=0 says that these do not"),
    "a recipe of newer GPUs": (
        ["cluster=h100", "fp8.recipe=mxfp8"],
        "needs a GPU of compute capability 10.0 to 11 (Blackwell of data centres), but "
        "cluster.compute_capability=9.0; choose fp8.recipe=tensorwise or blockwise, or set fp8.format=null",
    ),
    "GPUs before Ada": (
        ["cluster=nvidia", "cluster.compute_capability=8.6"],
        "needs a GPU of compute capability 8.9 or later (Ada, Hopper), but cluster.compute_capability=8.6; "
        "set fp8.format=null",
    ),
    "a capability as compilers write it": (
        ["cluster=nvidia", "cluster.compute_capability=90"],
        "cluster.compute_capability=90.0 must be",
    ),
    "megatron-core's linears on a GPU": (
        ["cluster=h100", "cluster.kernels.parallel_linear=megatron"],
        "needs Transformer Engine's linears on GPUs, but cluster.kernels.parallel_linear=megatron",
    ),
    "grouped_gemm": (
        ["model=tiny_76b", "cluster=h100", "cluster.kernels.experts=grouped_gemm"],
        "cluster.kernels.experts=grouped_gemm multiplies bfloat16 only, but fp8.format asks for FP8",
    ),
    "a width": (
        ["cluster=h100", "model.ffn_hidden_size=184"],
        "multiplies matrices whose sides are multiples of 16, but mlp.linear_fc2.weight is 64 x 184",
    ),
    "a width on a rank": (
        ["cluster=nvidia", "model.ffn_hidden_size=160", "parallel=tp2", "fp8.recipe=mxfp8"],
        "mlp.linear_fc2.weight is 64 x 80 on a rank",
    ),
    "tokens": (
        ["cluster=h100", "stage.seq_length=1000", "stage.micro_batch_size=1"],
        "stage.seq_length=1000 x stage.micro_batch_size=1 leaves 1000 on a rank; set "
        "stage.seq_length=992 or 1008",
    ),
    "tokens with sinks": (
        ["cluster=h100", "model.num_sink_tokens=4", "stage.seq_length=256", "stage.micro_batch_size=1"],
        "stage.seq_length=256 with 4 sinks x stage.micro_batch_size=1 leaves 260 on a rank; set "
        "stage.seq_length=252 or 268",
    ),
    "spikes": (
        ["model.spiking.projections=[mlp_fc1]"],
        "would round numbers again that model.spiking has made",
    ),
    "INT8 weights": (["model.quantization.projections=[qkv]"], "that model.quantization has made"),
    "ternary weights": (["model.ternary.projections=[qkv]"], "that model.ternary has made"),
    "INT8 inputs": (["model.int8_inputs.projections=[qkv]"], "that model.int8_inputs has made"),
    "ZeRO 3": (
        ["parallel.engine=deepspeed", "parallel.zero.stage=3"],
        "parallel.zero.stage=3 takes them away between products; set parallel.zero.stage=2",
    ),
    "no layer left": (
        ["fp8.num_layers_at_start_in_bf16=2", "fp8.num_layers_at_end_in_bf16=2"],
        "leave none of 4 layers to it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_what_to_change(what: str) -> None:
    settings, sentence = REFUSED[what]
    base = [] if any(each.startswith("model=") for each in settings) else ["model=tiny_hybrid"]
    config = config_of(*base, *settings)
    with pytest.raises(ConfigurationError) as error:
        check_run_config(config, config.parallel.model_parallel_size)
    assert sentence in str(error.value)


def test_a_run_that_keeps_its_fp32_is_not_told_to_take_bf16(tmp_path: Path) -> None:
    store_run(tmp_path, Precision.fp32)
    for asked in ("auto", "fp32"):
        config = config_of("model=tiny_hybrid", f"output_dir={tmp_path}", f"precision={asked}")
        with pytest.raises(ConfigurationError) as error:
            check_run_config(config, 1)
        assert f"another output_dir, checkpoint.load={tmp_path}/checkpoints and precision=bf16" in str(
            error.value
        )
        assert "set precision" not in str(error.value)


def test_delayed_scales_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigurationError, match="delayed scales come of steps before, which checkpoints"):
        config_of("model=tiny_hybrid", "fp8.recipe=delayed")


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("number_format", ["e4m3", "hybrid"])
def test_every_format_and_recipe_is_taken(number_format: str, recipe: str) -> None:
    for cluster in ("cpu", "nvidia" if recipe == "mxfp8" else "h100", "auto"):
        settings = ("model=tiny_hybrid", f"cluster={cluster}", f"fp8.recipe={recipe}")
        check_run_config(config_of(*settings, f"fp8.format={number_format}"), 1)


def test_cpus_take_any_width_and_length() -> None:
    sizes = ("model.ffn_hidden_size=184", "stage.seq_length=250")
    check_run_config(config_of("model=tiny_hybrid", "cluster=cpu", *sizes), 1)


def test_the_shapes_of_layers_in_bf16_do_not_matter() -> None:
    """Gates have a row a head, and adapters a few rows: neither is multiplied in FP8."""
    check_run_config(config_of("model=tiny_hybrid", "cluster=h100", "model.mixers=[gdn]"), 1)
    adapters = ("model.lora.names=[one]", "model.lora.target_modules=[q_proj]", "model.lora.ranks=[4]")
    check_run_config(config_of("model=tiny_hybrid", "cluster=h100", *adapters), 1)


def test_the_presets_of_spikingbrain_take_fp8_on_h100() -> None:
    for name in ("7b_8k", "7b_align", "76b_8k"):
        config = config_of(f"experiment=spikingbrain_{name}", "cluster=h100", "checkpoint.load=null")
        check_run_config(config, launched_world_size(config))
