"""What is in a checkpoint folder, Hugging Face or Megatron, told without reading weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from spikingbrain_train.architecture.layer_letters import layer_letters
from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run_record import TokenHistory
from spikingbrain_train.conversion.formats.outside_kinds import without_code
from spikingbrain_train.conversion.formats.registry import format_of_model, unsupported
from spikingbrain_train.conversion.formats.rope import scaling_values, words_of
from spikingbrain_train.conversion.formats.sse_swa_moba import is_spikingbrain2
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.inspect_spikingbrain2 import (
    SpikingBrain2Inspection,
    inspect_spikingbrain2,
)
from spikingbrain_train.conversion.lineage import Step, lineage
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.conversion.packed_ternary import open_tensors
from spikingbrain_train.conversion.report import describe_layers
from spikingbrain_train.conversion.reshard import describe_origin
from spikingbrain_train.planning.token_history import describe_all, history_with
from spikingbrain_train.reporting.tables import facts, table, terminal_width
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


@dataclass(frozen=True)
class Tensors:
    """Some tensors of a checkpoint."""

    number: int
    elements: int
    bytes: int
    dtypes: list[str]

    def describe(self) -> str:
        """In a line."""
        return (
            f"{self.number} tensors, {self.elements:,} numbers, {self.bytes / 1e6:,.1f} MB, "
            f"{', '.join(self.dtypes)}"
        )


@dataclass(frozen=True)
class Listed:
    """One tensor."""

    name: str
    shape: list[int]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a folder holds."""

    folder: str
    format: str
    """``Hugging Face checkpoint, Qwen2ForCausalLM``, or ``Megatron torch_dist checkpoint``."""
    export: str | None
    """What a Megatron checkpoint exports as, or that it has no Hugging Face format."""
    model: ModelConfig
    weights: Tensors
    training: Tensors | None
    """Optimizer and other training state; None in a folder without."""
    has_tokenizer: bool
    lineage: list[Step]
    """The folder and what it came from, the source last."""
    history: TokenHistory
    """What its stages have read."""
    files: str
    """The files that its tensors lie in: ``4 files, 1.2 GB; TP 2 x PP 2, written by 4 ranks``."""
    tensors: list[Listed]
    """Every tensor, those of the optimizer included."""

    def text(self, width: int | None = None) -> str:
        """For a terminal of ``width`` columns; null takes that of this one."""
        rows = [*_model_rows(self.model)]
        rows.append(("weights:", self.weights.describe()))
        if self.training is not None:
            rows.append(("training:", f"{self.training.describe()} (optimizer and other training state)"))
        rows.append(("files:", self.files))
        rows.append(("tokenizer:", "yes" if self.has_tokenizer else "no"))
        if self.export is not None:
            rows.append(("export:", self.export))
        if self.lineage[0].written is not None:  # else there is nothing but a plain folder
            first, *others = self.lineage
            rows.append(("lineage:", first.describe()))
            rows += [("", f"from {step.describe()}") for step in others]
        if self.history.stages:
            rows.append(("tokens:", describe_all(self.history)))
        return "\n".join([f"{self.folder}: {self.format}", *facts(rows, width or terminal_width())])

    def table(self, pattern: str) -> str:
        """The tensors whose names a pattern of a shell fits (``*qkv*``), for a terminal."""
        found = [each for each in self.tensors if fnmatchcase(each.name, pattern)]
        if not found:
            return f"none of {len(self.tensors)} tensors has a name like {pattern}"
        rows = [(t.name, str(t.shape), t.dtype, f"{t.bytes / 1e6:,.2f} MB") for t in found]
        total = sum(each.bytes for each in found)
        listed = table([("tensor", "shape", "dtype", "size"), *rows], left=3)
        return "\n".join([*listed, f"{len(found)} of {len(self.tensors)} tensors, {total / 1e6:,.1f} MB"])

    def values(self) -> dict[str, Any]:
        """For programs: plain values, which JSON takes."""
        words, legend = layer_letters(self.model)
        return {
            "folder": self.folder,
            "format": self.format,
            "export": self.export,
            "layers": [
                {
                    "mixers": [kind.name for kind in reversed(layer.mixers)],
                    "feed_forward": layer.feed_forward.name,
                }
                for layer in layers(self.model)
            ],
            "layer_letters": words,
            "legend": legend,
            "model": OmegaConf.to_container(OmegaConf.structured(self.model), enum_to_str=True),
            "weights": asdict(self.weights),
            "training": self.training and asdict(self.training),
            "files": self.files,
            "tensors": [asdict(each) for each in self.tensors],
            "has_tokenizer": self.has_tokenizer,
            "lineage": [asdict(step) for step in self.lineage],
            "tokens": {**asdict(self.history), "known": self.history.tokens},
        }


def inspect_checkpoint(folder: Path) -> Inspection | SpikingBrain2Inspection:
    """What is in the checkpoint in ``folder``; it is checked for completeness on the way.

    A folder of SpikingBrain2.0, which cannot be imported, is told tensor by tensor.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete or damaged.
    """
    if (folder / CONFIG_FILE).is_file():
        if is_spikingbrain2(load_config_json(folder)):
            return inspect_spikingbrain2(folder)
        return _inspect_hf(folder)
    return _inspect_megatron(resolve_checkpoint(folder))


def _inspect_hf(folder: Path) -> Inspection:
    hf_format, model = read_hf_config(folder)
    reader = open_tensors(folder, hf_format, model)
    return Inspection(
        str(folder),
        f"Hugging Face checkpoint, {hf_format.architecture}",
        None,
        model,
        _tensors((spec.shape, spec.dtype) for spec in reader.specs.values()),
        None,
        has_tokenizer(folder),
        lineage(folder),
        history_with(folder),
        _files({reader.file_of(name) for name in reader.specs}),
        [_listed(name, spec.shape, spec.dtype) for name, spec in reader.specs.items()],
    )


def _inspect_megatron(folder: Path) -> Inspection:
    model = read_model(folder)
    reader = MegatronCheckpointReader(folder)
    parameters = check_tensors(reader, model)
    entries = {name: (tuple(entry.size), entry.properties.dtype) for name, entry in reader.tensors.items()}
    others = [entry for name, entry in entries.items() if name not in parameters]
    if parts := unsupported(model) or [f"{kind.name} of projections" for kind in without_code(model)]:
        export = f"has no Hugging Face format ({', '.join(parts)})"
    else:
        export = f"exports as {format_of_model(model).architecture}"
    return Inspection(
        str(folder),
        "Megatron torch_dist checkpoint",
        export,
        model,
        _tensors(entries[name] for name in parameters),
        _tensors(others) if others else None,
        has_tokenizer(folder / HF_SOURCE_FOLDER),
        lineage(folder),
        history_with(folder),
        f"{_files(folder.glob('*.distcp'))}; {describe_origin(folder)}",
        [_listed(name, *entry) for name, entry in entries.items()],
    )


def _files(paths: Iterable[Path]) -> str:
    sizes = [path.stat().st_size for path in paths]
    return f"{len(sizes)} {'file' if len(sizes) == 1 else 'files'}, {sum(sizes) / 1e6:,.1f} MB"


def _listed(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Listed:
    return Listed(name, list(shape), str(dtype).removeprefix("torch."), prod(shape) * dtype.itemsize)


def _model_rows(model: ModelConfig) -> Iterator[tuple[str, str]]:
    tied = "tied" if model.share_embeddings_and_output_weights else "untied"
    words, legend = layer_letters(model)
    yield "layers:", describe_layers(model)
    if len(set(words)) > 1:
        yield "", " ".join(words)
        yield "", ", ".join(f"{sign} {name}" for sign, name in legend.items())
    yield (
        "sizes:",
        f"hidden {model.hidden_size}, feed-forward {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads of {model.kv_channels} in {model.num_query_groups} groups",
    )
    yield "vocabulary:", f"{model.vocab_size}, {tied} embeddings"
    scaling = scaling_values(model.rope_scaling)
    scaled = f", {words_of(model.rope_scaling)} of factor {model.rope_scaling.factor:g}" if scaling else ""
    yield "positions:", f"up to {model.max_position_embeddings}, rotary base {model.rotary_base:g}{scaled}"
    extras = [
        name
        for name, on in (
            ("q/k/v bias", model.add_qkv_bias),
            ("q/k norm", model.qk_layernorm),
            ("norm of attention outputs", model.attn_sub_norm),
            ("norm of feed-forward products", model.ffn_sub_norm),
            (f"{model.num_sink_tokens} sink tokens", model.num_sink_tokens),
            *((kind.describe(model), True) for kind in transforms_of(model)),
        )
        if on
    ]
    if extras:
        yield "extras:", ", ".join(extras)


def _tensors(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> Tensors:
    listed = list(tensors)
    return Tensors(
        len(listed),
        sum(prod(shape) for shape, _ in listed),
        sum(prod(shape) * dtype.itemsize for shape, dtype in listed),
        sorted({str(dtype).removeprefix("torch.") for _, dtype in listed}),
    )
