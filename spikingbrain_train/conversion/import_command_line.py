"""Arguments of ``spikingbrain-convert import``. Imports torch only after they have been understood."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.model_checks import check_kinds
from spikingbrain_train.config.asked import manual_of_conversion
from spikingbrain_train.config.command_line import called_as
from spikingbrain_train.config.load import load_conversion
from spikingbrain_train.config.plugins import load_plugins, plugins_of
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.conversion.flags import (
    add_output_flag,
    add_plugins_flag,
    add_workers_flag,
    add_writing_flags,
    check_output,
)
from spikingbrain_train.conversion.formats.registry import format_of_config
from spikingbrain_train.conversion.hf_folder import read_weight_map
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_DESCRIPTION = """\
Read a Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Qwen3-MoE or published SpikingBrain-7B folder (safetensors)
and write a Megatron checkpoint that loads at any tensor, pipeline and expert parallel size. Configuration,
tokenizer and licence files travel along, without code and without links that leave the folder (weights
may be such links: nothing but tensors is read from them).
"""

_EXAMPLES = """\
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


def add_import(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
    parser = commands.add_parser("import", help="Hugging Face -> Megatron", add_help=False, **_texts())
    _add_arguments(parser)
    parser.set_defaults(handler=_import)


def import_parser() -> argparse.ArgumentParser:
    """The flags of ``convert_checkpoint.py import``."""
    parser = argparse.ArgumentParser(prog=called_as(), add_help=False, **_texts())
    _add_arguments(parser)
    return parser


def _texts() -> dict:
    return {
        "description": _DESCRIPTION,
        "epilog": _EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_output_flag(parser, "iter_0000000 in it holds the weights")
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
    add_writing_flags(parser, "import", refuses="NaN, infinities or nothing but zeros")
    add_workers_flag(parser)
    add_plugins_flag(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, e.g. sliding_window=2048; --help=<setting> tells all about one",
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
    check_output(arguments, arguments.hf, LATEST_ITERATION_FILE)
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
