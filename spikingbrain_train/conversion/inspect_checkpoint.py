"""What is in a checkpoint folder, Hugging Face or Megatron, told without reading weights."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch

from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.export_checkpoint import check_tensors
from spikingbrain_train.conversion.formats.registry import format_of_model, unsupported
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.report import describe_layers
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader, refuse_quantised
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER, MODEL_CONFIG_FILE
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE
from spikingbrain_train.storage.stored_layers import check_number_of_layers
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


def inspect_checkpoint(folder: Path) -> str:
    """A few lines about the checkpoint in ``folder``; it is checked for completeness on the way.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete or damaged.
    """
    if (folder / CONFIG_FILE).is_file():
        return _inspect_hf(folder)
    return _inspect_megatron(resolve_checkpoint(folder))


def _inspect_hf(folder: Path) -> str:
    hf_format, model = read_hf_config(folder)
    reader = SafetensorsReader(folder)
    refuse_quantised(reader)
    specs = reader.specs.values()
    return "\n".join(
        [
            f"{folder}: Hugging Face checkpoint, {hf_format.architecture}",
            *_describe_model(model),
            _describe_tensors("weights", [(spec.shape, spec.dtype) for spec in specs]),
            f"tokenizer:  {'yes' if has_tokenizer(folder) else 'no'}",
        ]
    )


def _inspect_megatron(folder: Path) -> str:
    model = read_stored_model(folder)
    reader = MegatronCheckpointReader(folder)
    check_number_of_layers(
        f"{folder / MODEL_CONFIG_FILE}: num_layers", model.num_layers, lambda: reader.tensors
    )
    parameters = check_tensors(reader, model)
    entries = {name: (tuple(entry.size), entry.properties.dtype) for name, entry in reader.tensors.items()}
    others = [entry for name, entry in entries.items() if name not in parameters]
    if parts := unsupported(model):
        export = f"has no Hugging Face format ({', '.join(parts)})"
    else:
        export = f"exports as {format_of_model(model).architecture}"
    lines = [
        f"{folder}: Megatron torch_dist checkpoint, {export}",
        *_describe_model(model),
        _describe_tensors("weights", [entries[name] for name in parameters]),
    ]
    if others:
        lines.append(_describe_tensors("training", others) + " (optimizer and other training state)")
    lines.append(f"tokenizer:  {'yes' if has_tokenizer(folder / HF_SOURCE_FOLDER) else 'no'}")
    return "\n".join(lines)


def _describe_model(model: ModelConfig) -> list[str]:
    tied = "tied" if model.share_embeddings_and_output_weights else "untied"
    extras = [
        name
        for name, on in (
            ("q/k/v bias", model.add_qkv_bias),
            ("q/k norm", model.qk_layernorm),
            (f"{model.num_sink_tokens} sink tokens", model.num_sink_tokens),
            *((kind.describe(model), True) for kind in transforms_of(model)),
        )
        if on
    ]
    return [
        f"layers:     {describe_layers(model)}",
        f"sizes:      hidden {model.hidden_size}, feed-forward {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads of {model.kv_channels} in {model.num_query_groups} groups",
        f"vocabulary: {model.vocab_size}, {tied} embeddings",
        f"positions:  up to {model.max_position_embeddings}, rotary base {model.rotary_base:g}",
        *([f"extras:     {', '.join(extras)}"] if extras else []),
    ]


def _describe_tensors(title: str, tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> str:
    listed = list(tensors)
    numbers = sum(prod(shape) for shape, _ in listed)
    size = sum(prod(shape) * dtype.itemsize for shape, dtype in listed)
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in listed}))
    return f"{title + ':':<11} {len(listed)} tensors, {numbers:,} numbers, {size / 1e6:,.1f} MB, {dtypes}"
