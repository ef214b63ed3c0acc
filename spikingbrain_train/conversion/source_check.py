"""The tensors of a source, held against the architecture that its config.json describes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import torch

from spikingbrain_train.checkpoint.saved_tensor import bytes_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat, Zeros
from spikingbrain_train.conversion.mapping import model_parameters
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader, same_bytes
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # a buffer that old transformers versions stored


@dataclass
class LeftOut:
    """Tensors of the source that hold nothing of their own."""

    reasons: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    """Those of which there are many, in the plural."""

    def sentences(self) -> list[str]:
        """For the report."""
        many = [f"{number} {what}" for what, number in self.kinds.items()]
        return many + [f"{name} ({why})" for name, why in self.reasons.items() if why not in self.kinds]


def check_source(reader: SafetensorsReader, hf_format: HfFormat, source: ModelConfig) -> LeftOut:
    """Hold the source's tensors against its architecture; return what may be left out, with the reason.

    Raises:
        CheckpointError: a tensor is missing, has another shape, differs in dtype from those it is fused with,
    or is unknown.
    """
    expected = set()
    for parameter in model_parameters(source):
        names = parameter.tensors(hf_format)
        for name, shape in names.items():
            expected.add(name)
            if name not in reader.specs:
                raise CheckpointError(
                    f"{reader.folder}: the tensor {name} of {hf_format.architecture} is missing; copy the "
                    f"folder again, or correct {CONFIG_FILE} if it describes another model"
                )
            stored = reader.specs[name].shape
            if stored != shape:
                raise CheckpointError(
                    f"{reader.file_of(name)}: {name} has shape {list(stored)}, but {CONFIG_FILE} asks for "
                    f"{list(shape)}; take both from the same model"
                )
        dtypes = {name: reader.specs[name].dtype for name in names}
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(
                f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items()
            )
            raise CheckpointError(
                f"{reader.folder}: tensors that become one parameter differ in dtype: {listed}; save the "
                "model in one dtype"
            )
    left_out = LeftOut()
    zeros = _zeros(reader, hf_format, source)
    for name, what in zeros.items():
        left_out.reasons[name] = f"{what} (zero, for classes that always have them)"
        left_out.kinds[left_out.reasons[name]] += 1
    for name in sorted(set(reader.specs) - expected - set(zeros)):
        if _RECOMPUTED.search(name):
            left_out.reasons[name] = "recomputed from rope_theta"
        elif name == hf_format.names["output"] and source.share_embeddings_and_output_weights:
            if not _is_copy(reader, name, hf_format.names["embedding"]):
                raise CheckpointError(
                    f"{reader.file_of(name)}: {name} differs from the embedding although {CONFIG_FILE} has "
                    "tie_word_embeddings = true; set it to false if the output layer is its own"
                )
            left_out.reasons[name] = "identical to the tied embedding"
        else:
            raise CheckpointError(
                f"{reader.file_of(name)}: the tensor {name} is not part of {hf_format.architecture} as "
                f"{CONFIG_FILE} describes it; importing without it would change the model"
            )
    return left_out


def _is_copy(reader: SafetensorsReader, name: str, other: str) -> bool:
    """Whether two tensors hold the same numbers, a NaN being the same as itself."""
    first, second = reader.specs[name], reader.specs[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        torch.equal(block, beside) or same_bytes(bytes_of(block), bytes_of(beside))
        for block, beside in zip(reader.blocks(name), reader.blocks(other), strict=True)
    )


def _zeros(reader: SafetensorsReader, hf_format: HfFormat, source: ModelConfig) -> dict[str, str]:
    """Tensors of zeros that an export holds for readers of its format: name -> what it is.

    The model does not have them.

    Raises:
        CheckpointError: one is not zero.
    """
    found = {}
    for entry in sorted(hf_format.completions(source), key=lambda entry: entry.name):
        if not isinstance(entry, Zeros) or entry.name not in reader.specs:
            continue
        if reader.read(entry.name).any():
            raise CheckpointError(
                f"{reader.file_of(entry.name)}: {entry.name} is not zero although {CONFIG_FILE} has "
                f"{entry.setting} = false; set it to true if the {entry.what} were trained"
            )
        found[entry.name] = entry.what
    return found
