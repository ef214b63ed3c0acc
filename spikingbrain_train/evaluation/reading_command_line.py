"""What the commands share that let a model of any form read windows of text and look inside it.

The flags that name the text, and the way from flags to an open model. Understood before torch is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.checkpoint_request import (
    CheckpointRequest,
    for_reading,
    request_checkpoint,
)
from spikingbrain_train.evaluation.inference_command_line import check_model_files, load_model
from spikingbrain_train.evaluation.window_checks import check_windows
from spikingbrain_train.planning.file_checks import check_output_folder, check_prefix
from spikingbrain_train.planning.parallel_checks import check_sequence_split
from spikingbrain_train.reporting.activity import activity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
    from spikingbrain_train.parallel.process_groups import ProcessGroups


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """``--text`` or ``--data``, and how much of it."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text to read: files (.txt, .jsonl, compressed or not), folders, globs, or pydoc-topics",
    )
    text.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="or held-out indexed datasets, without .bin/.idx"
    )
    add_window_options(parser, windows=4, seq_length=512)


def add_output_folder(parser: argparse.ArgumentParser, *files: str) -> None:
    """``--output``, a folder for files of these names: without it a command prints its tables alone."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for {', '.join(files[:-1])} and {files[-1]} (default: tables only)",
    )


def add_window_options(
    parser: argparse.ArgumentParser,
    *,
    windows: int,
    seq_length: int,
    of_windows: str = "windows to read",
    of_length: str = "tokens of a window",
) -> None:
    """How text is cut into windows; the numbers are defaults, the words what ``--help`` calls them."""
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="field of a JSON document (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", type=int, default=windows, metavar="N", help=f"{of_windows} (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length", type=int, default=seq_length, metavar="N", help=f"{of_length} (default: %(default)s)"
    )


def check_text_options(arguments: argparse.Namespace) -> None:
    """Refuse windows that cannot be read as they are.

    Raises:
        ConfigurationError: as :func:`~.window_checks.check_windows`.
    """
    check_windows(arguments.windows, arguments.seq_length)


def check_reading(arguments: argparse.Namespace) -> None:
    """Refuse what :func:`add_text_options` and :func:`add_output_folder` were told and cannot be.

    Raises:
        ConfigurationError: naming the flag.
    """
    check_text_options(arguments)
    if arguments.output is not None:
        check_output_folder(arguments.output, "--output")


def reading_of(
    arguments: argparse.Namespace,
    read_folder: Callable[[argparse.Namespace], None],
    read_checkpoint: Callable[[CheckpointRequest, Path, argparse.Namespace], None],
) -> Callable[[], None]:
    """What is to be done with the model that ``--model`` names; refuses what can be refused without torch.

    Args:
        arguments: of :func:`add_text_options` and of every command that runs a model of any form.
        read_folder: for a Hugging Face folder.
        read_checkpoint: for a Megatron checkpoint, with the tokenizer of its text.
    """
    is_checkpoint = check_model_files(arguments)
    for prefix in arguments.data or ():
        check_prefix("--data", prefix)
    if not is_checkpoint:
        return partial(read_folder, arguments)
    request = request_checkpoint(
        arguments.model,
        settings=arguments.parallel,
        device=arguments.device,
        dtype=arguments.dtype,
        world_size=arguments.world_size,
    )
    try:
        check_sequence_split(arguments.seq_length, request.model, request.parallel)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("stage.seq_length=", "--seq-length ")) from None
    tokenizer = arguments.tokenizer or request.tokenizer
    if tokenizer is None:
        raise DataError(
            f"{request.checkpoint} carries no tokenizer; name the one that its data were made with: "
            "--tokenizer FOLDER"
        )
    return partial(read_checkpoint, for_reading(request), Path(tokenizer), arguments)


def open_folder(arguments: argparse.Namespace) -> tuple[PreTrainedModel, TextTokenizer]:
    """The Hugging Face model that ``--model`` names, and the tokenizer of its text."""
    model = load_model(arguments)
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    ignore_megatron_warnings()  # before megatron-core, which comes with the datasets
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    return model, TextTokenizer(arguments.tokenizer or arguments.model)


@contextmanager
def ranks_for_reading(
    request: CheckpointRequest, arguments: argparse.Namespace, padding: str
) -> Iterator[ProcessGroups]:
    """Ranks that have joined to read the windows of ``arguments``; left when the context ends.

    Args:
        request: the checkpoint as it is asked for reading.
        arguments: see :func:`reading_of`.
        padding: what would be wrong with it, for the sentence that refuses it.

    Raises:
        ConfigurationError: the data-parallel ranks would need padding.
    """
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    with activity("importing torch and megatron-core", shown=os.environ.get("RANK", "0") == "0"):
        ignore_megatron_warnings()
        import megatron.core.models.gpt  # noqa: F401  (the slow part)

        from spikingbrain_train.evaluation.checkpoint_model import joined_ranks

    with joined_ranks(request) as groups:
        if arguments.windows % groups.data_parallel_size:
            raise ConfigurationError(
                f"--windows {arguments.windows} cannot be split over {groups.data_parallel_size} "
                f"data-parallel ranks without padding, {padding}; give a multiple"
            )
        yield groups
