"""What the command lines that run a model of any form share, understood before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.plugins import add_plugins_argument, load_plugins, plugins_of
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.checkpoint_request import without_settings
from spikingbrain_train.evaluation.folder_model import load_folder
from spikingbrain_train.evaluation.model_arguments import (
    NUMBER_FORMATS,
    add_device,
    add_number_format,
    add_trust,
)
from spikingbrain_train.evaluation.model_folder import (
    check_model_folder,
    is_megatron_checkpoint,
)
from spikingbrain_train.planning.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Elsewhere:
    """Ranks that do what a command line asks for, instead of this process."""

    world_size: int
    start: Callable[[], None]
    """Starts them and waits for their end."""


def inference_parser(description: str, epilog: str, *, output_file: bool = True) -> argparse.ArgumentParser:
    """The flags of every command that runs a model of any form.

    Args:
        description: what the command is for.
        epilog: examples.
        output_file: whether ``--output`` is a JSON file, and so added here.
    """
    parser = command_parser(description, epilog)
    add_inference_options(parser, output_file=output_file)
    return parser


def add_inference_options(parser: argparse.ArgumentParser, *, output_file: bool = True) -> None:
    """Add them to a parser, which may be that of a subcommand; see :func:`inference_parser`."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folder with safetensors, or Megatron checkpoint: a run's folder or its "
        "checkpoints (the newest is taken), or one iter_* folder",
    )
    if output_file:
        parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    add_number_format(parser, (*NUMBER_FORMATS, "float16"))
    add_device(parser)
    add_trust(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer folder or sentencepiece .model file (default: that of the model's folder)",
    )
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="SETTING",
        help="how a Megatron checkpoint is spread over the ranks of --nproc-per-node (or torchrun): a layout "
        "of conf/parallel (tp2_pp2), settings (context_parallel_size=2), or both (default: all of it on "
        "every rank)",
    )
    add_plugins_argument(parser)


def run_inference(
    parser: argparse.ArgumentParser,
    prepare: Callable[[argparse.Namespace], Callable[[], None]],
    arguments: Sequence[str] | None,
    elsewhere: Elsewhere | None,
) -> None:
    """Let ``prepare`` refuse what can be refused without torch; what it returns does the rest."""
    with user_errors(same_on_all_ranks=True):
        words, settings = without_settings(sys.argv[1:] if arguments is None else arguments)
        parsed = parser.parse_args(words)
        parsed.parallel = [*parsed.parallel, *settings]
        load_plugins(plugins_of(vars(parsed), "the command line"))
        parsed.world_size = Launch.from_environment().world_size
        if elsewhere is not None:
            parsed.world_size = elsewhere.world_size
        action = prepare(parsed)
    if elsewhere is not None:
        action = elsewhere.start
    with user_errors():
        action()
        sys.stdout.flush()


def check_model_files(arguments: argparse.Namespace) -> bool:
    """Whether the model is a Megatron checkpoint. Refuses what lies there and cannot be used."""
    if arguments.tokenizer is not None and not arguments.tokenizer.exists():
        raise DataError(
            f"--tokenizer {arguments.tokenizer} does not exist; name a Hugging Face tokenizer folder or a "
            "sentencepiece .model file"
        )
    if is_megatron_checkpoint(arguments.model):
        return True
    check_model_folder(arguments.model, arguments.trust_remote_code)
    if arguments.parallel:
        raise ConfigurationError(
            f"--parallel {' '.join(arguments.parallel)} spreads a Megatron checkpoint, but {arguments.model} "
            "is a Hugging Face folder; leave it out, or import the folder with spikingbrain-convert"
        )
    if arguments.world_size > 1:
        raise ConfigurationError(
            f"{arguments.model} is a Hugging Face folder, which one process loads, not several; leave "
            "--nproc-per-node or torchrun out, or import the folder with spikingbrain-convert"
        )
    return False


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """The Hugging Face folder that ``--model`` names."""
    return load_folder(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
