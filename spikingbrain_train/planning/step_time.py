"""How long a step takes in a layout: arithmetic, bubble, communication. Without torch.

The model (letters: m micro-batches of a step, p pipeline ranks, v stages of each, t tensor-, c
context-parallel ranks):

- **Arithmetic.** Model FLOPs of a rank's share over ``EFFICIENCY`` x peak. A backward pass is twice the
  forward pass; what is computed again comes on top (arXiv 2104.04473, appendix; arXiv 2205.05198 for
  selective recomputation).
  Products of FP8 numbers (``fp8.format``) save what their peak is higher for of the time that they take in
  bf16, which is taken to be their FLOPs over ``PRODUCT_EFFICIENCY`` x peak; the rest of a step, which is why
  EFFICIENCY is lower, stays. That FP8 products come as near to their peak is not measured; rounding their
  operands is left out.
- **Pipeline.** 1F1B: the first micro-batch goes through all ranks, the others follow at the pace of the
  longest stage; with virtual stages (interleaved 1F1B) in v rounds, each at the pace of its longest one.
  T = m sum_j max_r t_jr + sum_r t_1r - max_r t_1r for stage t_jr of rank r in round j, which is
  (v m + p - 1) t for equal stages (arXiv 2104.04473, section 2.2: a bubble of (p - 1) / (v m) of the ideal
  time). That is what the schedule takes where stages are equal or one is longer, and at most a few percent
  more or less where they are uneven otherwise. Hidden states between stages are sent while nobody computes.
- **Tensor parallelism.** Two all-reduces of the hidden states a layer in each direction, of 2 (t - 1) / t
  times their bytes (arXiv 2104.04473, section 3.2); sequence parallelism sends the same as all-gather and
  reduce-scatter (arXiv 2205.05198, section 4.2.2), and its second all-gather hides behind the weights'
  gradient. None of it is hidden otherwise.
- **Context parallelism.** What each kind of mixer says (architecture/context_traffic.py), not hidden. Slices
  are taken to cost the same.
- **Expert parallelism.** Two all-to-alls of what is routed, in each direction, not hidden; experts are taken
  to be evenly loaded. SpikingBrain (arXiv 2509.05276, section 4) lays its 76B out so.
- **Data parallelism.** fp32 gradients are reduce-scattered and weights all-gathered (ZeRO-1, arXiv
  1910.02054), or gradients all-reduced. Reducing hides behind the backward pass of the last micro-batch with
  overlap_grad_reduce, gathering behind the forward pass of the first one with overlap_param_gather; what is
  left over counts.
- **DeepSpeed's ZeRO** (what its collectives were counted to send). Stages 1 and 2 all-reduce fp32 gradients,
  once a step and once a micro-batch, and all-gather weights behind the update. Stage 3 reduce-scatters
  gradients of every micro-batch and gathers weights for its forward pass and again for its backward pass, but
  for the last ones, which are kept; recomputation gathers them once more where a layer is larger than what is
  kept. With overlap_grad_reduce what a pass sends hides behind that pass, but for stage 1.
- **FSDP** (counted, too). In every micro-batch weights are gathered for the forward pass, those of layers
  again for the backward pass unless they are kept, and fp32 gradients reduce-scattered, over the data- and
  context-parallel ranks of a tensor-parallel rank. What a pass sends hides behind that pass.

Left out: the optimizer's arithmetic, latency, stragglers, checkpoints, evaluations. MFU counts the model's
own FLOPs, forward and backward, windows and causality in them, and no recomputation
(``StageKind.flops_per_token``); SpikingBrain's report does not say its formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

from spikingbrain_train.architecture.layers import Layer
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, rank_tokens
from spikingbrain_train.config.parallel import (
    KEPT_WEIGHTS,
    REDUCE_BUCKET,
    WEIGHTS_STAGE,
    EngineKind,
    ParallelConfig,
    Recompute,
)
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.costs import layers_per_stage
from spikingbrain_train.planning.layer_work import ModelWork, context_traffic, recomputed_flops
from spikingbrain_train.planning.topology import Group, Network

EFFICIENCY = 0.37
"""Share of a device's peak that the arithmetic of a rank reaches, bubble, recomputation and communication
aside.

Calibrated on one run alone: the 1.5B hybrid at 8k on one H200 without recomputation, 35,500 to 36,900 tokens
a second (benchmarks/training_step.md): 36,200 x 10.08 GFLOP are 36.9 % of 989.4 TFLOP/s."""


PRODUCT_EFFICIENCY = 0.79
"""Share of a device's peak that a large product by itself reaches in bf16.

784 of 989.4 TFLOP/s, measured at the start of a run on one H200 (benchmarks/training_step.md)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. All but ``seconds`` are means over the ranks, which add up to it."""

    seconds: float
    arithmetic: float
    """The model's own, forward and backward."""
    recomputation: float
    communication: float
    """What is not hidden behind arithmetic."""
    bubble: float
    """Waiting for other pipeline stages: at the beginning, at the end, and for longer ones."""
    mfu: float

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.seconds

    @property
    def communication_share(self) -> float:
        return self.communication / self.seconds


@dataclass(frozen=True)
class _LayerSeconds:
    """Of one layer for one micro-batch."""

    forward: float
    """Arithmetic of the forward pass."""
    recomputed: float
    communication: float
    at_peak_tflops: float
    """The forward pass again, as if nothing were multiplied in FP8: what MFU counts."""


@dataclass(frozen=True)
class _Seconds:
    """Of the first 0, 1, 2 ... layers, or of each (virtual) pipeline stage, for one micro-batch."""

    forward: list[float]
    recomputed: list[float]
    communication: list[float]
    at_peak_tflops: list[float]


def step_time(
    work: ModelWork, config: RunConfig, world_size: int, network: Network, efficiency: float = EFFICIENCY
) -> StepTime:
    """The time of a step of a checked run that trains all of its parameters on a token loss.

    Args:
        work: of the run's model.
        config: the run, with the layout.
        world_size: ranks.
        network: of the cluster.
        efficiency: share of the peak that arithmetic reaches.

    Raises:
        ConfigurationError: no peak is stated, or a mixer does not say what context-parallel ranks exchange.
    """
    peak = peak_flops(config)
    parallel, stage = config.parallel, config.stage
    replicas = world_size // parallel.model_parallel_size
    micro_batches = stage.global_batch_size // (stage.micro_batch_size * replicas)
    speed = peak * efficiency
    of_layers = _seconds_of_layers(work, config, network, speed)
    ends = [0, *accumulate(layers_per_stage(config.model, parallel))]
    stages = _stages(work, config, world_size, ends, of_layers, network, speed)
    ranks = parallel.pipeline_model_parallel_size
    arithmetic_of = [3 * forward for forward in stages.forward]
    parts = zip(arithmetic_of, stages.recomputed, stages.communication, strict=True)
    of_stages = [arithmetic + recomputed + sent for arithmetic, recomputed, sent in parts]
    rounds = [of_stages[first : first + ranks] for first in range(0, len(of_stages), ranks)]
    paces = [max(together) for together in rounds]
    pipeline = micro_batches * sum(paces) + sum(rounds[0]) - paces[0]
    if parallel.engine is not EngineKind.megatron:
        exchanged = _sharded_not_hidden(work, config, world_size, network, stages, micro_batches)
    else:
        exchanged = max(
            _not_hidden(parallel, exchange, sum(stages.forward[rank::ranks]))
            for rank, exchange in enumerate(_exchanges(work, config, world_size, ends, network))
        )
    seconds = pipeline + exchanged

    def mean(values: Sequence[float]) -> float:
        return sum(values) / ranks

    arithmetic = micro_batches * mean(arithmetic_of)
    recomputation = micro_batches * mean(stages.recomputed)
    communication = micro_batches * mean(stages.communication)
    communication += exchanged
    return StepTime(
        seconds=seconds,
        arithmetic=arithmetic,
        recomputation=recomputation,
        communication=communication,
        bubble=max(0.0, seconds - arithmetic - recomputation - communication),
        mfu=micro_batches * 3 * mean(stages.at_peak_tflops) * efficiency / seconds,
    )


def least_time(
    work: ModelWork, config: RunConfig, world_size: int, network: Network, efficiency: float = EFFICIENCY
) -> float:
    """Seconds that :func:`step_time` is not below: as if no rank waited for another, nor for its weights.

    Arguments and errors are those of :func:`step_time`; it looks at no stage and at no rank.
    """
    parallel, stage = config.parallel, config.stage
    speed = peak_flops(config) * efficiency
    of_layers = _seconds_of_layers(work, config, network, speed)
    text = stage.micro_batch_size * stage.seq_length / parallel.context_parallel_size
    output = work.output_flops * text / parallel.tensor_model_parallel_size / speed
    a_micro_batch = 3 * (of_layers.forward[-1] + output) + of_layers.recomputed[-1]
    a_micro_batch += of_layers.communication[-1]
    replicas = world_size // parallel.model_parallel_size
    micro_batches = stage.global_batch_size // (stage.micro_batch_size * replicas)
    # Sums in another order may differ in their last digits.
    return (1 - 1e-9) * micro_batches * a_micro_batch / parallel.pipeline_model_parallel_size


def peak_flops(config: RunConfig) -> float:
    """FLOP/s that a device is sold for. Raises ConfigurationError where the cluster states none."""
    if config.cluster.peak_tflops is None:
        raise ConfigurationError(
            "cluster.peak_tflops is null, so the time of a step is not known; set it, or choose "
            "cluster=a800, h100, h200 or c550, which state it"
        )
    return config.cluster.peak_tflops * 1e12


def fp8_saving(config: RunConfig, speed: float) -> float:
    """Share of the time reckoned for a linear that FP8 saves; 0 where the cluster states no peak of it.

    Args:
        config: the run.
        speed: FLOP/s that all arithmetic of a rank is reckoned with.
    """
    peak, fp8_peak = peak_flops(config), config.cluster.fp8_peak_tflops
    if not fp8_peak:
        return 0.0
    of_products = speed / max(speed, PRODUCT_EFFICIENCY * peak)
    return of_products * max(0.0, 1 - peak / (fp8_peak * 1e12))


def _seconds_of_layers(work: ModelWork, config: RunConfig, network: Network, speed: float) -> _Seconds:
    """Of the first 0, 1, 2 ... layers on a rank, remembered: thousands of layouts share them."""
    parallel = config.parallel
    key = (
        *(parallel.tensor_model_parallel_size, parallel.context_parallel_size),
        *(parallel.expert_model_parallel_size, parallel.expert_tensor_size, parallel.sequence_parallel),
        *(parallel.recompute, config.stage.micro_batch_size, network, speed),
    )
    if key not in work.known_seconds:
        number = len(work.layers)
        ordered = [(layer, config.fp8.in_layer(index, number)) for index, layer in enumerate(work.layers)]
        each = {
            key: _layer_seconds(work, config, key[0], network, speed, in_fp8=key[1]) for key in set(ordered)
        }
        work.known_seconds[key] = _Seconds(
            *(
                list(accumulate((getattr(each[key], part.name) for key in ordered), initial=0.0))
                for part in fields(_LayerSeconds)
            )
        )
    found: _Seconds = work.known_seconds[key]
    return found


def _layer_seconds(
    work: ModelWork, config: RunConfig, layer: Layer, network: Network, speed: float, *, in_fp8: bool
) -> _LayerSeconds:
    parallel, of_layer = config.parallel, work.of_layers[layer]
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    text = config.stage.micro_batch_size * config.stage.seq_length / context
    forward = of_layer.forward_flops * text / tensor / speed
    recomputed = recomputed_flops(config, layer) * text / tensor / speed
    at_peak_tflops, saved = forward, fp8_saving(config, speed) if in_fp8 else 0.0
    forward *= 1 - saved * of_layer.fp8_share
    # What is computed again is the whole layer, or linears of its feed-forward.
    recomputed *= 1 - saved * (of_layer.fp8_share if parallel.recompute is Recompute.full else 1.0)
    tokens = rank_tokens(config)
    hidden = tokens * config.model.hidden_size * bytes_per_element(config.precision)
    parts = 2 if of_layer.has_feed_forward else 1
    tensor_group = Group(tensor, 1)
    one_all_reduce = network.ring_seconds(tensor_group, 2 * hidden * (tensor - 1) / tensor)
    expert_group = Group(parallel.expert_model_parallel_size, parallel.expert_tensor_size)
    away = 1 - 1 / parallel.expert_model_parallel_size
    dispatched = layer.feed_forward.dispatched_bytes(config) * tokens * away
    one_all_to_all = network.all_to_all_seconds(expert_group, dispatched)
    traffic = context_traffic(config, layer)
    if traffic is None:
        raise ConfigurationError(
            f"parallel.context_parallel_size={context}: what context-parallel ranks exchange in "
            f"{layer.mixer_name} layers is not known, and so not how long that takes; set it to 1"
        )
    context_group = Group(context, tensor)
    send = network.all_to_all_seconds if traffic.all_to_all else network.ring_seconds
    # What is computed again communicates again: a whole layer, or the expert layer alone.
    passes = 3 if parallel.recompute is Recompute.full else 2
    expert_passes = 3 if parallel.recompute in (Recompute.full, Recompute.moe_layer) else 2
    forward_again = traffic.forward * (passes - 1)
    communication = (
        passes * parts * one_all_reduce
        + expert_passes * 2 * one_all_to_all
        + send(context_group, forward_again + traffic.backward)
    )
    return _LayerSeconds(forward, recomputed, communication, at_peak_tflops)


def _stages(
    work: ModelWork,
    config: RunConfig,
    world_size: int,
    ends: Sequence[int],
    of_layers: _Seconds,
    network: Network,
    speed: float,
) -> _Seconds:
    parallel = config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    ranks = parallel.pipeline_model_parallel_size
    text = config.stage.micro_batch_size * config.stage.seq_length / context
    output = work.output_flops * text / tensor / speed
    shared = tensor if parallel.sequence_parallel else 1
    message = rank_tokens(config) * config.model.hidden_size * bytes_per_element(config.precision) / shared
    stages = len(ends) - 1
    # From each stage to the next one: the rank behind, or from the last rank back to the first.
    ahead = network.send_seconds(world_size // ranks, message)
    back = network.send_seconds(world_size // ranks * (ranks - 1), message)
    hops = [0.0, *(ahead if stage % ranks else back for stage in range(1, stages)), 0.0]
    forward = _differences(of_layers.forward, ends)
    forward[-1] += output
    at_peak_tflops = _differences(of_layers.at_peak_tflops, ends)
    at_peak_tflops[-1] += output
    sent = zip(_differences(of_layers.communication, ends), pairwise(hops), strict=True)
    # To and from each neighbour once in a micro-batch; receiving is part of its sending.
    communication = [inside + before + behind for inside, (before, behind) in sent]
    return _Seconds(forward, _differences(of_layers.recomputed, ends), communication, at_peak_tflops)


def _differences(until: Sequence[float], ends: Sequence[int]) -> list[float]:
    """Of each stage, of what there is until each layer."""
    return [until[end] - until[start] for start, end in pairwise(ends)]


def _exchanges(
    work: ModelWork, config: RunConfig, world_size: int, ends: Sequence[int], network: Network
) -> list[tuple[float, float]]:
    """Of each pipeline rank the seconds of reducing gradients and of gathering weights once a step.

    Remembered: layouts that differ in recomputation and micro-batches share them.
    """
    parallel = config.parallel
    tensor, ranks = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    sharded = parallel.use_distributed_optimizer
    key = (tensor, ranks, expert, expert_tensor, sharded, world_size, network, tuple(ends))
    if key in work.known_seconds:
        known: list[tuple[float, float]] = work.known_seconds[key]
        return known
    stage_ranks, width = world_size // ranks, bytes_per_element(config.precision)
    groups = (
        Group(stage_ranks // tensor, tensor),
        Group(stage_ranks // (expert * expert_tensor), expert * expert_tensor),
    )
    of_experts, of_others = work.parameters_until(tensor, expert, expert_tensor)
    layers = list(pairwise(ends))
    found = []
    for rank in range(ranks):
        mine = layers[rank::ranks]
        experts = sum(of_experts[end] - of_experts[start] for start, end in mine)
        others = sum(of_others[end] - of_others[start] for start, end in mine)
        others += work.parameters_around(tensor, ranks, rank)
        reduced = gathered = 0.0
        for parameters, group in zip((others, experts), groups, strict=True):
            passed_on = parameters * (group.size - 1) / group.size
            if sharded:
                reduced += network.ring_seconds(group, passed_on * FP32)
                gathered += network.ring_seconds(group, passed_on * width)
            else:
                reduced += network.ring_seconds(group, 2 * passed_on * FP32)
        found.append((reduced, gathered))
    work.known_seconds[key] = found
    return found


def _not_hidden(parallel: ParallelConfig, exchange: tuple[float, float], forward: float) -> float:
    """What exchanging gradients and weights adds to a step of a rank, behind what hides it.

    Args:
        parallel: degrees, and what overlaps.
        exchange: seconds of reducing and of gathering.
        forward: seconds of its forward pass for one micro-batch, of all its stages.
    """
    reduced, gathered = exchange
    if parallel.overlap_grad_reduce:
        reduced = max(0.0, reduced - 2 * forward)
    if parallel.overlap_param_gather:
        gathered = max(0.0, gathered - forward)
    return reduced + gathered


@dataclass(frozen=True)
class ShardedTraffic:
    """Bytes that a rank passes on along a ring, in a step under DeepSpeed's ZeRO or FSDP."""

    forward: float = 0.0
    """In the forward pass of a micro-batch."""
    backward: float = 0.0
    """In its backward pass."""
    gradients: float = 0.0
    """Once, behind all backward passes."""
    weights: float = 0.0
    """Once, behind the update."""


def _zero_traffic(work: ModelWork, config: RunConfig, world_size: int) -> ShardedTraffic:
    """What ZeRO sends between ``world_size`` ranks that all train the whole model."""
    parallel, width = config.parallel, bytes_per_element(config.precision)
    passed_on = (world_size - 1) / world_size
    of_layers = [sum(work.parameters_of(layer, 1, 1, 1)) for layer in work.layers]
    whole = sum(of_layers) + work.parameters_around(1, 1, 0)
    gradients, weights = whole * FP32 * passed_on, whole * width * passed_on
    if parallel.zero.stage == 1:
        return ShardedTraffic(gradients=2 * gradients, weights=weights)
    if parallel.zero.stage < WEIGHTS_STAGE:
        return ShardedTraffic(backward=2 * gradients, weights=weights)
    # The output projection is gathered behind an update and stays.
    output = config.model.padded_vocab_size(1) * config.model.hidden_size
    kept = min(whole, REDUCE_BUCKET) * KEPT_WEIGHTS
    again = max(0.0, whole - output - kept)
    if parallel.recompute is Recompute.full:
        again += sum(max(0.0, each - kept) for each in of_layers)
    return ShardedTraffic(
        forward=(whole - output) * width * passed_on,
        backward=again * width * passed_on + gradients,
        weights=output * width * passed_on,
    )


def _fsdp_traffic(work: ModelWork, config: RunConfig, ranks: int) -> ShardedTraffic:
    """What FSDP sends between the ranks that hold parts of the same weights."""
    parallel, width = config.parallel, bytes_per_element(config.precision)
    tensor, passed_on = parallel.tensor_model_parallel_size, (ranks - 1) / ranks
    inside = sum(sum(work.parameters_of(layer, tensor, 1, tensor)) for layer in work.layers)
    whole = inside + work.parameters_around(tensor, 1, 0)
    again = inside if parallel.fsdp.reshard_after_forward else 0
    return ShardedTraffic(
        forward=whole * width * passed_on, backward=(again * width + whole * FP32) * passed_on
    )


def sharded_traffic(work: ModelWork, config: RunConfig, world_size: int) -> ShardedTraffic:
    """What the engine of a run sends, DeepSpeed's or FSDP, if it trains the whole model."""
    if config.parallel.engine is EngineKind.deepspeed:
        return _zero_traffic(work, config, world_size)
    return _fsdp_traffic(work, config, world_size // config.parallel.tensor_model_parallel_size)


def _sharded_not_hidden(
    work: ModelWork,
    config: RunConfig,
    world_size: int,
    network: Network,
    stages: _Seconds,
    micro_batches: int,
) -> float:
    """What exchanges of weights and gradients add to a step, behind what hides them."""
    parallel, traffic = config.parallel, sharded_traffic(work, config, world_size)
    tensor = parallel.tensor_model_parallel_size
    group = Group(world_size // tensor, tensor)
    (forward,), (recomputed,) = stages.forward, stages.recomputed
    passes = (traffic.forward, forward), (traffic.backward, 2 * forward + recomputed)
    hides = parallel.overlap_grad_reduce or parallel.engine is EngineKind.fsdp
    a_micro_batch = sum(
        max(0.0, network.ring_seconds(group, sent) - (seconds if hides else 0.0)) for sent, seconds in passes
    )
    once = network.ring_seconds(group, traffic.gradients) + network.ring_seconds(group, traffic.weights)
    return micro_batches * a_micro_batch + once
