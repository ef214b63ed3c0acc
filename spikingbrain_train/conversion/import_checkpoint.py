"""Hugging Face checkpoint -> Megatron checkpoint, with the mixer swap and the upcycling on the way."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts, layers, swapped_layers
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointWriter
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingForm
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import AND_SO_ON, ModelConfig
from spikingbrain_train.config.sections import with_layers
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.formats.hf_format import HfFormat, Zeros
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.new_parameters import NewParameters
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.conversion.report import NEW, ConversionReport, describe_layers
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader, refuse_quantised
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.upcycling import describe_copies, expert_chunks
from spikingbrain_train.conversion.weight_values import describe_damage
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
)
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # a buffer that old transformers versions stored


@dataclass(frozen=True)
class _Planned:
    """One parameter of the result."""

    parameter: Parameter
    dtype: torch.dtype
    in_source: bool
    """Whether it is made of the source's tensors; else it is new."""

    @property
    def nbytes(self) -> int:
        return self.parameter.numel * self.dtype.itemsize


def import_checkpoint(
    hf_folder: Path,
    output: Path,
    conversion: ConversionConfig | None = None,
    *,
    window_convention: WindowConvention | None = None,
    overwrite: bool = False,
    allow_damaged_weights: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Write the Hugging Face checkpoint ``hf_folder`` as the Megatron checkpoint ``output/iter_0000000``.

    Tensors stream one by one: memory does not grow with the model. No GPU, no process group.

    Args:
        hf_folder: config.json and safetensors of a Llama, Qwen2, Qwen2.5, Qwen3 or published SpikingBrain-7B
            model.
        output: folder to be made; it appears whole or not at all.
        conversion: mixers, feed-forwards and sinks of the result. None keeps the source's.
        window_convention: what ``sliding_window`` of a published SpikingBrain-7B folder counts; None takes
            it as the published default code does, and the report says so.
        overwrite: replace an earlier result in ``output``.
        allow_damaged_weights: import tensors that hold NaN, infinities or only zeros, with a note.
        dry_run: check everything but the values and report without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: the source is malformed, damaged or unsupported, or the output cannot be written.
        ConfigurationError: the recipe does not fit the source, or the source leaves nothing for
            ``window_convention`` to say.
    """
    started = time.monotonic()
    hf_format, source = read_hf_config(hf_folder, window_convention)
    hf_notes = hf_format.notes_on_import(hf_folder, load_config_json(hf_folder), source, window_convention)
    if conversion is not None:
        check_fields(conversion)
    target = _target(source, conversion, hf_folder)
    check_model(target)
    reader = SafetensorsReader(hf_folder)
    ignored = _check_source(reader, hf_format, source)
    recipe = conversion or ConversionConfig()  # without one the source is copied, and none of it is used
    tensors = Source(reader, hf_format, source, allow_damaged_weights=allow_damaged_weights)
    converter = _Converter(tensors, recipe)
    plan = converter.plan(target)
    report = ConversionReport(
        source=str(hf_folder),
        output=str(output),
        architecture=hf_format.architecture,
        layers=describe_layers(target),
        dry_run=dry_run,
        ignored=ignored,
        bytes=sum(planned.nbytes for planned in plan),
    )
    for planned in plan:
        group = planned.parameter.weight.group
        report.count(group, converter.origin(planned), planned.parameter.numel)
    if unused := tensors.unused(planned.parameter for planned in plan):
        report.ignored.append(
            f"{len(unused)} tensors such as {unused[0]}, which have no part in the new layers"
        )
    for name in _too_long(recipe, source) if conversion is not None else []:
        report.notes.append(
            f"{name} of the recipe lists {len(getattr(recipe, name))} layers, of which the source has the "
            f"first {source.num_layers}; {name}=[...] chooses others"
        )
    report.notes += hf_notes + _notes(target, recipe, drawn=report.new_parameters > 0)
    companions = find_companion_files(hf_folder)
    report.notes += companions.left_behind
    if not has_tokenizer(hf_folder):
        report.notes.append(f"{hf_folder} has no tokenizer; name one with data.tokenizer when training")
    check_output_folder(
        output,
        source=hf_folder,
        overwrite=overwrite,
        marker=LATEST_ITERATION_FILE,
        needed_bytes=report.bytes,
        dry_run=dry_run,
    )
    if dry_run:
        return report

    with complete_folder(output, progress=progress) as folder:
        checkpoint = iteration_folder(folder, 0)
        (checkpoint / HF_SOURCE_FOLDER).mkdir(parents=True)
        companions.copy_to(checkpoint / HF_SOURCE_FOLDER)
        with (
            activity("importing", report.bytes, "B", shown=progress) as done,
            MegatronCheckpointWriter(checkpoint) as writer,
        ):
            for planned in plan:
                name, shape = planned.parameter.name, planned.parameter.shape
                for offset, chunk in converter.chunks(planned):
                    writer.write_chunk(name, shape, offset, chunk)
                    done.advance(chunk.nbytes)
        save_config(target, checkpoint / MODEL_CONFIG_FILE)
        report.notes += describe_damage(tensors.damaged)
        report.seconds = time.monotonic() - started
        report.save(folder)
        (folder / LATEST_ITERATION_FILE).write_text("0", encoding="utf-8")
    return report


def _target(source: ModelConfig, conversion: ConversionConfig | None, hf_folder: Path) -> ModelConfig:
    """The architecture of the result: the source's sizes with the recipe's layers."""
    if conversion is None:
        return source
    if swapped_layers(layers(source)):
        raise CheckpointError(
            f"{hf_folder} is a hybrid already and its layers are not converted again; leave --conversion out "
            "to keep them"
        )
    for name in _too_long(conversion, source):
        conversion = replace(conversion, **{name: getattr(conversion, name)[: source.num_layers]})
    target = with_layers(source, conversion)
    for kind in feed_forwards_of(target):
        kind.check_source(target)
    if target.num_sink_tokens > target.vocab_size:
        raise ConfigurationError(
            f"num_sink_tokens={target.num_sink_tokens} is more than the source has embeddings to start them "
            f"from; use at most {target.vocab_size}"
        )
    return target


def _too_long(recipe: ConversionConfig, source: ModelConfig) -> list[str]:
    """The lists of layers of which a source with fewer takes the first entries."""
    lists = {"mixers": recipe.mixers, "feed_forwards": recipe.feed_forwards}
    return [
        name for name, listed in lists.items() if len(listed) > source.num_layers and AND_SO_ON not in listed
    ]


def _check_source(reader: SafetensorsReader, hf_format: HfFormat, source: ModelConfig) -> list[str]:
    """Hold the source's tensors against its architecture; return what may be left out, with the reason.

    Raises:
        CheckpointError: a tensor is missing, has another shape, differs in dtype from those it is fused with,
    or is unknown.
    """
    refuse_quantised(reader)
    expected = set()
    for parameter in model_parameters(source):
        names = parameter.hf_names(hf_format.names)
        for name, shape in zip(names, parameter.hf_shapes, strict=True):
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
    ignored = []
    zeros = _zeros(reader, hf_format, source)
    for what, number in Counter(zeros.values()).items():
        ignored.append(f"{number} {what} (zero, for classes that always have them)")
    for name in sorted(set(reader.specs) - expected - set(zeros)):
        if _RECOMPUTED.search(name):
            ignored.append(f"{name} (recomputed from rope_theta)")
        elif name == hf_format.names["output"] and source.share_embeddings_and_output_weights:
            if not _is_copy(reader.read(name), reader.read(hf_format.names["embedding"])):
                raise CheckpointError(
                    f"{reader.file_of(name)}: {name} differs from the embedding although {CONFIG_FILE} has "
                    "tie_word_embeddings = true; set it to false if the output layer is its own"
                )
            ignored.append(f"{name} (identical to the tied embedding)")
        else:
            raise CheckpointError(
                f"{reader.file_of(name)}: the tensor {name} is not part of {hf_format.architecture} as "
                f"{CONFIG_FILE} describes it; importing without it would change the model"
            )
    return ignored


def _is_copy(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, a NaN being the same as itself."""
    if tensor.dtype is not other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(tensor, other) or torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


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


def _notes(target: ModelConfig, recipe: ConversionConfig, *, drawn: bool) -> list[str]:
    """What the table of the report cannot say."""
    notes = [f"new parameters are drawn with seed {recipe.seed}"] if drawn else []
    upcycling = recipe.upcycling
    if has_experts(target) and upcycling.form is UpcyclingForm.exact and upcycling.reinit_fraction:
        notes.append(
            "upcycling.reinit_fraction replaces a part of the copies, so the result starts near the dense "
            "function, not at it"
        )
    return notes


class _Converter:
    """Where every parameter of the result comes from, and its values."""

    def __init__(self, source: Source, recipe: ConversionConfig) -> None:
        self.source = source
        self.recipe = recipe
        self.new = NewParameters(source, recipe)

    def plan(self, target: ModelConfig) -> list[_Planned]:
        """Every parameter of ``target``, in forward order."""
        plan = []
        dtype = torch.float32
        for parameter in model_parameters(target):
            in_source = self.source.has(parameter)
            if in_source:
                dtype = self.source.dtype(parameter)
            # New ones take the dtype of what precedes them.
            plan.append(_Planned(parameter, dtype, in_source))
        return plan

    def origin(self, planned: _Planned) -> str:
        """Where a parameter comes from, in words."""
        if not planned.in_source:
            return NEW + self.new.describe(planned.parameter)
        if planned.parameter.copies is not None:
            return describe_copies(planned.parameter, self.recipe.upcycling)
        if self.source.copies_heads(planned.parameter):
            return "copied, keys and values once for every group of their own"
        return "copied"

    def chunks(self, planned: _Planned) -> Iterator[tuple[Shape, Tensor]]:
        """Offsets and values of the parts that make up a parameter: experts one by one, all else whole."""
        parameter = planned.parameter
        if planned.in_source and parameter.copies is not None:
            parts = self.source.parts(parameter)
            yield from expert_chunks(parameter, parts, self.recipe.upcycling, self.recipe.seed)
            return
        if planned.in_source:
            tensor = parameter.fuse(self.source.parts(parameter))
        else:
            tensor = self.new.draw(parameter, planned.dtype)
        yield (0,) * tensor.dim(), tensor
