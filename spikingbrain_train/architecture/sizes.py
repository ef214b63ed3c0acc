"""What one rank has of a run: tokens, heads and bytes, from which kinds work out what they keep."""

from __future__ import annotations

from spikingbrain_train.architecture.head_shares import head_shares
from spikingbrain_train.config.run import Precision, RunConfig

FP32 = 4
"""Bytes of a float32 number."""


def bytes_per_element(precision: Precision) -> int:
    """Bytes of a weight or activation."""
    return {Precision.bf16: 2, Precision.fp32: FP32}[precision]


def torch_name(precision: Precision) -> str:
    """What torch calls the numbers of activations; bf16 where the precision is not settled."""
    return "float32" if precision is Precision.fp32 else "bfloat16"


def rank_tokens(config: RunConfig) -> float:
    """Tokens of a micro-batch on one rank, sinks included, before sequence parallelism."""
    tokens = config.stage.micro_batch_size * (config.stage.seq_length + config.model.num_sink_tokens)
    return tokens / config.parallel.context_parallel_size


def row_bytes(config: RunConfig) -> float:
    """Bytes per token of a hidden state on one rank, a share of it under sequence parallelism."""
    parallel = config.parallel
    shared_out = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return config.model.hidden_size * bytes_per_element(config.precision) / shared_out


def heads_and_groups(config: RunConfig, num_query_groups: int | None = None) -> tuple[int, int]:
    """Query heads and groups of a tensor-parallel rank; null groups are the model's."""
    tensor = config.parallel.tensor_model_parallel_size
    return (
        config.model.num_attention_heads // tensor,
        (num_query_groups or config.model.num_query_groups) // tensor,
    )


def ulysses_heads_and_groups(config: RunConfig, num_query_groups: int | None = None) -> tuple[int, int]:
    """Heads and groups of whole sequences on the rank with the largest share, per token of a slice."""
    ranks = config.parallel.context_parallel_size
    shares = head_shares(*heads_and_groups(config, num_query_groups), ranks)
    return (
        ranks * max(len(share.heads) for share in shares),
        ranks * max(len(share.groups) for share in shares),
    )


def visible_keys(seq_length: int, window: int | None = None) -> float:
    """Keys that a causal query sees, on average over a sequence; the query itself counts.

    Full attention: (T + 1) / 2. A window w < T: the first w queries see 1 .. w keys, the others w.
    """
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length
