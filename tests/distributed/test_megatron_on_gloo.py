"""megatron-core's own GPTModel trains over gloo and gives one rank's numbers under every kind of parallelism.

Only the platform seam is under test here: the model is megatron's, with a plain RMSNorm (its own refuses
sequence parallelism). Tolerance: fp32 losses and gradient norms agree to 1e-5 relative, because summation
orders differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool

STEPS, GLOBAL_BATCH, SEQ_LENGTH, VOCAB_SIZE, LAYERS = 5, 4, 32, 96, 2
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Variant:
    """What a run does besides its parallel degrees."""

    bf16: bool = False
    tied: bool = False
    recompute: bool = False
    overlap: bool = False


class PlainRMSNorm(torch.nn.Module):
    """RMSNorm over the last dim whose gradient is summed over sequence-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _build_model(groups: ProcessGroups, parallel: ParallelConfig, variant: Variant):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=variant.bf16,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        **(recompute if variant.recompute else {}),
    )
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = PlainRMSNorm
    block = TransformerBlockSubmodules(
        [layer] * (LAYERS // parallel.pipeline_model_parallel_size), PlainRMSNorm
    )
    model = GPTModel(
        config,
        block,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LENGTH,
        pre_process=groups.is_pipeline_first_stage,
        post_process=groups.is_pipeline_last_stage,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=variant.tied,
    )
    _same_weights_everywhere(model, groups)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    return config, Float16Module(config, model) if variant.bf16 else model


def _same_weights_everywhere(model: torch.nn.Module, groups: ProcessGroups) -> None:
    """Every rank takes its slice of a full tensor that depends on the parameter's global name alone."""
    rank, size = groups.tensor_model_parallel_rank, groups.tensor_model_parallel_size
    first_layer = LAYERS // groups.pipeline_model_parallel_size * groups.pipeline_model_parallel_rank
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            parts[parts.index("layers") + 1] = str(int(parts[parts.index("layers") + 1]) + first_layer)
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            parts = ["embedding", "word_embeddings", "weight"]
        if not getattr(parameter, "tensor_model_parallel", False):
            size_here, dim = 1, 0
        else:
            size_here, dim = size, parameter.partition_dim
        shape = list(parameter.shape)
        shape[dim] *= size_here
        generator = torch.Generator().manual_seed(sum(map(ord, "/".join(parts))))
        full = 0.02 * torch.randn(shape, generator=generator)
        if full.dim() == 1:
            full += 1.0
        halves = full.chunk(2, dim) if parts[-2] == "linear_fc1" else (full,)  # gate and up are split apart
        mine = torch.cat([half.chunk(size_here, dim)[rank % size_here] for half in halves], dim)
        parameter.data.copy_(mine)


def _train(groups: ProcessGroups, parallel: ParallelConfig, variant: Variant) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, the same on all ranks."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, model = _build_model(groups, parallel, variant)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=variant.overlap,
        overlap_param_gather=variant.overlap and parallel.use_distributed_optimizer,
    )
    model = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=0.5,  # below the norms seen, so clipping takes part
            bf16=variant.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    generator = torch.Generator().manual_seed(0)
    microbatches = GLOBAL_BATCH // groups.data_parallel_size
    history = []
    for _ in range(STEPS):
        batch = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH, 1, SEQ_LENGTH + 1), generator=generator)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batch[groups.data_parallel_rank :: groups.data_parallel_size]),
            model=[model],
            num_microbatches=microbatches,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        loss = torch.stack([output["loss"] for output in outputs]).sum() if outputs else torch.zeros(())
        torch.distributed.all_reduce(loss)  # non-last stages add zero; tensor-parallel ranks are copies
        history.append((loss.item() / GLOBAL_BATCH / groups.tensor_model_parallel_size, float(grad_norm)))
    return history


def _forward_step(batches, model):
    tokens = next(batches)
    positions = torch.arange(SEQ_LENGTH)[None]
    future = torch.ones(1, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).triu(1)
    return model(tokens[:, :-1], positions, future, labels=tokens[:, 1:]), _mean_loss


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool):
    """Histories of single-rank runs by variant, each computed once."""
    known: dict[Variant, list[tuple[float, float]]] = {}

    def history(variant: Variant) -> list[tuple[float, float]]:
        if variant not in known:
            [known[variant]] = ranks.run(
                _train, ParallelConfig(), variant, world_size=1, parallel=ParallelConfig()
            )
        return known[variant]

    return history


LAYOUTS = {
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2), Variant()),
    "TP 2 + SP": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), Variant()),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2), Variant()),
    "PP 2, tied embeddings": (2, ParallelConfig(pipeline_model_parallel_size=2), Variant(tied=True)),
    "DP 2": (2, ParallelConfig(), Variant()),
    "DP 2, overlapped reduction": (2, ParallelConfig(), Variant(overlap=True)),
    "distributed optimizer": (2, ParallelConfig(use_distributed_optimizer=True), Variant()),
    "distributed optimizer, overlapped": (
        2,
        ParallelConfig(use_distributed_optimizer=True),
        Variant(overlap=True),
    ),
    "TP 2 x PP 2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        Variant(),
    ),
    "TP 2 + SP x DP 2, distributed optimizer, recomputation": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
        Variant(recompute=True),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_rank(ranks: RankPool, one_rank, layout: str) -> None:
    world_size, parallel, variant = LAYOUTS[layout]
    expected = one_rank(Variant(tied=variant.tied))
    histories = ranks.run(_train, parallel, variant, world_size=world_size, parallel=parallel)
    torch.testing.assert_close(
        torch.tensor(histories), torch.tensor([expected] * world_size), rtol=TOLERANCE, atol=0
    )


def test_training_learns(one_rank) -> None:
    """Guards the comparisons above: equal losses of a model that stands still would prove nothing."""
    losses = [loss for loss, _ in one_rank(Variant())]
    assert max(losses) - min(losses) > 1e-3
    assert all(norm > 0.5 for _, norm in one_rank(Variant()))


def test_bf16_with_distributed_optimizer_follows_fp32(ranks: RankPool, one_rank) -> None:
    """bf16 keeps 8 bits of mantissa: losses near 4.6 agree to about 1e-3 relative."""
    parallel = ParallelConfig(use_distributed_optimizer=True)
    [history, _] = ranks.run(_train, parallel, Variant(bf16=True), world_size=2, parallel=parallel)
    bf16, fp32 = ([loss for loss, _ in run] for run in (history, one_rank(Variant())))
    torch.testing.assert_close(torch.tensor(bf16), torch.tensor(fp32), rtol=2e-3, atol=0)
    assert bf16 != fp32
