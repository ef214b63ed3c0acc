"""The layouts that are worth a try, and the sentences of those that cannot work. Without torch.

What is never better is left out: without sequence parallelism or, in one stage, the distributed optimizer
ranks hold more and send as much, and tensor-parallel ranks in several nodes wait for slow links in every
layer. ``everything=True`` keeps the first two, so that a test can hold the search to it. Of unequal pipeline
stages those whose longest is the shortest are tried, beside even ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig, Recompute
from spikingbrain_train.config.require import divisors
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_stage
from spikingbrain_train.planning.engine_checks import check_engine
from spikingbrain_train.planning.fp8_checks import check_fp8
from spikingbrain_train.planning.layer_work import ModelWork, recomputed_flops
from spikingbrain_train.planning.layouts.layout import Layout
from spikingbrain_train.planning.parallel_checks import check_split, check_world_size
from spikingbrain_train.planning.pipeline_balance import balanced_layout

SHORTEST_SLICE = 1024
"""Tokens of a context-parallel rank: shorter slices leave its matrices few rows, and the model of the time
does not know what that costs."""
LARGEST_MICRO_BATCH = 8
ZERO_STAGES = (2, 3)
"""Of DeepSpeed, and of FSDP what corresponds to them; DeepSpeed's first one holds what megatron-core's
distributed optimizer does and hides less."""
VIRTUAL_STAGES = (2, 4, 8)
"""Of a rank, beside those that share the layers out evenly. More stages send hidden states more often."""
LEAST_BUBBLE = 0.01
"""Share of a step's ideal time: a smaller bubble is not worth virtual stages."""


@dataclass
class Rejections:
    """Why layouts were left aside, in groups: how many share a reason, and one of their sentences."""

    number: dict[str, int] = field(default_factory=dict)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, group: str, sentence: str, number: int = 1) -> None:
        """``number`` more for a reason."""
        self.number[group] = self.number.get(group, 0) + number
        self.example.setdefault(group, sentence)

    def refused(self, error: ConfigurationError) -> None:
        """A split that a run would refuse; sentences that differ in numbers alone are one reason."""
        sentence = str(error)
        self.add(re.sub(r"\d+", "N", re.split(r"[;,]", sentence)[0]), sentence)


def layouts(
    config: RunConfig,
    world_size: int,
    work: ModelWork,
    rejections: Rejections,
    engines: Sequence[EngineKind] = (EngineKind.megatron,),
    *,
    everything: bool = False,
) -> Iterator[Layout]:
    """Layouts that a run accepts, whatever memory they take.

    Args:
        config: the run; its parallel degrees and its micro-batch size do not count.
        world_size: GPUs.
        work: of its model.
        rejections: takes the reasons of what cannot work.
        engines: that may train.
        everything: also what is never better.
    """
    variants = _Variants(config, work)
    for split in _splits(config, world_size, engines, everything=everything):
        forms = [split]
        if split.sequence_parallel and not everything:  # the length may divide without it
            forms.append(replace(split, sequence_parallel=False))
        if accepted := _first_accepted(config, world_size, forms, rejections):
            yield from variants.of(accepted, world_size)


def _splits(
    config: RunConfig, world_size: int, engines: Sequence[EngineKind], *, everything: bool
) -> Iterator[Layout]:
    """Every way to split model and sequences, without stages of unequal length and without recomputation."""
    experts = max(kind.num_experts(config.model) for kind in feed_forwards_of(config.model))
    longest = max(1, config.stage.seq_length // SHORTEST_SLICE)
    for tensor in divisors(world_size):
        if tensor > config.cluster.gpus_per_node:
            break
        for context in (n for n in divisors(world_size // tensor) if n <= longest):
            for pipeline in divisors(world_size // (tensor * context)):
                if pipeline > config.model.num_layers:
                    break
                sharded = world_size // pipeline > tensor
                for expert in divisors(experts) if experts else [1]:
                    base = Layout(
                        tensor, pipeline, context, expert, None, tensor > 1, sharded, Recompute.none, 1
                    )
                    if EngineKind.deepspeed in engines and sharded and base.is_data_and_context_alone:
                        yield from (replace(base, zero=stage) for stage in ZERO_STAGES)
                    if EngineKind.fsdp in engines and sharded and pipeline == expert == 1:
                        of_fsdp = [replace(base, fsdp=stage) for stage in ZERO_STAGES]
                        yield from of_fsdp
                        if everything and tensor > 1:
                            yield from (replace(each, sequence_parallel=False) for each in of_fsdp)
                    if EngineKind.megatron not in engines:
                        continue
                    yield base
                    if everything and tensor > 1:
                        yield replace(base, sequence_parallel=False)
                    # Stages gather their weights while nobody computes, which unsharded ones need not.
                    if sharded and (everything or pipeline > 1):
                        yield replace(base, distributed_optimizer=False)
                    if everything and sharded and tensor > 1:
                        yield replace(base, distributed_optimizer=False, sequence_parallel=False)


def _first_accepted(
    config: RunConfig, world_size: int, forms: Sequence[Layout], rejections: Rejections
) -> Layout | None:
    """Of the forms of a split; where a run would refuse all of them, the first one's sentence is kept."""
    refusals = []
    for form in forms:
        try:
            _check(config, world_size, form)
        except ConfigurationError as error:
            refusals.append(error)
        else:
            return form
    rejections.refused(refusals[0])
    return None


def _check(config: RunConfig, world_size: int, split: Layout) -> None:
    """What a run would refuse of a split with micro-batches of one. Raises ConfigurationError."""
    run = split.run(config, world_size)
    check_world_size(run.parallel, world_size)
    # A number of stages that does not divide the layers gets unequal ones.
    check_split(run.model, _one_stage(run.parallel))
    check_stage(run.stage, run.model, run.parallel, world_size)
    check_fp8(run)
    check_engine(replace(run, dry_run=True))


def _one_stage(parallel: ParallelConfig) -> ParallelConfig:
    return replace(parallel, pipeline_model_parallel_size=1, data_parallel_size=None)


class _Variants:
    """What can be varied of a split: virtual stages, unequal ones, recomputation, micro-batches."""

    def __init__(self, config: RunConfig, work: ModelWork) -> None:
        self._config, self._work = config, work
        self._levels = list(Recompute) if has_experts(config.model) else [Recompute.none, Recompute.full]
        self._balanced: dict[tuple[int, tuple[float, ...]], tuple[int, ...]] = {}

    def of(self, split: Layout, world_size: int) -> Iterator[Layout]:
        """All of them."""
        sequences = self._config.stage.global_batch_size // split.replicas(world_size)
        sizes = [size for size in divisors(sequences) if size <= LARGEST_MICRO_BATCH]
        for recompute in self._levels:
            flops = self._flops(replace(split, recompute=recompute).run(self._config, world_size))
            for virtual in self._virtual_stages(split.pipeline):
                for stages in self._stages(split.pipeline * virtual, flops):
                    for size in sizes:
                        if virtual > 1 and not _interleaves(split.pipeline, sequences // size):
                            continue
                        yield Layout(  # replace() takes three times as long
                            split.tensor,
                            split.pipeline,
                            split.context,
                            split.expert,
                            stages,
                            split.sequence_parallel,
                            split.distributed_optimizer,
                            recompute,
                            size,
                            virtual,
                            split.zero,
                            split.fsdp,
                        )

    def _virtual_stages(self, pipeline: int) -> list[int]:
        """How many stages a rank may have."""
        if pipeline == 1:
            return [1]
        number = self._config.model.num_layers
        even = (each for each in divisors(number) if number % (each * pipeline) == 0)
        few = {each for each in (*VIRTUAL_STAGES, *even) if each * pipeline <= number}
        return sorted({1, *(each for each in few if each <= VIRTUAL_STAGES[-1])})

    def _flops(self, run: RunConfig) -> tuple[float, ...]:
        """Of each layer, per token of text: forward, backward and what the backward pass computes again."""
        of_layers = {
            layer: 3 * each.forward_flops + recomputed_flops(run, layer)
            for layer, each in self._work.of_layers.items()
        }
        return tuple(of_layers[layer] for layer in self._work.layers)

    def _stages(self, stages: int, flops: tuple[float, ...]) -> list[tuple[int, ...] | None]:
        """Even stages where there are such, and those whose longest one is the shortest."""
        number = self._config.model.num_layers
        even = (number // stages,) * stages if number % stages == 0 else None
        if (stages, flops) not in self._balanced:
            found = balanced_layout(flops, stages, 3 * self._work.output_flops)
            self._balanced[stages, flops] = tuple(found)
        best = self._balanced[stages, flops]
        return [*([None] if even is not None else []), *([best] if best != even else [])]


def _interleaves(pipeline: int, micro_batches: int) -> bool:
    """Whether virtual stages work, whose ranks take as many micro-batches at a time as they are, and gain."""
    return micro_batches % pipeline == 0 and (pipeline - 1) / micro_batches >= LEAST_BUBBLE
