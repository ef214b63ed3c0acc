"""Arguments of spikingbrain-convert and spikingbrain-export.

Imports torch only after they have been understood.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import with_plain_weights
from spikingbrain_train.architecture.model_checks import check_kinds, check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.asked import manual_of_conversion
from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.config.load import load_conversion
from spikingbrain_train.config.plugins import add_plugins_argument, load_plugins, plugins_of
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.conversion.folder_command_line import add_commands
from spikingbrain_train.conversion.formats.registry import format_of_config, format_of_model, names_of_formats
from spikingbrain_train.conversion.hf_folder import read_weight_map
from spikingbrain_train.conversion.output_folder import check_output_folder
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.checkpoint_paths import holds_checkpoint, resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_DESCRIPTION = """\
Convert checkpoints between Hugging Face and Megatron, swapping sequence mixers on the way in.
Runs on CPUs, tensor by tensor: a machine that can store a checkpoint can convert it. What was killed is gone
on with by the same command, to the same bytes.
"""

_IMPORT_DESCRIPTION = """\
Read a Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Qwen3-MoE or published SpikingBrain-7B folder (safetensors)
and write a Megatron checkpoint that loads at any tensor, pipeline and expert parallel size. Configuration,
tokenizer and licence files travel along, without code and without links that leave the folder (weights
may be such links: nothing but tensors is read from them).
"""

_EXPORT_DESCRIPTION = """\
Write a Megatron checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer, and for
hybrids the modelling code. Dense models return to their own family, bit for bit; models of the
SpikingBrain-7B type are written in its published format (gla_swa), and everything else (two branches
in a layer, experts, sink tokens, a tied gate) in this project's own (spikingbrain). Spikes stay active.
"""

_INSPECT_DESCRIPTION = """\
Say what a folder holds, without reading weights: architecture, tensors and their sizes, files, and the way
back to its source: what it was imported from, the stages that trained it, the tokens that they read. A folder
of SpikingBrain2.0, which is not imported, is told tensor by tensor: what has a place here, and what has none.
"""

_IMPORT_EXAMPLES = """\
examples:
  # the SpikingBrain-7B pattern (GLA, SWA, GLA, SWA ...) from a dense model
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/hybrid \\
      --conversion spikingbrain_7b

  # what that would do, without writing anything
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/hybrid \\
      --conversion spikingbrain_7b --dry-run

  # the same with a shorter window and another seed for the new parameters
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/hybrid \\
      --conversion spikingbrain_7b sliding_window=2048 seed=7

  # the SpikingBrain-76B pattern, from a dense model of any depth: two branches in every layer,
  # sink tokens, and experts as copies of the feed-forwards (_exact: scaled to change nothing)
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/hybrid_moe \\
      --conversion spikingbrain_76b

  # a machine for others too: one process; without --workers, one a core
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/hybrid \\
      --conversion spikingbrain_7b --workers 1

  # an exact Megatron copy: the teacher of an align stage
  spikingbrain-convert import --hf Qwen2.5-7B --output checkpoints/dense

A recipe is a file of conf/conversion (by name) or any YAML file with the fields of ConversionConfig:
  defaults: [spikingbrain_7b]      # recipes that it is made of; what follows comes on top
  mixers: [gla, gla, gla, full]    # repeated until all layers have one; [gla, swa] in a place: two branches
  sliding_window: 4096             # tokens a swa layer sees
  gla: {init_gate_bias_max: 4.0}   # start of the new parameters
  feed_forwards: [dense, moe, ...] # likewise repeated, or, with ..., the last one goes on
  moe: {num_experts: 8}            # any number of experts, each as wide as the source's feed-forward
  plugins: [my_package.mixers]     # modules that bring more kinds: CONTRIBUTING.md
  seed: 1234
"""

_EXPORT_EXAMPLES = """\
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


def convert_checkpoint(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-convert: ``import``, ``export``, and what is done with checkpoints as they are."""
    _run(convert_parser(), arguments)


def convert_parser() -> argparse.ArgumentParser:
    """The commands and flags of ``spikingbrain-convert``."""
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Each command explains itself: {called_as()} import --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    importer = commands.add_parser(
        "import", help="Hugging Face -> Megatron", add_help=False, **_import_texts()
    )
    _add_import_arguments(importer)
    importer.set_defaults(handler=_import)
    exporter = commands.add_parser(
        "export", help="Megatron -> Hugging Face (also: spikingbrain-export)", **_export_texts()
    )
    _add_export_arguments(exporter)
    exporter.set_defaults(handler=_export)
    inspector = commands.add_parser(
        "inspect",
        help="say what a checkpoint folder holds, and whether it is complete",
        description=_INSPECT_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspector.add_argument("folder", type=Path, help="Hugging Face folder, run folder, or one iter_* folder")
    inspector.add_argument(
        "--tensors",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="list its tensors with shape, dtype and size; a pattern such as '*.layers.0.*' lists some",
    )
    inspector.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    _add_plugins_argument(inspector)
    inspector.set_defaults(handler=_inspect)
    add_commands(commands)
    return parser


def import_parser() -> argparse.ArgumentParser:
    """The flags of ``convert_checkpoint.py import``."""
    parser = argparse.ArgumentParser(prog=called_as(), add_help=False, **_import_texts())
    _add_import_arguments(parser)
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-export."""
    parser = argparse.ArgumentParser(prog=called_as(), **_export_texts())
    _add_export_arguments(parser)
    return parser


def export(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-export: the ``export`` command on its own."""
    parser = export_parser()
    parser.set_defaults(handler=_export)
    _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    with user_errors():
        parsed = parser.parse_args(arguments)
        load_plugins(plugins_of(vars(parsed), "the command line"))
        print(parsed.handler(parsed))
        sys.stdout.flush()


def _add_plugins_argument(parser: argparse.ArgumentParser) -> None:
    of_recipes = "; a recipe names those that it needs itself, as plugins: [package.module]"
    add_plugins_argument(parser, of_recipes)


class _Help(argparse.Action):
    """``--help``: all flags, recipes and settings; ``--help=moe``: all about one of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, **others: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, **others)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        load_plugins(plugins_of(vars(namespace), "the command line"))
        manual = manual_of_conversion()
        print(manual.about(values) if values else manual.overview(parser.format_help().rstrip()))
        parser.exit()


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-h",
        "--help",
        action=_Help,
        metavar="TOPIC",
        help="show this and every setting of a recipe; --help=moe or --help=seed all about one, --help="
        "conversion all about the recipes, --help=conversion=spikingbrain_7b what is in one",
    )
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make; iter_0000000 in it holds the weights",
    )
    parser.add_argument(
        "--conversion",
        metavar="RECIPE",
        help="spikingbrain_7b, spikingbrain_76b, dense, another file of conf/conversion, or a .yaml path. "
        "Without it, layers stay as they are",
    )
    parser.add_argument(
        "--window-convention",
        choices=[convention.value for convention in WindowConvention],
        help="what sliding_window of a published SpikingBrain-7B folder counts: the tokens before the "
        "current one, as its default code does (published; taken if you do not say), or those with it, as "
        "its SDPA variant and cache do (inclusive)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    parser.add_argument(
        "--allow-damaged-weights",
        action="store_true",
        help="import tensors that hold NaN, infinities or nothing but zeros, instead of refusing them",
    )
    _add_work_arguments(parser)
    _add_plugins_argument(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, e.g. sliding_window=2048; --help=<setting> tells all about one",
    )


def _import_texts() -> dict:
    return {
        "description": _IMPORT_DESCRIPTION,
        "epilog": _IMPORT_EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _export_texts() -> dict:
    return {
        "description": _EXPORT_DESCRIPTION,
        "epilog": _EXPORT_EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder or its checkpoints (the newest is taken), or one iter_* folder",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
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
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output")
    parser.add_argument(
        "--allow-damaged-weights",
        action="store_true",
        help="export tensors that hold NaN or infinities, instead of refusing them",
    )
    _add_work_arguments(parser)
    _add_plugins_argument(parser)


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read and write; the result does not depend on it (default: one a core, as far "
        "as memory allows and the model is worth it)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything but the values and print the report, with the disk, memory and time that it "
        "will take, without writing",
    )


def _import(arguments: argparse.Namespace) -> str:
    if arguments.overrides and arguments.conversion is None:
        raise ConfigurationError(
            f"{arguments.overrides[0]} changes a recipe, but none is given; add --conversion"
        )
    recipe = arguments.conversion and load_conversion(arguments.conversion, arguments.overrides)
    if recipe:
        check_fields(recipe)
        check_kinds(recipe)
    config = load_config_json(arguments.hf)
    read_weight_map(arguments.hf)
    _check_output(arguments, arguments.hf, LATEST_ITERATION_FILE)
    format_of_config(config, arguments.hf / CONFIG_FILE)
    with activity("importing torch"):
        from spikingbrain_train.conversion.import_checkpoint import import_checkpoint

    return import_checkpoint(
        arguments.hf,
        arguments.output,
        recipe,
        window_convention=arguments.window_convention and WindowConvention(arguments.window_convention),
        overwrite=arguments.overwrite,
        allow_damaged_weights=arguments.allow_damaged_weights,
        workers=arguments.workers,
        dry_run=arguments.dry_run,
        progress=True,
    ).table()


def _export(arguments: argparse.Namespace) -> str:
    max_shard_size = _bytes(arguments.max_shard_size)
    checkpoint = resolve_checkpoint(arguments.checkpoint)
    model = read_stored_model(checkpoint)
    check_model(model)
    format_of_model(with_plain_weights(model) if arguments.float_weights else model, arguments.format)
    _check_output(arguments, checkpoint, CONFIG_FILE)
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


def _check_output(arguments: argparse.Namespace, source: Path, marker: str) -> None:
    """Before torch is imported; what will be written is only known after it."""
    check_output_folder(
        arguments.output,
        source=source,
        overwrite=arguments.overwrite,
        marker=marker,
        needed_bytes=0,
        dry_run=True,
    )


def _inspect(arguments: argparse.Namespace) -> str:
    if (arguments.folder / CONFIG_FILE).is_file():
        load_config_json(arguments.folder)
        read_weight_map(arguments.folder)
    else:
        if arguments.folder.is_dir() and not holds_checkpoint(arguments.folder):
            raise CheckpointError(
                f"{arguments.folder} is neither a Hugging Face folder, which has a config.json, nor a "
                "Megatron checkpoint, which is a folder with latest_checkpointed_iteration.txt, an iter_* "
                "folder in it or the output_dir of a run; name one of them"
            )
        read_stored_model(resolve_checkpoint(arguments.folder, "folder"))
    with activity("importing torch"):
        from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint

    with activity(f"reading {arguments.folder}"):
        found = inspect_checkpoint(arguments.folder)
    if arguments.json:
        return json.dumps(found.values(), indent=2)
    return found.text() if arguments.tensors is None else found.table(arguments.tensors)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B|)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ConfigurationError(
            f"--max-shard-size {text} is not a size; write a number with a unit, e.g. 500MB or 5GB"
        )
    return int(match[1]) * _UNITS[match[2].upper()]
