"""Held-out windows of indexed datasets as micro-batches of every rank, in a run and without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spikingbrain_train.config.dataset_names import dataset_names
from spikingbrain_train.data.gpt_dataset import HeldOutSamples
from spikingbrain_train.data.loader import MicroBatch, build_data_loader, local_micro_batch
from spikingbrain_train.evaluation.evaluator import HeldOutDataset
from spikingbrain_train.parallel.process_groups import ProcessGroups


def describe_datasets(dataset: HeldOutSamples, prefixes: Sequence[str]) -> list[HeldOutDataset]:
    """What an evaluation reads of each of the datasets that ``dataset`` was opened with."""
    described = zip(dataset_names(prefixes), prefixes, dataset.predicted_tokens(), strict=True)
    return [HeldOutDataset(*each) for each in described]


class HeldOutWindows:
    """A :class:`~spikingbrain_train.evaluation.evaluator.HeldOutData`.

    Args:
        dataset: the windows.
        prefixes: of its datasets.
        groups: process groups.
        micro_batch_size: windows that one rank processes at a time.
        num_sink_tokens: of the model.
    """

    def __init__(
        self,
        dataset: HeldOutSamples,
        prefixes: Sequence[str],
        groups: ProcessGroups,
        *,
        micro_batch_size: int,
        num_sink_tokens: int,
    ) -> None:
        self._dataset = dataset
        self._groups = groups
        self._micro_batch_size = micro_batch_size
        self._num_sink_tokens = num_sink_tokens
        self.datasets: Sequence[HeldOutDataset] = describe_datasets(dataset, prefixes)
        self.num_batches = -(-len(dataset) // (micro_batch_size * groups.data_parallel_size))

    def batches(self) -> Iterator[MicroBatch]:
        """See :class:`~spikingbrain_train.evaluation.evaluator.HeldOutData`."""
        groups = self._groups
        loader = build_data_loader(
            self._dataset,
            consumed_samples=0,
            micro_batch_size=self._micro_batch_size,
            data_parallel_rank=groups.data_parallel_rank,
            data_parallel_size=groups.data_parallel_size,
        )
        for whole in loader:
            yield local_micro_batch(
                whole,
                groups.device,
                num_sink_tokens=self._num_sink_tokens,
                context_parallel_rank=groups.context_parallel_rank,
                context_parallel_size=groups.context_parallel_size,
            )
