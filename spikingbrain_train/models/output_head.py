"""The loss of the last pipeline stage with the vocabulary split over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from spikingbrain_train.ops.linear_cross_entropy import (
    Distillation,
    KeptDistillation,
    TokenLosses,
    linear_cross_entropy,
)


def gather_hidden_states(
    hidden_states: Tensor,
    *,
    num_sink_tokens: int,
    sequence_parallel: bool,
    tp_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Bring final hidden states in front of the vocabulary-parallel projection.

    Args:
        hidden_states: [N + T, B, D], or this rank's share of it under sequence parallelism.
        num_sink_tokens: N, tokens in front of the text, which have no loss.
        sequence_parallel: whether it is a share.
        tp_group: tensor-parallel ranks.

    Returns:
        [B * T, D], batch-major; its gradient is summed over the ranks (and split again under sequence
        parallelism).
    """
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    text_BTD = hidden_states[num_sink_tokens:].transpose(0, 1)
    if not sequence_parallel:
        # Contiguous first: of other gradients megatron-core 0.16 sums a copy and returns the unsummed one.
        text_BTD = copy_to_tensor_model_parallel_region(text_BTD.contiguous(), group=tp_group)
    return text_BTD.flatten(0, 1)


def vocab_parallel_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    vocab_size: int,
    num_sink_tokens: int,
    sequence_parallel: bool,
    tp_group: torch.distributed.ProcessGroup,
    distillation: Distillation | KeptDistillation | None = None,
) -> tuple[Tensor, TokenLosses]:
    """Weighted sum of next-token losses; the same numbers on any number of tensor-parallel ranks.

    Args:
        hidden_states: [N + T, B, D] final hidden states, N sinks first (this rank's share under sequence
            parallelism).
        weight: [V_local, D] this rank's rows of the output projection, padding included.
        labels: [B, T] int64.
        loss_weights: [B, T] float32 weight of each token; 0 masks it.
        vocab_size: rows of the whole vocabulary without padding; padding takes no part in the softmax.
        num_sink_tokens: N.
        sequence_parallel: whether hidden_states is a share of the sequence.
        tp_group: tensor-parallel ranks.
        distillation: soft targets of the tokens in the same (batch-major) order. Hidden states of a teacher
            are [B * T, D], and its weight has this rank's rows, padding included.

    Returns:
        The scalar sum and the per-token losses, [B * T] in batch-major order.
    """
    hidden = gather_hidden_states(
        hidden_states,
        num_sink_tokens=num_sink_tokens,
        sequence_parallel=sequence_parallel,
        tp_group=tp_group,
    )
    vocab_start = tp_group.rank() * weight.shape[0]
    valid_rows = valid_vocab_rows(weight.shape[0], vocab_size, tp_group)
    if valid_rows < weight.shape[0]:  # a slice of everything would cost a pass over its gradient
        weight = weight[:valid_rows]
    if isinstance(distillation, Distillation):
        distillation = replace(distillation, teacher_weight=distillation.teacher_weight[:valid_rows])
    reductions = {}
    if tp_group.size() > 1:
        reductions = {"reduce_max": _reduction("MAX", tp_group), "reduce_sum": _reduction("SUM", tp_group)}
    return linear_cross_entropy(
        hidden,
        weight,
        labels.flatten(),
        loss_weights.flatten(),
        vocab_start=vocab_start,
        distillation=distillation,
        **reductions,
    )


def vocab_parallel_logits(
    hidden_ND: Tensor, weight: Tensor, vocab_size: int, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Logits of some tokens over the whole vocabulary, on every tensor-parallel rank.

    Args:
        hidden_ND: [N, D] final hidden states, the same on all ranks.
        weight: [V_local, D] this rank's rows of the output projection, padding included.
        vocab_size: rows of the whole vocabulary without padding.
        tp_group: tensor-parallel ranks.

    Returns:
        [N, vocab_size] float32.
    """
    logits = torch.nn.functional.linear(hidden_ND, weight)
    if tp_group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(tp_group.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=tp_group)
        logits = torch.cat(parts, dim=-1)
    return logits[:, :vocab_size].float()


def valid_vocab_rows(local_rows: int, vocab_size: int, tp_group: torch.distributed.ProcessGroup) -> int:
    """How many of this rank's vocabulary rows are real, the rest being padding."""
    return min(max(vocab_size - tp_group.rank() * local_rows, 0), local_rows)


def _reduction(operation: str, group: torch.distributed.ProcessGroup):
    def reduce(x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x, op=getattr(torch.distributed.ReduceOp, operation), group=group)
        return x

    return reduce
