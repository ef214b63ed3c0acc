"""Writes a cache of the teacher's kept tokens: a forward pass over the samples of a run, file by file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.gpt_dataset import TrainDataset, build_datasets
from spikingbrain_train.data.loader import MicroBatch, collate, local_micro_batch
from spikingbrain_train.data.teacher_cache import write_shard
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.output_head import gather_hidden_states, valid_vocab_rows
from spikingbrain_train.ops.kept_tokens import VocabularyShare, kept_tokens
from spikingbrain_train.parallel.agreed_precision import agree_on_precision
from spikingbrain_train.parallel.agreement import locked_output_dir, on_main_process
from spikingbrain_train.parallel.forward_passes import pass_forward
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.planning.teacher_cache_request import CacheRequest, missing_shards, open_cache
from spikingbrain_train.reporting.activity import Activity, activity, format_duration
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.storage.teacher_cache import (
    CacheLayout,
    remove_leftovers,
    shard_path,
    shards_of,
)
from spikingbrain_train.training.build import build_teacher, kernels_of
from spikingbrain_train.training.data_check import check_tokens_together

_NUMPY = {"U16": np.uint16, "I32": np.int32}


def write_cache(request: CacheRequest) -> None:
    """Write what a cache lacks, on all ranks of this launch.

    Files that are there stay, so that it goes on where it was stopped.

    Raises:
        SpikingBrainError: something that the user can fix.
    """
    accelerator = detect(request.config.cluster.accelerator)
    config = request.config
    groups = initialize(
        config.parallel, accelerator, seed=config.seed, timeout_minutes=config.cluster.timeout_minutes
    )
    try:
        precision = agree_on_precision(config, groups).precision
        accelerator.require_dtype(PARAMS_DTYPE[precision])
        write_cache_on(groups, replace(request, config=replace(config, precision=precision)))
    finally:
        destroy()


def write_cache_on(groups: ProcessGroups, request: CacheRequest) -> None:
    """:func:`write_cache` with groups that are formed, of a run whose precision is settled."""
    config, folder, layout = request.config, request.folder, request.layout
    on_main_process(lambda: folder.mkdir(parents=True, exist_ok=True), groups)
    with locked_output_dir(str(folder), groups):
        on_main_process(lambda: open_cache(request), groups)
        on_main_process(lambda: remove_leftovers(folder), groups)
        shards = missing_shards(request)
        shown = partial(activity, shown=groups.is_main_process)
        check_tokens_together(config.data.train_prefixes, config.model.vocab_size, groups, folder, shown)
        with shown("opening the data and loading the teacher"):
            dataset = _samples(config, request.samples)
            teacher = build_teacher(config, kernels_of(config, groups.accelerator), groups)
        # Each data-parallel rank has files of its own; nothing is said between them until the end.
        own = shards[groups.data_parallel_rank :: groups.data_parallel_size]
        writer = _Writer(config, groups, teacher, dataset, layout)
        started = time.perf_counter()
        with shown("caching the teacher", sum(len(shard) for shard in own), "samples") as progress:
            for shard in own:
                writer.write(folder, shard, progress)
        torch.distributed.barrier()
        if groups.is_main_process:
            seconds, tokens = time.perf_counter() - started, sum(map(len, shards)) * layout.seq_length
            speed = f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
            print(
                f"{folder}: {request.samples:,} samples, {tokens:,} tokens of them written now, in "
                f"{format_duration(seconds)}{speed}",
                flush=True,
            )


def _samples(config: RunConfig, number: int) -> TrainDataset:
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    found, _ = build_datasets(
        data,
        config.stage.seq_length,
        train_samples=number,
        valid_samples=1,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
    )
    return found


@dataclass
class _Writer:
    """Runs the teacher over samples and puts what is kept into files."""

    config: RunConfig
    groups: ProcessGroups
    teacher: HybridGPTModel | ModelChunks
    dataset: TrainDataset
    layout: CacheLayout

    def write(self, folder: Path, samples: range, progress: Activity) -> None:
        """One file, by the first tensor-parallel rank of the last pipeline stage."""
        size = self.config.stage.micro_batch_size
        batches = [list(samples[first : first + size]) for first in range(0, len(samples), size)]
        # Pipeline stages know one size of micro-batch; what fills up the last one is left out below.
        batches[-1] += [samples[-1]] * (size - len(batches[-1]))
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        read = (self._batch(indices, progress) for indices in batches)
        pass_forward(
            self.teacher.chunks,
            partial(self._forward_step, kept),
            zip(batches, read, strict=True),
            len(batches),
            seq_length=self.layout.seq_length,
            micro_batch_size=size,
        )
        if not kept or self.groups.tensor_model_parallel_rank > 0:
            return
        shape = (-1, self.layout.seq_length)
        ids, values, tail = (
            torch.cat(each).view(*shape, *each[0].shape[1:])[: len(samples)].numpy()
            for each in zip(*kept, strict=True)
        )
        before = shards_of(folder).get(samples.start)
        path = shard_path(folder, samples)
        write_shard(path, ids.astype(_NUMPY[self.layout.ids_dtype]), values, tail)
        if before is not None and before != samples:  # of a shorter run
            shard_path(folder, before).unlink(missing_ok=True)

    def _batch(self, indices: list[int], progress: Activity) -> MicroBatch:
        progress.advance(len(set(indices)))
        whole = collate([self.dataset[index] for index in indices])
        return local_micro_batch(whole, self.groups.device)

    def _forward_step(
        self, kept: list[tuple[Tensor, Tensor, Tensor]], batches: Iterator[Any], model: HybridGPTModel
    ):
        indices, batch = next(batches)
        with torch.no_grad():
            hidden = model(batch.tokens, layout=batch.layout, return_hidden_states=True)

        def keep(output: Tensor) -> tuple[Tensor, Tensor, None]:
            kept.append(self._kept(output, indices))
            return output.new_zeros(()), output.new_zeros((), dtype=torch.int), None

        return hidden, keep

    @torch.no_grad()
    def _kept(self, hidden: Tensor, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int32, log probabilities float16 and tails float32 of a micro-batch, on the CPU."""
        tp_group, teacher = self.groups.collection.tp, self.teacher
        hidden = gather_hidden_states(
            hidden,
            num_sink_tokens=0,
            sequence_parallel=teacher.config.sequence_parallel,
            tp_group=tp_group,
        )
        weight = teacher.output_weight()
        share = VocabularyShare(start=tp_group.rank() * len(weight), rank=tp_group.rank())
        if tp_group.size() > 1:
            share = VocabularyShare(share.start, share.rank, partial(_gather, tp_group))
        ids, values, tail = kept_tokens(
            hidden,
            weight[: valid_vocab_rows(len(weight), self.config.model.vocab_size, tp_group)],
            self._offsets(indices).to(hidden.device),
            top=self.layout.top,
            drawn=self.layout.drawn,
            temperature=self.config.stage.distillation.temperature,
            share=share,
        )
        return ids.int().cpu(), values.half().cpu(), tail.cpu()

    def _offsets(self, indices: list[int]) -> Tensor:
        """[B * T] in [0, 1): what is drawn depends on the seed and the number of the sample alone."""
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(self.config.seed * 2**31 + index)
            rows.append(torch.rand(self.layout.seq_length, generator=generator))
        return torch.cat(rows)


def _gather(group: torch.distributed.ProcessGroup, x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)
