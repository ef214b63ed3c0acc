"""Megatron checkpoint -> Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.architecture.linear_transforms import base_of, with_plain_weights
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.import_path import object_at
from spikingbrain_train.conversion.account import Use, save_checksums
from spikingbrain_train.conversion.code_references import left_out, references
from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.export_code import from_outside
from spikingbrain_train.conversion.export_code_check import check_code
from spikingbrain_train.conversion.export_parts import ExportParts, Layout
from spikingbrain_train.conversion.export_pieces import Piece, export_pieces
from spikingbrain_train.conversion.formats.outside_kinds import kinds_of
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.conversion.parts import damage_in
from spikingbrain_train.conversion.report import ConversionReport, describe_layers
from spikingbrain_train.conversion.safetensors_io import SafetensorsFolder, TensorSpec
from spikingbrain_train.conversion.scheduled_transforms import at_its_iteration, notes_on_schedules
from spikingbrain_train.conversion.tokenizer_files import drop_tokenizer_code, keep_tokenizer_class
from spikingbrain_train.conversion.weight_values import describe_damage
from spikingbrain_train.conversion.work import Work
from spikingbrain_train.conversion.work_key import source_files, work_key
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

DEFAULT_SHARD_SIZE = 5 * 10**9


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    allow_damaged_weights: bool = False,
    format_name: str | None = None,
    float_weights: bool = False,
    workers: int | None = 1,
    dry_run: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Write a Megatron checkpoint as a Hugging Face folder.

    It holds safetensors, config, tokenizer, and the modelling code of a hybrid. A dense model goes back to
    the family it came from, bit for bit. Tensors stream one by one. A linear transform that no format
    computes is left out, with a note in the report, as it adds no weights; spikes are not such.

    A call that was killed is gone on with by the next one with the same checkpoint and settings, to the same
    bytes.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one ``iter_*`` folder.
        output: folder to be made; it appears whole or not at all.
        dtype: number format of the weights; None keeps the stored one.
        max_shard_size: largest safetensors file, in bytes.
        overwrite: replace an earlier export in ``output``.
        allow_damaged_weights: export tensors that hold NaN or infinities, with a note.
        format_name: what ``--format`` calls the format; None takes the first that computes the same.
        float_weights: write the parameters of a model that multiplies by INT8 weights as they are, for one
            that does not.
        workers: processes that read and write, each as large as one parameter; None takes what the machine
            has and the model is worth. The result does not depend on it.
        dry_run: check everything but the values and report, with what it will take, without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another architecture, no Hugging Face
            format holds it, or the output cannot be written.
    """
    started = time.monotonic()
    folder = resolve_checkpoint(checkpoint)
    model = read_model(folder)
    check_model(model)
    whole = at_its_iteration(model, folder)
    model, notes_on_base = base_of(whole)
    if float_weights:
        model = with_plain_weights(model)
    hf_source = folder / HF_SOURCE_FOLDER
    source_config = load_config_json(hf_source) if (hf_source / CONFIG_FILE).is_file() else None
    hf_format = format_of_model(model, format_name, source_config)
    reader = MegatronCheckpointReader(folder, once=True)
    stored = check_tensors(reader, whole)

    def specs_of(piece: Piece) -> list[TensorSpec]:
        number_format = piece.dtype or dtype or stored[piece.parameter.name]
        return [TensorSpec(name, shape, number_format) for name, shape in piece.shapes.items()]

    pieces = sorted(export_pieces(model, hf_format), key=lambda piece: -specs_of(piece)[0].dtype.itemsize)
    specs = [spec for piece in pieces for spec in specs_of(piece)]
    config, code = hf_format.config(model, source_config, _dtype_name(specs)), hf_format.code_files(model)
    if code and (outside := from_outside(kinds_of(model))):
        with activity("trying the code of the export", shown=progress):  # transformers is imported for it
            check_code(code, config, specs, " and ".join(outside))
    report = ConversionReport(
        source=str(folder),
        output=str(output),
        architecture=hf_format.architecture,
        layers=describe_layers(model),
        dry_run=dry_run,
        bytes=sum(spec.nbytes for spec in specs),
    )
    report.notes += notes_on_base
    report.notes += [
        f"the model {kind.words}, for which the format has no setting; the export computes without them"
        for kind in hf_format.leaves_out(model)
    ]
    report.notes += [*hf_format.notes_on_export(model), *notes_on_schedules(model, folder)]
    for piece in pieces:
        report.count(piece.group, piece.origin, piece.numel)
    layout: Layout = SafetensorsFolder(specs, max_shard_size)
    header = None
    if hf_format.file_writer is not None:
        lay_out = object_at(f"{hf_format.file_writer}:layout")
        file, notes = lay_out(pieces, specs, hf_format, model, hf_source)
        layout, header = file, sha256(file.header).hexdigest()
        report.notes += notes
    parts = ExportParts(reader, pieces, layout, allow_damaged_weights=allow_damaged_weights)
    key = work_key(
        "export",
        source_files(reader.paths),
        model,
        hf_format.architecture,
        specs,
        max_shard_size,
        allow_damaged_weights,
        parts.sizes,
        code,
        *([] if header is None else [header]),
    )
    work = Work.plan(
        parts,
        output,
        key,
        source=folder,
        reads=reader.nbytes,
        marker=CONFIG_FILE,
        workers=workers,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    if work.is_over(report):
        return report

    account = parts.account()
    with work.begun() as workspace:
        new = workspace.new
        report.notes += _write_small_files(
            new, code, hf_source, config, source_config or {}, progress=progress
        )
        if not has_tokenizer(new):
            report.notes.append(
                f"{folder} carries no tokenizer; copy one into {output} before generating text"
            )
        layout.begin(new)
        records = work.write(workspace, new, "exporting")
        save_checksums(account.close(Use(**use) for record in records for use in record["uses"]), new)
        report.notes += describe_damage(damage_in(records))
        report.checked = account.describe()
        report.seconds = time.monotonic() - started
        report.save(new)
    return report


def _write_small_files(
    export: Path,
    code: Mapping[str, str],
    hf_source: Path,
    config: dict[str, Any],
    source_config: dict[str, Any],
    *,
    progress: bool,
) -> list[str]:
    """Write all of an export but its weights: config.json, the source's small files, its code.

    Returns:
        Notes for the report.
    """
    notes = []
    if hf_source.is_dir():
        companions = find_companion_files(hf_source)
        companions.copy_to(export)
        notes += companions.left_behind
        notes += left_out(CONFIG_FILE, references(source_config))
        notes += drop_tokenizer_code(export)
    (export / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, text in code.items():
        (export / name).write_text(text, encoding="utf-8")
    if code or config.get("model_type") != source_config.get("model_type"):
        with activity("comparing the tokenizers", shown=progress):  # transformers is imported for it
            notes += keep_tokenizer_class(hf_source, export)
    return notes


def _dtype_name(specs: list[TensorSpec]) -> str:
    """The dtype that most weights have, INT8 aside, as config.json spells it."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs:
        if not spec.dtype.is_floating_point:
            continue
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
