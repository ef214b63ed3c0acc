"""FP8 products against the rest of a run: said before torch is imported.

What only the machine knows (its GPU, the releases that are installed) is asked at the start of a run:
``runtime/fp8.py``.
"""

from __future__ import annotations

from math import lcm

from spikingbrain_train.architecture.backends.fp8 import RECIPES
from spikingbrain_train.architecture.fp8 import fp8_weights
from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.sizes import rank_tokens
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    WEIGHTS_STAGE,
    AcceleratorKind,
    EngineKind,
    ParallelLinearBackend,
)
from spikingbrain_train.config.require import either, multiples_around, require
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.precision import PrecisionChoice, expected_precision
from spikingbrain_train.planning.resume import run_to_resume

_GPUS = (AcceleratorKind.cuda, AcceleratorKind.metax)


def check_fp8(config: RunConfig) -> None:
    """What multiplies in FP8 can, and gives what was meant. Raises ConfigurationError.

    Raises also:
        CheckpointError: a checkpoint of this run, whose precision it would keep, is damaged.
    """
    fp8 = config.fp8
    if fp8.format is None:
        return
    asked = f"fp8.format={fp8.format.value}"
    check_precision_of_fp8(config, expected_precision(config))
    _check_layers(fp8, config.model, asked)
    _check_machine(config, asked)
    _check_transforms(config.model, asked)
    require(
        config.parallel.engine is not EngineKind.deepspeed or config.parallel.zero.stage < WEIGHTS_STAGE,
        f"{asked} rounds weights that a rank has, but parallel.zero.stage=3 takes them away between "
        f"products; set parallel.zero.stage=2, or fp8.format=null",
    )
    if config.cluster.accelerator is not AcceleratorKind.cpu:
        _check_sizes(config, asked)


def check_precision_of_fp8(config: RunConfig, choice: PrecisionChoice) -> None:
    """FP8 stands beside bf16.

    Args:
        config: a run.
        choice: what its precision is, or is expected to be.

    Raises:
        ConfigurationError: it multiplies in FP8, and its precision is another.
        CheckpointError: a checkpoint of this run is damaged.
    """
    if config.fp8.format is None or choice.precision is Precision.bf16:
        return
    stored = run_to_resume(config)
    remedy = "set precision=bf16, or fp8.format=null"
    if stored is not None and stored.config.precision is not Precision.bf16:  # and a run keeps its own
        remedy = (
            f"set fp8.format=null, or start a new run from its weights with another output_dir, "
            f"checkpoint.load={stored.checkpoint.parent} and precision=bf16"
        )
    raise ConfigurationError(
        f"fp8.format={config.fp8.format.value} rounds what bf16 weights and activations hold, but "
        f"{choice.describe()}; {remedy}"
    )


def _check_layers(fp8: Fp8Config, model: ModelConfig, asked: str) -> None:
    first, last = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    require(
        first + last < model.num_layers,
        f"{asked}, but fp8.num_layers_at_start_in_bf16={first} and fp8.num_layers_at_end_in_bf16={last} "
        f"leave none of {model.num_layers} layers to it; lower them, or set fp8.format=null",
    )


def _check_machine(config: RunConfig, asked: str) -> None:
    """As far as the config tells which machine it will be."""
    cluster = config.cluster
    require(
        cluster.accelerator is not AcceleratorKind.metax,
        f"{asked} needs NVIDIA GPUs, but cluster.accelerator=metax; set fp8.format=null",
    )
    require(
        cluster.fp8_peak_tflops != 0,
        f"{asked} needs GPUs that multiply FP8 numbers, but cluster.fp8_peak_tflops=0 says that these do not "
        f"(A100 and A800 have no such products); set fp8.format=null, or choose another cluster",
    )
    _check_recipe(config, asked)
    linears = cluster.kernels.parallel_linear
    require(
        cluster.accelerator not in _GPUS
        or linears in (ParallelLinearBackend.auto, ParallelLinearBackend.transformer_engine),
        f"{asked} needs Transformer Engine's linears on GPUs, but cluster.kernels.parallel_linear="
        f"{linears.value}; choose transformer_engine or auto, or set fp8.format=null",
    )


def _check_recipe(config: RunConfig, asked: str) -> None:
    """Against GPUs whose compute capability the cluster states."""
    stated, recipe = config.cluster.compute_capability, config.fp8.recipe
    if stated is None or config.cluster.accelerator is AcceleratorKind.cpu:
        return
    major, minor = (int(part) for part in f"{stated:.1f}".split("."))
    others = [other.value for other, its in RECIPES.items() if its.has((major, minor))]
    instead = f"choose fp8.recipe={' or '.join(others)}, or set" if others else "set"
    require(
        RECIPES[recipe].has((major, minor)),
        f"{asked} with fp8.recipe={recipe.value} needs {RECIPES[recipe].gpus}, but "
        f"cluster.compute_capability={stated:.1f}; {instead} fp8.format=null, or choose another cluster",
    )


def _check_transforms(model: ModelConfig, asked: str) -> None:
    """Whole numbers that spikes and quantised weights are made of would be rounded once more."""
    for kind in transforms_of(model):
        require(
            not (kind.changes_input or kind.changes_weight),
            f"{asked} would round numbers again that model.{kind.name} has made (the model {kind.words}), "
            f"and training would see others than an export computes with; set fp8.format=null, or take "
            f"model.{kind.name} out",
        )


def _check_sizes(config: RunConfig, asked: str) -> None:
    """Every product is one that GPUs have."""
    model, parallel, fp8 = config.model, config.parallel, config.fp8
    multiple, otherwise = RECIPES[fp8.recipe].multiple, "set fp8.format=null (CPUs take any: cluster=cpu)"
    asked += f" with fp8.recipe={fp8.recipe.value}"
    inside = (layer for number, layer in enumerate(layers(model)) if fp8.in_layer(number, model.num_layers))
    for layer in dict.fromkeys(inside):
        for weight in fp8_weights((*layer.mixer_weights(model), *layer.feed_forward_weights(model))):
            rows, columns = weight.matrix_on_rank(parallel)
            require(
                rows % multiple == columns % multiple == 0,
                f"{asked} multiplies matrices whose sides are multiples of {multiple}, but {weight.name} is "
                f"{rows} x {columns} on a rank; choose another tensor parallel degree, or {otherwise}",
            )
    _check_tokens(config, asked, multiple, otherwise)


def _check_tokens(config: RunConfig, asked: str, multiple: int, otherwise: str) -> None:
    parallel, stage, sinks = config.parallel, config.stage, config.model.num_sink_tokens
    shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    rows = stage.micro_batch_size
    step = lcm(multiple * shares * parallel.context_parallel_size, rows)
    nearest = [each // rows - sinks for each in multiples_around((stage.seq_length + sinks) * rows, step)]
    tokens, beside = rank_tokens(config) / shares, f" with {sinks} sinks" if sinks else ""
    require(
        tokens % multiple == 0,
        f"{asked} multiplies multiples of {multiple} tokens, but stage.seq_length={stage.seq_length}{beside} "
        f"x stage.micro_batch_size={rows} leaves {tokens:g} on a rank; set "
        f"stage.seq_length={either(each for each in nearest if each > 0)}, or {otherwise}",
    )
