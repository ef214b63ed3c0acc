"""Arguments of ``spikingbrain-export``. Imports torch only after they have been understood."""

from __future__ import annotations

import argparse
import re
from typing import Any

from spikingbrain_train.architecture.linear_transforms import with_plain_weights
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.command_line import called_as
from spikingbrain_train.conversion.flags import (
    add_checkpoint_flag,
    add_output_flag,
    add_plugins_flag,
    add_workers_flag,
    add_writing_flags,
    check_output,
)
from spikingbrain_train.conversion.formats.registry import format_of_model, names_of_formats
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_DESCRIPTION = """\
Write a Megatron checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer, and for
hybrids the modelling code. Dense models return to their own family, bit for bit; models of the
SpikingBrain-7B type are written in its published format (gla_swa), and everything else (two branches
in a layer, experts, sink tokens, a tied gate) in this project's own (spikingbrain). Spikes stay active.
"""

_EXAMPLES = """\
examples:
  # the newest checkpoint of a run, for AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)
  spikingbrain-export --checkpoint outputs/cpt --output exports/my-hybrid

  # one certain checkpoint, in bfloat16, in files of at most 2 GB
  spikingbrain-export --checkpoint outputs/cpt/iter_0001000 --output exports/my-hybrid \\
      --dtype bfloat16 --max-shard-size 2GB

  # in this project's own format, also where an older one would do
  spikingbrain-export --checkpoint outputs/cpt --output exports/my-hybrid --format spikingbrain

  # what it will take, without writing anything; a kill later costs little: the same command goes on
  spikingbrain-export --checkpoint outputs/cpt --output exports/my-hybrid --dry-run
"""

_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_export(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
    words = "Megatron -> Hugging Face (also: spikingbrain-export)"
    _add_arguments(commands.add_parser("export", help=words, **_texts()))


def export_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-export."""
    parser = argparse.ArgumentParser(prog=called_as(), **_texts())
    _add_arguments(parser)
    return parser


def _texts() -> dict:
    return {
        "description": _DESCRIPTION,
        "epilog": _EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_flag(parser)
    add_output_flag(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="number format of the weights; default: as stored")
    parser.add_argument(
        "--format",
        choices=names_of_formats(),
        help="format of the folder; default: the first of them that computes exactly the same. One that "
        "cannot hold the model's weights is refused; one without spikes leaves them out, with a note",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file, e.g. 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--float-weights",
        action="store_true",
        help="write the parameters of a model that was trained with INT8 weights as they are, instead of the "
        "INT8 numbers that it multiplies by",
    )
    add_writing_flags(parser, "export")
    add_workers_flag(parser)
    add_plugins_flag(parser)
    parser.set_defaults(handler=_export)


def _export(arguments: argparse.Namespace) -> str:
    max_shard_size = _bytes(arguments.max_shard_size)
    checkpoint = resolve_checkpoint(arguments.checkpoint)
    model = read_stored_model(checkpoint)
    check_model(model)
    format_of_model(with_plain_weights(model) if arguments.float_weights else model, arguments.format)
    check_output(arguments, checkpoint, CONFIG_FILE)
    with activity("importing torch"):
        import torch

        from spikingbrain_train.conversion.export_checkpoint import export_checkpoint

    return export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_size=max_shard_size,
        overwrite=arguments.overwrite,
        allow_damaged_weights=arguments.allow_damaged_weights,
        format_name=arguments.format,
        float_weights=arguments.float_weights,
        workers=arguments.workers,
        dry_run=arguments.dry_run,
        progress=True,
    ).table()


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B|)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ConfigurationError(
            f"--max-shard-size {text} is not a size; write a number with a unit, e.g. 500MB or 5GB"
        )
    return int(match[1]) * _UNITS[match[2].upper()]
