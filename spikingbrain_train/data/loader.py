"""Micro-batches for one rank, from any point of the run.

Each rank reads whole samples and keeps the slice of the sequence that its context-parallel rank holds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch.utils.data import DataLoader

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.data.gpt_dataset import Sample, Samples
from spikingbrain_train.data.teacher_cache import KeptTokens, kept_of
from spikingbrain_train.errors import ConfigurationError, DataError


class _Samples(TypedDict):
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: tuple[tuple[int, ...], ...] | None
    datasets: torch.Tensor | None


class WholeBatch(_Samples, total=False):
    """Samples of a micro-batch as read from disk, whole sequences on the CPU."""

    sequence_seeds: tuple[str, ...]
    """See :class:`~spikingbrain_train.architecture.sequence_layout.SequenceLayout`."""
    teacher: KeptTokens | None
    """What a cache of the teacher's logits holds of them; None, or not there, without one."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes on at a time."""

    tokens: torch.Tensor
    """[B, T] int64, the text that this rank holds."""
    labels: torch.Tensor
    """[B, T] int64, the token that follows each."""
    loss_mask: torch.Tensor
    """[B, T] float32, 0 where a label carries no loss."""
    layout: SequenceLayout
    """Where this rank's text lies in the sequences, and their sinks and documents."""
    datasets: torch.Tensor | None = None
    """[B] int64, which of several held-out datasets each sequence is of; None where there are not several."""
    teacher: KeptTokens | None = None
    """[B, T, K] what a cache of the teacher's logits holds of this text; None without one."""


def collate(samples: list[Sample]) -> WholeBatch:
    """Stack samples; their documents stay plain numbers, which nothing on the device needs to wait for."""
    cu_seqlens = None
    if "cu_seqlens" in samples[0]:
        cu_seqlens = tuple(tuple(sample["cu_seqlens"].tolist()) for sample in samples)
    return {
        "tokens": torch.stack([sample["tokens"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "loss_mask": torch.stack([sample["loss_mask"] for sample in samples]),
        "cu_seqlens": cu_seqlens,
        "datasets": torch.stack([each["dataset"] for each in samples]) if "dataset" in samples[0] else None,
        "teacher": kept_of(samples),
    }


def local_micro_batch(
    whole: WholeBatch,
    device: torch.device,
    *,
    num_sink_tokens: int = 0,
    context_parallel_rank: int = 0,
    context_parallel_size: int = 1,
) -> MicroBatch:
    """This context-parallel rank's slice of a micro-batch, on ``device``.

    Raises:
        ConfigurationError: sinks and text do not divide over the ranks.
    """
    layout = SequenceLayout(
        text_length=whole["tokens"].shape[1],
        num_sink_tokens=num_sink_tokens,
        context_parallel_rank=context_parallel_rank,
        context_parallel_size=context_parallel_size,
        cu_seqlens=whole["cu_seqlens"],
        sequence_seeds=whole.get("sequence_seeds"),
    )
    text = layout.text_range()
    tokens, labels, loss_mask = (
        whole[name][:, text.start : text.stop].to(device, non_blocking=True)
        for name in ("tokens", "labels", "loss_mask")
    )
    datasets = whole["datasets"]
    if datasets is not None:
        datasets = datasets.to(device, non_blocking=True)
    teacher = whole.get("teacher")
    if teacher is not None:
        here = (each[:, text.start : text.stop].to(device, non_blocking=True) for each in teacher)
        teacher = KeptTokens(*here)
        teacher = teacher._replace(ids=teacher.ids.long())
    return MicroBatch(tokens, labels, loss_mask, layout, datasets, teacher)


class DataParallelBatchSampler(torch.utils.data.Sampler[list[int | None]]):
    """Indices of one rank's micro-batches.

    Micro-step m of the whole run takes the samples [m * step, (m + 1) * step), step = micro_batch_size *
    data_parallel_size, and rank r the r-th slice of it. So a global batch holds the same samples in the same
    order for every data_parallel_size and micro_batch_size. Where the dataset ends inside a global batch,
    None fills it up.

    Args:
        num_samples: length of the dataset.
        consumed_samples: samples of all ranks that earlier steps have used.
        micro_batch_size: samples of one rank's micro-batch.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks with different data.
        global_batch_size: samples of an optimizer step; the end is filled up to a multiple of it.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        global_batch_size: int,
    ) -> None:
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.rank = data_parallel_rank
        self.step = micro_batch_size * data_parallel_size
        if global_batch_size % self.step:
            raise ConfigurationError(
                f"stage.global_batch_size {global_batch_size} is not divisible by stage.micro_batch_size * "
                f"data-parallel size = {micro_batch_size} * {data_parallel_size}: give a multiple of "
                f"{self.step}"
            )
        # From where it begins on, which another global batch may have led to.
        left = max(0, num_samples - consumed_samples)
        self.end = consumed_samples - (-left // global_batch_size) * global_batch_size

    def __len__(self) -> int:
        return max(0, self.end - self.consumed_samples) // self.step

    def __iter__(self) -> Iterator[list[int | None]]:
        for start in range(self.consumed_samples, self.end, self.step):
            first = start + self.rank * self.micro_batch_size
            yield [
                index if index < self.num_samples else None
                for index in range(first, first + self.micro_batch_size)
            ]


def build_data_loader(
    dataset: Samples,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    global_batch_size: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 1234,
) -> Iterator[WholeBatch]:
    """Iterate over one rank's micro-batches, starting behind ``consumed_samples``.

    All ranks of one tensor/pipeline-parallel group ask for the same data_parallel_rank and read the same
    batches from disk; nothing is broadcast.

    Args:
        dataset: from :func:`~spikingbrain_train.data.gpt_dataset.build_datasets`, or of packed examples.
        consumed_samples: samples of all ranks used so far; 0 for evaluation.
        micro_batch_size: samples of a batch.
        data_parallel_rank: this rank among those with different data.
        data_parallel_size: their number.
        global_batch_size: the number of batches is filled up, with samples that carry no loss, so that it
            makes up whole global batches of this size; None stands for micro_batch_size * data_parallel_size.
        num_workers: loader processes.
        pin_memory: put batches into page-locked memory, for faster copies to a GPU.
        seed: of the loader's own generator, and of what is drawn for each sequence.

    Returns:
        Iterator of whole batches: tokens and labels [micro_batch_size, seq_length] int64, loss_mask
        [micro_batch_size, seq_length] float32, on CPU, and document bounds. The same number on every rank.
        :func:`local_micro_batch` cuts them to a rank's slice.

    Raises:
        ConfigurationError: the batch sizes don't divide.
    """
    sampler = DataParallelBatchSampler(
        len(dataset),
        consumed_samples,
        micro_batch_size,
        data_parallel_rank,
        data_parallel_size,
        global_batch_size or micro_batch_size * data_parallel_size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=_end_with_parent,
        # Without its own generator a loader draws from the global one when it starts, and a resumed run,
        # which starts one loader more, would see other dropout masks than an uninterrupted one.
        generator=torch.Generator().manual_seed(seed),
    )
    return _with_seeds(_in_own_words(loader), sampler, seed)


def _with_seeds(
    batches: Iterator[WholeBatch], sampler: DataParallelBatchSampler, seed: int
) -> Iterator[WholeBatch]:
    """Seeds of sequences say which of the run they are."""
    first = sampler.consumed_samples + sampler.rank * sampler.micro_batch_size
    for batch in batches:
        numbers = range(first, first + len(batch["tokens"]))
        yield {**batch, "sequence_seeds": tuple(f"{seed}/{number}" for number in numbers)}
        first += sampler.step


def _in_own_words(loader: DataLoader) -> Iterator[WholeBatch]:
    """The loader's batches; of an error in one of its processes only the sentence is kept.

    It arrives inside that process's traceback.
    """
    with _left_to_parent(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        batches = iter(loader)  # starts the processes
    try:
        yield from batches
    except DataError as error:
        sentence = str(error).rpartition(f"{DataError.__name__}: ")[2].strip()
        raise DataError(sentence) from error.with_traceback(None)
    finally:
        # Their processes end now: tracebacks keep frames, and frames what they name, while an error is held.
        del batches


@contextmanager
def _left_to_parent(*numbers: signal.Signals) -> Iterator[None]:
    """Processes started in here never see the signals.

    One to the whole group asks the run to stop after its step, which still needs its loaders.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """Only SIGTERM of the parent ends a loader process.

    The parent sends it where it cannot hand over the end of the data any more: when the garbage collector
    has found the loader, and when the interpreter ends, which then waits for its children.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)  # as torch's own handler does: another code would count as a loader that failed

    threading.Thread(target=wait, name="end of the loader", daemon=True).start()
