"""What the ranks that share a sequence send each other in a layer, without torch.

The formulas are those that benchmarks/context_parallel_traffic.py holds to counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.sizes import (
    FP32,
    bytes_per_element,
    heads_and_groups,
    rank_tokens,
)
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.config.run import RunConfig


@dataclass(frozen=True)
class ContextTraffic:
    """Bytes that the busiest rank sends for one micro-batch."""

    forward: float
    backward: float
    all_to_all: bool = False
    """Whether every rank sends an equal part to every other one, and not along a ring."""


NO_TRAFFIC = ContextTraffic(0.0, 0.0)


def ulysses_traffic(config: RunConfig, per_group: int, num_query_groups: int | None = None) -> ContextTraffic:
    """Ulysses: queries, ``per_group`` tensors of the groups and outputs change ranks, and their gradients.

    A rank sends T / n tokens to n - 1 others, H / n heads and max(G, n) / n groups each.

    Args:
        config: the run.
        per_group: 2 for keys and values; 3 with gates, which are counted as wide as the activations.
        num_query_groups: groups; None is the model's.
    """
    ranks = config.parallel.context_parallel_size
    heads, groups = heads_and_groups(config, num_query_groups)
    width = config.model.kv_channels * bytes_per_element(config.precision)
    sent = rank_tokens(config) * (ranks - 1) / ranks * (2 * heads + per_group * max(groups, ranks)) * width
    return ContextTraffic(sent, sent, all_to_all=True)


def state_traffic(config: RunConfig, num_query_groups: int, *, transition: int) -> ContextTraffic:
    """States of a recurrence, in float32: LASP-2's all-gather or ZeCO's scan; or Ulysses with its gates.

    Args:
        config: the run.
        num_query_groups: groups of the whole layer; each has a state of K V numbers.
        transition: numbers a group of what a slice makes of the state before it: K decays, or a K K matrix.
    """
    parallel = config.parallel
    method, others = parallel.context_parallel.gated_linear_attention, parallel.context_parallel_size - 1
    if method is LinearAttentionContextParallel.ulysses:
        return ulysses_traffic(config, per_group=3, num_query_groups=num_query_groups)
    _, groups = heads_and_groups(config, num_query_groups)
    groups *= config.stage.micro_batch_size
    state = groups * config.model.kv_channels**2 * FP32
    if method is LinearAttentionContextParallel.allscan:
        return ContextTraffic(state, state)
    return ContextTraffic(others * (state + groups * transition * FP32), others * state)


def halo_traffic(config: RunConfig, window: int) -> ContextTraffic:
    """Keys and values that a window reaches on the ranks before, those of sinks too, and their gradients."""
    _, groups = heads_and_groups(config)
    width = config.model.kv_channels * bytes_per_element(config.precision)
    tokens = (min(window - 1, config.stage.seq_length) + config.model.num_sink_tokens) * (
        config.stage.micro_batch_size
    )
    sent = tokens * 2 * groups * width
    return ContextTraffic(sent, sent)
