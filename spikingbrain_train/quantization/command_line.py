"""Arguments of spikingbrain-quantize, understood before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import with_plain_weights
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.plugins import add_plugins_argument, load_plugins, plugins_of
from spikingbrain_train.conversion.formats.registry import format_of_model, parse_hf_config
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.model_arguments import add_device, add_number_format, add_trust
from spikingbrain_train.evaluation.model_folder import check_model_folder, is_megatron_checkpoint
from spikingbrain_train.planning.file_checks import check_output_folder, check_prefix
from spikingbrain_train.quantization.published_layout import check_published
from spikingbrain_train.quantization.request import (
    PUBLISHED_PROJECTIONS,
    Layout,
    Method,
    QuantizeRequest,
    Scales,
    check_code,
    check_group_size,
    check_holds,
    widths_of,
)
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_DESCRIPTION = """\
Make INT8 weights, spikes and INT8 keys and values (W8ASpike) of a trained hybrid: calibrated on text,
measured step by step on held-out text, written as a Hugging Face folder whose tensors are really INT8 and
whose code multiplies integers on CPUs.
"""

_EXAMPLES = """\
examples:
  # a trained checkpoint; SmolLM2-135M has 576 inputs, which 128 does not divide
  spikingbrain-quantize --model outputs/smollm2/cpt --calibration-data outputs/smollm2/data/text_train \\
      --data outputs/smollm2/data/text_valid --group-size 64 --output outputs/smollm2/int8

  # let codes make up for each other's errors, and compare that with plain rounding
  spikingbrain-quantize --model outputs/smollm2/cpt --calibration-data outputs/smollm2/data/text_train \\
      --data outputs/smollm2/data/text_valid --group-size 64 --method gptq --output outputs/smollm2/gptq

  # one scale a row: the fastest on CPUs
  spikingbrain-quantize --model outputs/smollm2/export --trust-remote-code --group-size row \\
      --calibration-data outputs/smollm2/data/text_train --output outputs/smollm2/rows

In --output: the model, quantization.json (perplexities, errors of every linear), quantization.png (errors per
layer). A checkpoint that was trained with model.quantization or model.spiking brings its settings.
"""
_NONE = "none"
_ROW = "row"


def quantize_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-quantize."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Megatron checkpoint of a hybrid that an export holds, or such an export",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the quantised model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in --output")
    parser.add_argument(
        "--calibration-data",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="indexed datasets, without .bin/.idx, to calibrate on; not what is measured on",
    )
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="samples of it (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of a sample and of a window (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="held-out indexed datasets to measure the perplexity on, before and after each step",
    )
    parser.add_argument(
        "--max-windows", type=int, metavar="N", help="use the first N windows of it (default: all)"
    )
    parser.add_argument(
        "--method",
        choices=[each.value for each in Method],
        default=Method.plain.value,
        help="plain takes the next code of every weight; gptq lets codes make up for each other's errors on "
        "the calibration text, and is measured against plain (default: %(default)s)",
    )
    parser.add_argument(
        "--scales",
        choices=[each.value for each in Scales],
        help="of plain rounding: calibrated takes the best of a few on the calibration text, largest that of "
        "the largest weight (default: calibrated; largest for a checkpoint trained with INT8 weights)",
    )
    parser.add_argument(
        "--group-size",
        metavar="N",
        help="weights along the input that share a scale, or row for all of them, which CPUs multiply "
        "fastest (default: as the checkpoint was trained, else 128)",
    )
    parser.add_argument(
        "--format",
        choices=[each.value for each in Layout],
        default=Layout.int8.value,
        help="int8 writes INT8 tensors; w8aspike the published layout: floats beside the scales that they "
        "are rounded to, spikes also in front of queries; down projection, embedding and output layer as "
        "they are (default: %(default)s)",
    )
    names = ",".join(each.value for each in Projection)
    parser.add_argument(
        "--projections",
        metavar="LIST",
        help=f"which have INT8 weights, of {names} (default: as the checkpoint was trained, else all)",
    )
    parser.add_argument(
        "--spikes",
        metavar="LIST",
        help="which of them read spikes, or none; others read INT8 numbers, a scale a token (default: as the "
        "checkpoint was trained, else all but mlp_fc2, as published)",
    )
    parser.add_argument(
        "--k",
        type=float,
        metavar="X",
        help="fineness of spikes (default: as the checkpoint was trained, else 3)",
    )
    parser.add_argument(
        "--float-keys-and-values",
        action="store_true",
        help="leave keys and values of softmax layers as they are",
    )
    parser.add_argument(
        "--float-embeddings", action="store_true", help="leave embedding and output layer as they are"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    add_number_format(parser, of="to compute in, and of what stays float")
    add_device(parser)
    add_trust(parser)
    add_plugins_argument(parser)
    return parser


def quantize(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-quantize."""
    with user_errors():
        parsed = quantize_parser().parse_args(arguments)
        load_plugins(plugins_of(vars(parsed), "the command line"))
        request, model = _request(parsed)
        needed_bytes = int(_size(request, model))
        with activity("importing torch and transformers"):
            from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

            ignore_megatron_warnings()
            from spikingbrain_train.quantization.quantize import check
            from spikingbrain_train.quantization.quantize import quantize as do

        if parsed.dry_run:
            check(request, needed_bytes)
            print(_plan(request, model))
            return
        report = do(request, needed_bytes)
        print(report.describe(request.output))
        sys.stdout.flush()


def _request(arguments: argparse.Namespace) -> tuple[QuantizeRequest, ModelConfig]:
    """Check everything that needs no torch."""
    for name in ("samples", "seq_length", "max_windows"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value < 2**31:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} is {value}; give at least 1 and below 2**31"
            )
    if arguments.k is not None and not 0 < arguments.k < 1e6:
        raise ConfigurationError(f"--k is {arguments.k}; give a number above 0, 3 as published")
    is_checkpoint = is_megatron_checkpoint(arguments.model)
    if is_checkpoint:
        model = read_stored_model(resolve_checkpoint(arguments.model, "--model"))
        floats = with_plain_weights(model)
        config = format_of_model(floats).config(floats, None, "bfloat16")
    else:
        check_model_folder(arguments.model, arguments.trust_remote_code)
        config = load_config_json(arguments.model)
        check_holds(arguments.model, config)
        check_code(arguments.model)
        model = parse_hf_config(config, arguments.model / CONFIG_FILE)[1]
    check_holds(arguments.model, config)
    for flag, prefixes in (("--calibration-data", arguments.calibration_data), ("--data", arguments.data)):
        for prefix in prefixes:
            check_prefix(flag, prefix)
    check_output_folder(arguments.output.parent, "--output")
    trained, spiking, layout = model.quantization, model.spiking, Layout(arguments.format)
    every = list(Projection)
    if layout is Layout.w8aspike:  # which says it all
        trained, spiking, every = QuantizationConfig(), SpikingConfig(), list(PUBLISHED_PROJECTIONS)
    projections = _projections("--projections", arguments.projections, trained.projections or every)
    if not projections:
        raise ConfigurationError("--projections none leaves nothing to quantise; name some, or leave it out")
    usual = [each for each in projections if each is not Projection.mlp_fc2]
    request = QuantizeRequest(
        model=arguments.model,
        is_checkpoint=is_checkpoint,
        output=arguments.output,
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
        calibration_data=arguments.calibration_data,
        samples=arguments.samples,
        seq_length=arguments.seq_length,
        data=arguments.data,
        max_windows=arguments.max_windows,
        method=Method(arguments.method),
        scales=Scales(arguments.scales or ("largest" if trained.projections else "calibrated")),
        group_size=_group_size(arguments.group_size, trained.group_size if trained.projections else 128),
        projections=projections,
        spike_projections=_projections("--spikes", arguments.spikes, spiking.projections or usual),
        k=arguments.k or (spiking.k if spiking.projections else 3.0),
        keys_and_values=not arguments.float_keys_and_values,
        embeddings=layout is Layout.int8 and not arguments.float_embeddings,
        layout=layout,
        device=arguments.device,
        dtype=arguments.dtype,
        vocab_size=config["vocab_size"],
    )
    if layout is Layout.w8aspike:
        check_published(request, model, config)
    check_group_size(request.group_size, widths_of(config, request.linears()))
    return request, model


def _group_size(text: str | None, usual: int) -> int | None:
    if text is None:
        return usual
    if text == _ROW:
        return None
    if not text.isdigit() or not 1 <= int(text) < 2**31:
        raise ConfigurationError(
            f"--group-size is {text}; give a number of weights, 128 as published, or row"
        )
    return int(text)


def _projections(flag: str, text: str | None, usual: Sequence[Projection]) -> list[Projection]:
    if text is None:
        return list(usual)
    if text == _NONE:
        return []
    known = {each.value: each for each in Projection}
    names = text.split(",")
    for name in names:
        if name not in known or names.count(name) > 1:
            raise ConfigurationError(
                f"{flag} {text} lists {name or 'nothing'} {'twice' if name in known else 'too'}; known are "
                f"{', '.join(known)}, each once"
            )
    return [known[name] for name in names]


def _plan(request: QuantizeRequest, model: ModelConfig) -> str:
    groups = "a row" if request.group_size is None else f"{request.group_size} neighbours along the input"
    is_int8 = request.layout is Layout.int8
    by_kind: dict[str, list[str]] = {}
    for name, activation in request.linears().items():
        by_kind.setdefault(activation, []).append(name)
    rows: list[tuple[str, Any]] = [
        ("model", f"{request.model}, {model.num_layers} layers"),
        ("weights", f"INT8, a scale for {groups}, {request.method.value}, {request.scales.value} scales"),
        ("written", "as INT8 tensors" if is_int8 else "as floats beside their scales, as published"),
        *((f"read {kind}", ", ".join(names)) for kind, names in by_kind.items()),
        ("spikes", f"k {request.k:g}"),
        ("keys, values", "INT8, a scale a token and head" if request.keys_and_values else "as they are"),
        ("embedding", "INT8" if request.embeddings else "as it is"),
        ("calibrated on", f"{request.samples} samples of {request.seq_length} tokens"),
        ("measured on", ", ".join(request.data) or "nothing; name held-out text with --data"),
        ("size", f"about {_size(request, model) / 1e6:,.0f} MB"),
        ("output", request.output),
    ]
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


def _size(request: QuantizeRequest, model: ModelConfig) -> float:
    """Bytes of the output's tensors."""
    from spikingbrain_train.architecture.layers import model_weights

    size = 0.0
    for _, weight in model_weights(model):
        per_group = min(request.group_size or weight.shape[-1], weight.shape[-1])
        is_int8 = weight.projection is not None and weight.projection[0] in request.projections
        if request.layout is not Layout.int8:
            size += weight.numel * (2 if weight.projection is None else 2 + 4 / per_group)
            continue
        tables = 1
        if weight.roles[0] in ("embedding", "output"):
            is_int8 = request.embeddings
            tables = 2 if model.share_embeddings_and_output_weights else 1
        size += tables * weight.numel * (1 + 2 / per_group if is_int8 else 2)
    return size
