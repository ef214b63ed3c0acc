"""What a stage reads: packed text by default, in an order that depends on seed and index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.gpt_dataset import HeldOutSamples, TrainDataset, build_datasets
from spikingbrain_train.data.loader import MicroBatch, WholeBatch, build_data_loader, local_micro_batch
from spikingbrain_train.data.origins import origins
from spikingbrain_train.data.packed_examples import build_examples
from spikingbrain_train.data.teacher_cache import CachedTeacher, WithTeacher
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.evaluation.evaluator import HeldOutData
from spikingbrain_train.evaluation.held_out_windows import HeldOutWindows
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.data_position import samples_of
from spikingbrain_train.storage.teacher_cache import read_cache_file
from spikingbrain_train.training.data_check import ShowActivity, check_tokens_together


class StageData(Protocol):
    """The data of a stage, as its trainer asks for them."""

    @property
    def held_out(self) -> HeldOutData | None:
        """What evaluations read; None where the config names nothing."""
        ...

    def train_batches(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the whole run, behind those that earlier steps have used.

        Args:
            consumed_samples: sequences of all ranks that they have used.
        """
        ...

    def origins(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """What a person needs to find training samples in their files, as JSON has it: one dict for each.

        Args:
            samples: their numbers in the order of the run.
        """
        ...


class PackedText:
    """Documents packed into sequences of ``stage.seq_length``.

    Args:
        config: the run.
        groups: process groups.
        activity: shows that the tokens are being checked.

    Raises:
        DataError, ConfigurationError: on every rank; datasets that are damaged, too short, of another
            tokenizer or of a larger vocabulary.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups, activity: ShowActivity) -> None:
        self._config = config
        self._groups = groups
        stage, data = config.stage, config.data
        tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
        prefixes, vocabulary = [*data.train_prefixes, *data.valid], config.model.vocab_size
        check_tokens_together(prefixes, vocabulary, groups, Path(config.output_dir), activity)
        found, self._valid = self._builder(config)(
            data,
            stage.seq_length,
            train_samples=samples_of(config),
            valid_samples=config.logging.eval_iters * stage.global_batch_size,
            seed=config.seed,
            vocab_size=vocabulary,
            tokenizer=tokenizer,
        )
        self._text = found
        self._train = self._beside(found)

    def _beside(self, samples: TrainDataset) -> TrainDataset | WithTeacher:
        """The training samples, with what comes beside their text."""
        return samples

    def _builder(self, config: RunConfig) -> Callable[..., tuple[TrainDataset, HeldOutSamples | None]]:
        """What opens the datasets: called as :func:`build_datasets` is."""
        return build_datasets

    @property
    def held_out(self) -> HeldOutData | None:
        """The windows of ``data.valid``."""
        if self._valid is None:
            return None
        return HeldOutWindows(
            self._valid,
            self._config.data.valid,
            self._groups,
            micro_batch_size=self._config.stage.micro_batch_size,
            num_sink_tokens=self._config.model.num_sink_tokens,
        )

    def train_batches(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """See :class:`StageData`."""
        loader = build_data_loader(
            self._train,
            consumed_samples=consumed_samples,
            micro_batch_size=self._config.stage.micro_batch_size,
            data_parallel_rank=self._groups.data_parallel_rank,
            data_parallel_size=self._groups.data_parallel_size,
            global_batch_size=self._config.stage.global_batch_size,
            num_workers=self._config.data.num_workers,
            pin_memory=self._groups.accelerator.is_gpu,
            seed=self._config.seed,
        )
        return self._local(loader)

    def origins(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Files, tokens and documents: see :func:`~spikingbrain_train.data.origins.origins`."""
        return origins(self._text, samples)

    def _local(self, loader: Iterator[WholeBatch]) -> Iterator[MicroBatch]:
        """This rank's part of every micro-batch, on its device."""
        for whole in loader:
            yield local_micro_batch(
                whole,
                self._groups.device,
                num_sink_tokens=self._config.model.num_sink_tokens,
                context_parallel_rank=self._groups.context_parallel_rank,
                context_parallel_size=self._groups.context_parallel_size,
            )


class PackedAnswers(PackedText):
    """Whole examples packed into sequences of ``stage.seq_length``, with loss on their answers."""

    def _builder(self, config: RunConfig) -> Callable[..., tuple[TrainDataset, HeldOutSamples | None]]:
        return partial(build_examples, long=config.stage.sft.long_examples)


class CachedText(PackedText):
    """Packed text, with the teacher's kept tokens beside it where this pipeline stage computes the loss.

    Raises:
        DataError, ConfigurationError: as :class:`PackedText`; or the cache is damaged.
    """

    def _beside(self, samples: TrainDataset) -> TrainDataset | WithTeacher:
        folder = self._config.stage.distillation.cache
        assert folder is not None
        if not self._groups.is_pipeline_last_stage:
            return samples
        _, layout = read_cache_file(Path(folder), f"stage.distillation.cache={folder}")
        return WithTeacher(samples, CachedTeacher(Path(folder), layout))
