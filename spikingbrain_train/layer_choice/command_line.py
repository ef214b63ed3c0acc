"""Arguments of spikingbrain-choose-layers, understood before torch is imported."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from spikingbrain_train.architecture.model_checks import check_kinds
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.load import load_conversion
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.plugins import add_plugins_argument, load_plugins, plugins_of
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.conversion.formats.registry import parse_hf_config
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import parallel_of, request_checkpoint, without_settings
from spikingbrain_train.evaluation.inference_command_line import Elsewhere
from spikingbrain_train.evaluation.model_arguments import add_device, add_number_format
from spikingbrain_train.evaluation.model_folder import check_model_folder, is_megatron_checkpoint
from spikingbrain_train.layer_choice.measurements import Measurements
from spikingbrain_train.layer_choice.request import (
    ChoiceRequest,
    aligned_recipe,
    check_recipe,
    check_source,
    convert,
)
from spikingbrain_train.layer_choice.search import rounds_of
from spikingbrain_train.layer_choice.selection import (
    candidates,
    keeps_weights,
    number_of_swaps,
    pair_of,
)
from spikingbrain_train.planning.file_checks import check_output_folder, check_prefix
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=")
_DEFAULT_RECIPE = "spikingbrain_7b"

_DESCRIPTION = """\
Choose the layers of a hybrid that keep softmax attention: swap one layer at a time into the dense source,
measure KL(source || model) on text that the new mixers have not seen, and swap those that cost least. Nothing
is trained: the new mixers begin as an align stage sets them in closed form, or come from an aligned
checkpoint (--aligned).
"""

_EXAMPLES = """\
examples:
  # half of the layers, the others with windows of 512 tokens
  spikingbrain-choose-layers --model models/SmolLM2-135M-Instruct --data data/text_train \\
      --calibration-data data/text_train --output outputs/layers sliding_window=512

  # then convert with the recipe that it has written
  spikingbrain-convert import --hf models/SmolLM2-135M-Instruct --output outputs/hybrid \\
      --conversion outputs/layers/conversion.yaml

  # after alignment: of a checkpoint in which all candidates are swapped
  spikingbrain-choose-layers --model outputs/dense --aligned outputs/align_all --data data/other_valid \\
      --output outputs/layers --swap 15 --keep 0,29

  # one layer after the other, the rest measured again behind each choice: swaps add up
  spikingbrain-choose-layers --model outputs/dense --aligned outputs/align_all --data data/other_valid \\
      --output outputs/layers --greedy

In --output: conversion.yaml (the recipe), layers.json (all numbers; "mixers" is the list), layers.png, and
measurements.jsonl, a line a model as it is measured: the same command goes on where it was stopped.
"""


def choose_layers_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-choose-layers."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="the dense source: a Hugging Face folder with safetensors, or its Megatron checkpoint",
    )
    parser.add_argument(
        "--aligned",
        type=Path,
        metavar="DIR",
        help="Megatron checkpoint in which every candidate is swapped and aligned (default: convert the "
        "source, and set the new mixers in closed form on --calibration-data)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="indexed datasets, without .bin/.idx, to measure on: text that nothing was trained on, and best "
        "not that which the hybrid is judged by later",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens to measure on, about the same number of each dataset (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="training datasets for the closed-form start; of one that --data names, too, the windows behind "
        "those that are measured on",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of it (default: %(default)s)",
    )
    parser.add_argument(
        "--seq-length", type=int, default=2048, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="windows that a rank processes at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--swap",
        default="0.5",
        metavar="N",
        help="how many layers to swap: a number (15) or a share of all layers (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", default="", metavar="LAYERS", help="layers that must stay, counted from 0: 0,29"
    )
    parser.add_argument(
        "--to", metavar="MIXER", help="the mixer of swapped layers (default: the first such of the recipe)"
    )
    parser.add_argument(
        "--kept",
        metavar="MIXER",
        help="that of the others, with the source's weights: windows or full attention (default: the first "
        "such of the recipe)",
    )
    parser.add_argument(
        "--greedy",
        action="store_true",
        help="choose one layer after the other and measure the rest again behind each choice; about as many "
        "times as long as layers are swapped",
    )
    parser.add_argument(
        "--conversion",
        metavar="RECIPE",
        help="a file of conf/conversion or a .yaml path: its layers besides the list (default: "
        f"{_DEFAULT_RECIPE}, or as --aligned was converted)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="begin anew instead of going on in --output")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be measured"
    )
    parser.add_argument(
        "--keep-work",
        action="store_true",
        help="leave the conversions that were made to measure in OUTPUT/work, for another choice",
    )
    add_number_format(parser)
    add_device(parser)
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="SETTING",
        help="how the models are spread over the ranks of --nproc-per-node (or torchrun): a layout of "
        "conf/parallel (tp2), settings (context_parallel_size=2), or both; no pipeline stages (default: all "
        "of it on every rank)",
    )
    add_plugins_argument(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, e.g. sliding_window=2048",
    )
    return parser


def choose_layers(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-choose-layers."""
    parser = choose_layers_parser()
    with user_errors(same_on_all_ranks=True):
        words, of_parallel = without_settings(sys.argv[1:] if arguments is None else arguments)
        words, overrides = _without_overrides(words)
        parsed = parser.parse_args(words)
        parsed.parallel = [*parsed.parallel, *of_parallel]
        parsed.overrides = [*parsed.overrides, *overrides]
        load_plugins(plugins_of(vars(parsed), "the command line"))
        world_size = Launch.from_environment().world_size if elsewhere is None else elsewhere.world_size
        request = _request(parsed, world_size)
        action = _action(parsed, request, world_size, elsewhere)
    with user_errors():
        action()
        sys.stdout.flush()


def _without_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line less the changes to the recipe, which flags of several values would else take."""
    kept: list[str] = []
    overrides: list[str] = []
    in_parallel = False
    for word in words:
        in_parallel = word == "--parallel" or (in_parallel and not word.startswith("-"))
        (overrides if _OVERRIDE.match(word) and not in_parallel else kept).append(word)
    return kept, overrides


def _request(arguments: argparse.Namespace, world_size: int) -> ChoiceRequest:
    for name in ("tokens", "calibration_tokens", "seq_length", "micro_batch_size"):
        value = getattr(arguments, name)
        if not 1 <= value < 2**31:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give 1 to 2**31 - 1")
    is_checkpoint = is_megatron_checkpoint(arguments.model)
    source = _source_model(arguments.model, is_checkpoint)
    check_source(source, arguments.model)
    for flag, prefixes in (("--data", arguments.data), ("--calibration-data", arguments.calibration_data)):
        for prefix in prefixes:
            check_prefix(flag, prefix)
    recipe, pair, swappable = _layers(arguments, source)
    if arguments.aligned is None and not arguments.calibration_data:
        raise ConfigurationError(
            "the new mixers are set on text that is not measured on; name training data with "
            "--calibration-data, or an aligned checkpoint with --aligned"
        )
    may_be_swapped = [layer for layer in candidates(arguments.keep, source.num_layers) if layer in swappable]
    if not may_be_swapped:
        raise ConfigurationError(f"--keep {arguments.keep} leaves no layer to swap; name fewer")
    number = number_of_swaps(arguments.swap, source.num_layers, len(may_be_swapped))
    if parallel_of(arguments.parallel).pipeline_model_parallel_size > 1:
        raise ConfigurationError(
            "pipeline_model_parallel_size of --parallel splits the layers, any of which may be swapped; set "
            "it to 1 and spread the model over tensor ranks"
        )
    check_output_folder(arguments.output, "--output")
    request = ChoiceRequest(
        model=arguments.model,
        is_checkpoint=is_checkpoint,
        aligned=arguments.aligned,
        recipe=recipe,
        pair=pair,
        num_layers=source.num_layers,
        candidates=may_be_swapped,
        number=number,
        greedy=arguments.greedy,
        data=arguments.data,
        calibration_data=arguments.calibration_data,
        tokens=arguments.tokens,
        calibration_tokens=arguments.calibration_tokens,
        seq_length=arguments.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        parallel=arguments.parallel,
        device=arguments.device,
        dtype=arguments.dtype,
        output=arguments.output,
    )
    check_recipe(source, request.measured_recipe([pair.swapped]))
    check_recipe(source, request.measured_recipe([pair.kept]))
    for flag, folder in (
        ("--model", arguments.model if is_checkpoint else None),
        ("--aligned", arguments.aligned),
    ):
        if folder is not None:
            request_checkpoint(
                folder,
                settings=arguments.parallel,
                device=arguments.device,
                dtype=arguments.dtype,
                world_size=world_size,
                flag=flag,
            )
    if not arguments.overwrite:
        Measurements(arguments.output, request.settings())
    return request


def _source_model(folder: Path, is_checkpoint: bool) -> ModelConfig:
    if is_checkpoint:
        return read_stored_model(resolve_checkpoint(folder, "--model"))
    check_model_folder(folder, False)
    config = load_config_json(folder)
    return parse_hf_config(config, folder / CONFIG_FILE)[1]


def _layers(arguments: argparse.Namespace, source: ModelConfig) -> tuple:
    """The recipe, its two mixers, and the layers that may be swapped."""
    if arguments.aligned is None:
        recipe = load_conversion(arguments.conversion or _DEFAULT_RECIPE, arguments.overrides)
        check_fields(recipe)
        check_kinds(recipe)
        return recipe, pair_of(recipe, arguments.to, arguments.kept), range(source.num_layers)
    recipe, swapped = aligned_recipe(arguments.aligned, source)
    for flag, value in (("--to", arguments.to), ("--conversion", arguments.conversion)):
        if value is not None:
            raise ConfigurationError(
                f"{flag} {value} is what --aligned {arguments.aligned} was converted with; leave it out"
            )
    kept = arguments.kept
    if kept is None:
        others = [
            branches[0]
            for branches in read_stored_model(
                resolve_checkpoint(arguments.aligned, "--aligned")
            ).layer_mixers()
            if len(branches) == 1 and keeps_weights(branches[0])
        ]
        kept = others[0] if others else _default_kept()
    return recipe, pair_of(recipe, None, kept), swapped


def _default_kept() -> str:
    recipe = load_conversion(_DEFAULT_RECIPE)
    kept = pair_of(recipe, None, None).kept
    assert isinstance(kept, str)
    return kept


def _action(
    arguments: argparse.Namespace, request: ChoiceRequest, world_size: int, elsewhere: Elsewhere | None
) -> Callable[[], None]:
    if arguments.dry_run:
        return partial(_describe, request)
    if elsewhere is not None:
        return partial(_convert_and_start, request, arguments.overwrite, elsewhere, arguments.keep_work)
    if world_size > 1 and not request.has_checkpoints:
        raise ConfigurationError(
            "several ranks read Megatron checkpoints; start them with --nproc-per-node, which converts the "
            "source first, or name checkpoints with --model and --aligned"
        )
    return partial(_choose, request, world_size, arguments)


def _describe(request: ChoiceRequest) -> None:
    known = Measurements(request.output, request.settings())
    models = rounds_of(len(request.candidates), request.number, greedy=request.greedy)
    start = f"aligned in {request.aligned}" if request.aligned else "set in closed form on "
    if not request.aligned:
        start += f"{request.calibration_tokens:,} tokens of {', '.join(request.calibration_data)}"
    print(f"source         {request.model}, {request.num_layers} layers")
    print(f"swapped        {request.number} of {len(request.candidates)} candidates, {start}")
    print(f"measured       {models} models on {request.tokens:,} tokens, {len(known)} of them known")
    print(f"output         {request.output}")


def _convert_and_start(
    request: ChoiceRequest, overwrite: bool, elsewhere: Elsewhere, keep_work: bool
) -> None:
    _prepare(request, overwrite)
    elsewhere.start()
    if not keep_work:
        request.remove_work()


def _prepare(request: ChoiceRequest, overwrite: bool) -> None:
    if overwrite:
        request.begin_anew()
    Measurements(request.output, request.settings()).begin()
    if not request.has_checkpoints:
        with activity("importing torch"):
            import torch  # noqa: F401
        convert(request)


def _choose(request: ChoiceRequest, world_size: int, arguments: argparse.Namespace) -> None:
    if world_size == 1:
        _prepare(request, arguments.overwrite)
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    shown = os.environ.get("RANK", "0") == "0"
    with activity("importing torch and megatron-core", shown=shown):
        ignore_megatron_warnings()
        from spikingbrain_train.layer_choice.choose import choose

    text = choose(request, world_size)
    if text is not None:
        print(text)
    if world_size == 1 and not arguments.keep_work:
        request.remove_work()
