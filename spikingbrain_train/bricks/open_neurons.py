"""From the flags of a subcommand to a model whose neurons can be watched, of a folder or on ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.reading_command_line import open_folder, ranks_for_reading

if TYPE_CHECKING:
    from spikingbrain_train.bricks.neuron_model import NeuronModel


def neurons_of_folder(arguments: argparse.Namespace) -> NeuronModel:
    """Those of the Hugging Face model that ``--model`` names."""
    model, tokenizer = open_folder(arguments)
    from spikingbrain_train.bricks.hugging_face import hugging_face_neurons

    return hugging_face_neurons(model, tokenizer, str(arguments.model))


@contextmanager
def neurons_of_checkpoint(
    request: CheckpointRequest,
    tokenizer: Path,
    arguments: argparse.Namespace,
    *,
    every_window: str | None = None,
) -> Iterator[NeuronModel]:
    """Those of a checkpoint, on ranks that have joined and leave when the context ends.

    Args:
        request: the checkpoint as it is asked for reading.
        tokenizer: of the text.
        arguments: as of :func:`~spikingbrain_train.evaluation.reading_command_line.reading_of`.
        every_window: why each rank has to see all tokens of all windows; None allows ranks that share them.

    Raises:
        ConfigurationError: ranks would share windows, or would need padding to do so.
    """
    with ranks_for_reading(request, arguments, "which would count") as groups:
        if every_window is not None and groups.data_parallel_size * groups.context_parallel_size > 1:
            raise ConfigurationError(
                f"{every_window}, but {groups.world_size} ranks would read {groups.data_parallel_size} at "
                f"once, each split over {groups.context_parallel_size}; start as many ranks as tensor x "
                "pipeline parallelism takes"
            )
        from spikingbrain_train.bricks.megatron import megatron_neurons
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

        yield megatron_neurons(request, groups, TextTokenizer(tokenizer), arguments.seq_length)
