"""An export as one GGUF file: its pieces, and where they lie. The header is written by the package gguf."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.saved_tensor import Block
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.rope_scaling import RopeType
from spikingbrain_train.conversion.export_pieces import Piece
from spikingbrain_train.conversion.formats.gguf import GgufFormat
from spikingbrain_train.conversion.gguf_blocks import ternary_blocks, ternary_scale, turned
from spikingbrain_train.conversion.gguf_tokenizer import add_tokenizer
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.safetensors_io import TensorPlace, TensorSpec, write_blocks
from spikingbrain_train.errors import PlatformError

GGUF_FILE = "model.gguf"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""``general.file_type`` (llama_ftype), by what most of the file is."""
_MOSTLY = {"Q4_0": 2, "TQ2_0": 37, "Q2_0": 41}


def pieces(
    parameter: Parameter, shapes: dict[str, Shape], hf_format: GgufFormat, model: ModelConfig
) -> list[Piece]:
    """A parameter's tensors as llama.cpp wants them.

    Queries and keys have their rows reordered, ternary matrices are blocks, some with a scale beside them,
    vectors float32.
    """
    weight = parameter.weight
    kind, has_scale = hf_format.block_type(weight, model), hf_format.has_scale_beside(weight, model)
    encoders = []
    for role in weight.roles:
        steps: list[Callable[[Tensor], Tensor]] = []
        if (heads := hf_format.turned_heads(role, model)) is not None:
            steps.append(partial(turned, heads=heads))
        if kind is not None:
            steps.append(partial(ternary_blocks, kind=kind, has_scale_beside=has_scale))
        encoders.append(partial(_all, steps))
    if kind is not None:
        stored = {name: (rows, inputs // kind.size * kind.nbytes) for name, (rows, inputs) in shapes.items()}
        blocks = Piece(
            parameter,
            dict(stored),
            weight.group,
            f"rounded to ternary ({kind.name})",
            dtype=torch.uint8,
            encoders=tuple(encoders),
        )
        if not has_scale:
            return [blocks]
        scales = Piece(
            parameter,
            dict.fromkeys(hf_format.scale_names(list(shapes)), (1,)),
            "scales of ternary weights",
            "mean magnitude of each matrix",
            is_repeated=True,
            dtype=torch.float32,
            encoders=(ternary_scale,),
        )
        return [blocks, scales]
    is_vector = all(len(shape) == 1 for shape in shapes.values())
    reordered = any(hf_format.turned_heads(role, model) is not None for role in weight.roles)
    return [
        Piece(
            parameter,
            shapes,
            weight.group,
            "rows reordered" if reordered else "copied",
            dtype=torch.float32 if is_vector else None,
            encoders=tuple(encoders) if reordered else (),
        )
    ]


def _all(steps: list[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


class GgufFile:
    """``model.gguf``, written in any order, as :class:`~.safetensors_io.SafetensorsFolder`.

    Args:
        header: all that stands before the tensors.
        specs: of all tensors, in the order of the header.
        alignment: bytes that the place of each is a multiple of.
    """

    def __init__(self, header: bytes, specs: list[TensorSpec], alignment: int) -> None:
        self.header = header
        self.places: dict[str, TensorPlace] = {}
        end = len(header)
        for spec in specs:
            self.places[spec.name] = TensorPlace(spec, GGUF_FILE, end)
            end += spec.nbytes + -spec.nbytes % alignment
        self._size = end

    def begin(self, folder: Path) -> None:
        """Make the file, in its full size; what a killed call wrote into it stays."""
        path = folder / GGUF_FILE
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.write(self.header)
            file.truncate(self._size)

    def write(self, folder: Path, name: str, blocks: Iterable[Block]) -> int:
        """Write a tensor where it belongs; returns the CRC-32 of its bytes, which are read back."""
        return write_blocks(folder, self.places[name], blocks)


def layout(
    pieces: list[Piece], specs: list[TensorSpec], hf_format: GgufFormat, model: ModelConfig, source: Path
) -> tuple[GgufFile, list[str]]:
    """Where the tensors lie, behind a header that says what the model is.

    Args:
        pieces: of the export, in the order in which they are to lie.
        specs: of their tensors.
        hf_format: which of GGUF's.
        model: the architecture.
        source: folder with config.json and tokenizer of the Hugging Face source.

    Returns:
        The file, and notes for the report.

    Raises:
        PlatformError: the package gguf is not installed.
        CheckpointError: the tokenizer is none that llama.cpp has.
    """
    if importlib.util.find_spec("gguf") is None:
        raise PlatformError(
            "writing GGUF needs the package gguf: pip install gguf, or choose another --format"
        )
    import gguf

    kinds = {
        name: hf_format.block_type(piece.parameter.weight, model) if piece.dtype is torch.uint8 else None
        for piece in pieces
        for name in piece.shapes
    }
    writer = gguf.GGUFWriter(None, hf_format.gguf_architecture(model))
    sizes: dict[int, int] = {}
    for spec in specs:
        kind, shape = kinds[spec.name], spec.shape
        if kind is not None:
            shape = (*shape[:-1], shape[-1] // kind.nbytes * kind.size)
        # With a dtype that is not uint8 the shape is taken as it is, of types that the package lacks, too.
        number = _TYPES[spec.dtype] if kind is None else kind.number
        writer.add_tensor_info(spec.name, shape, np.dtype(np.float32), spec.nbytes, raw_dtype=number)
        file_type = _FILE_TYPES[spec.dtype] if kind is None else _MOSTLY[kind.name]
        if len(shape) > 1:
            sizes[file_type] = sizes.get(file_type, 0) + prod(shape)
    _describe(writer, model)
    writer.add_file_type(max(sizes, key=lambda each: sizes[each]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_tokenizer(writer, source, model.vocab_size)
    return GgufFile(_header(writer), specs, writer.data_alignment), notes


def _describe(writer: Any, model: ModelConfig) -> None:
    """Sizes, positions and norms, as convert_hf_to_gguf.py of llama.cpp writes them."""
    writer.add_vocab_size(model.vocab_size)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_key_length(model.kv_channels)
    writer.add_value_length(model.kv_channels)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_dimension_count(model.kv_channels)
    writer.add_rope_freq_base(model.rotary_base)
    if model.rope_scaling.rope_type is RopeType.linear:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling.factor)


def _header(writer: Any) -> bytes:
    """All that stands before the tensors: the package writes it into a file, and it ends where they begin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GGUF_FILE
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + b"\0" * (-len(header) % writer.data_alignment)
