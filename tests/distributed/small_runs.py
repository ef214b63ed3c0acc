"""Small training runs for distributed tests: a model with every mixer, real text, and a first checkpoint.

:func:`train` is what runs on every rank of the pool; it goes through the same Trainer as ``train.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy

from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
    ParallelHybridConfig,
)
from spikingbrain_train.config.parallel import (
    ClusterConfig,
    ContextParallelConfig,
    LinearAttentionContextParallel,
    ParallelConfig,
)
from spikingbrain_train.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
)
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import shares_its_world

if TYPE_CHECKING:
    from spikingbrain_train.training.stages.losses import StepLosses

# Every mixer, biases, q/k norms; 130 tokens leave the vocabulary's last tensor-parallel rank mostly padding.
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=130,
    max_position_embeddings=128,
    mixers=["gla", "swa", "gla", "full"],
    sliding_window=9,
    # ReLU features make some outputs of so small a model (almost) zero; the norm behind them divides by
    # sqrt(epsilon), and a feature that rounding pushes across zero would show as a jump of the gradient.
    norm_epsilon=1e-2,
    add_qkv_bias=True,
    qk_layernorm=True,
    share_embeddings_and_output_weights=True,
)
DENSE = replace(MODEL, mixers=["full"])
MODEL_76B = replace(
    MODEL,
    mixers=[["gla", "swa"], ["gla", "full"]],
    gla=GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
    parallel_hybrid=ParallelHybridConfig(init_softmax_weight=0.8, init_linear_weight=0.4),
    num_sink_tokens=4,
    feed_forwards=["dense", "moe"],
    moe=MoEConfig(num_experts=4, router_topk=1, num_shared_experts=1),
)


class ByteTokenizer:
    """One token a byte, for texts in ASCII."""

    name = "bytes"
    fingerprint = "bytes-130"
    earlier_fingerprint = ""
    vocab_size = 130
    eos_id = 129

    def encode(self, text: str) -> list[int]:
        return [*text.encode("ascii", "replace"), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 128).decode("ascii")


def write_text(folder: Path, lines: int | None = None) -> Path:
    """An indexed dataset: Python's documentation of assignments, one token a byte, one document a line.

    Args:
        folder: existing folder for it.
        lines: take the first; None takes all.

    Returns:
        Its prefix.
    """
    staging = folder / "staging"
    staging.mkdir()
    tokenizer = ByteTokenizer()
    writer = IndexedDatasetWriter(folder / "assignment", tokenizer, staging)
    for line in topics["assignment"].splitlines()[:lines]:
        tokens = numpy.asarray(tokenizer.encode(line), dtype=writer.dtype)
        writer.add_document(tokens, text_bytes=len(tokens))
    writer.finish()
    writer.publish()
    return folder / "assignment"


def run_config(output_dir: Path, data: Path, *, model: ModelConfig = MODEL, **changes: Any) -> RunConfig:
    """Ten fp32 steps of four sequences of 32 tokens, evaluations of eight; ``changes`` replace fields."""
    config = RunConfig(
        model=model,
        cluster=ClusterConfig(peak_tflops=0.1),
        data=DataConfig(train=[str(data)]),
        # AdamW turns a gradient that is all rounding into a full step; an eps above rounding keeps such noise
        # out of comparisons between topologies.
        optimizer=OptimizerConfig(
            lr=1e-2, lr_warmup_iters=2, clip_grad=0.5, new_parameter_lr_mult=3.0, adam_eps=1e-6
        ),
        stage=StageConfig(train_iters=10, seq_length=32, global_batch_size=4, micro_batch_size=1),
        logging=LoggingConfig(log_interval=1, eval_iters=2, tensorboard=False),
        output_dir=str(output_dir),
        precision=Precision.fp32,
    )
    return replace(config, **changes)


@shares_its_world
def train(
    groups: ProcessGroups, config: RunConfig, stop_after: int | None = None, saves_at_end: bool = True
) -> list[tuple[float, float]]:
    """Train and return (loss, gradient norm) of every step since the last resume, the same on every rank.

    Args:
        groups: of the ranks.
        config: the run.
        stop_after: the step after which the run is asked to stop; None lets it end by itself.
        saves_at_end: whether its last step is saved, which takes as long as several steps; a run that is only
            compared with another does without.
    """
    from spikingbrain_train.training.trainer import Trainer

    remember = Remember(stop_after)
    trainer = Trainer(config, groups, [remember])
    if not saves_at_end:
        _leave_out_the_last_checkpoint(trainer)
    trainer.train()
    return remember.steps


@shares_its_world
def train_and_not_save(
    groups: ProcessGroups, config: RunConfig, stop_after: int | None = None
) -> list[tuple[float, float]]:
    """:func:`train` of a run that is only compared: its last step is not saved."""
    return train(groups, config, stop_after, saves_at_end=False)


def _leave_out_the_last_checkpoint(trainer: Any) -> None:
    """Save where ``checkpoint.save_interval`` says so and not at the end."""
    from spikingbrain_train.training.callbacks.checkpointing import Checkpointing

    (checkpointing,) = (each for each in trainer.callbacks if isinstance(each, Checkpointing))
    save = checkpointing._save
    checkpointing._save = lambda ends: None if ends else save(ends)  # type: ignore[method-assign]


def behind_gradients(trainer: Any, action: Callable[[], None]) -> None:
    """Have ``action`` happen wherever the gradients of a step have been computed and reduced."""
    compute = trainer.stage.forward_backward

    def forward_backward(*arguments: Any) -> StepLosses:
        losses: StepLosses = compute(*arguments)
        action()
        return losses

    trainer.stage.forward_backward = forward_backward


class Remember(Callback):
    """Keeps (loss, gradient norm) of every step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[tuple[float, float]] = []
        self._stop_after = stop_after

    def vote(self, losses: StepLosses) -> int:
        self._loss = losses.reduced()["train/loss"]
        return 0

    def before_update(self, grad_norm: float) -> None:
        self.steps.append((self._loss, grad_norm))
        if len(self.steps) == self._stop_after:
            self.run.stop("enough has been seen")


def values_of(metric: str, run: Path) -> list[float]:
    """What a run reported of a metric, point after point."""
    return [point[metric] for point in read_metrics(run) if metric in point]


TOPOLOGIES: dict[str, tuple[int, ParallelConfig]] = {
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "PP 2, uneven": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, pipeline_model_parallel_layout=[3, 1]),
    ),
    "PP 4": (4, ParallelConfig(pipeline_model_parallel_size=4)),
    "PP 2 of 2 virtual stages": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "TP 2 + sequence parallel x PP 2 of 2 virtual stages, overlapped distributed optimizer": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    ),
    "DP 2": (2, ParallelConfig()),
    "DP 2, distributed optimizer": (2, ParallelConfig(use_distributed_optimizer=True)),
    "EP 2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "CP 2": (2, ParallelConfig(context_parallel_size=2)),
    "CP 2 with all-scan, distributed optimizer": (
        2,
        ParallelConfig(
            context_parallel_size=2,
            context_parallel=ContextParallelConfig(
                gated_linear_attention=LinearAttentionContextParallel.allscan
            ),
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
        ),
    ),
    "TP 2 + sequence parallel x CP 2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
    ),
    "PP 2 x CP 2": (4, ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2)),
    "TP 2 x PP 2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP 2 + sequence parallel x DP 2, overlapped distributed optimizer": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    ),
}


def checkpoint_config(load: Path | None = None, **changes: Any) -> CheckpointConfig:
    """Start from ``load``; save only at the end unless ``changes`` say otherwise."""
    return CheckpointConfig(load=None if load is None else str(load), **changes)
