"""Adapters onto a checkpoint, into its weights, and out of it as folders of peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spikingbrain_train.architecture.lora import ROLES, check_merge
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.bricks.peft_folder import (
    CONFIG,
    factors,
    read_peft_folder,
    stored_tensors,
    write_peft_folder,
)
from spikingbrain_train.bricks.written_checkpoint import write_checkpoint
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.lora import LoraConfig, LoraTarget
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json


def attach(
    checkpoint: Path,
    adapters: Sequence[Path],
    names: Sequence[str],
    output: Path,
    *,
    overwrite: bool = False,
) -> ModelConfig:
    """Write a checkpoint of weights alone, at iteration 0, that has adapters of peft folders beside its own.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one ``iter_*`` folder.
        adapters: folders of peft, of the same target modules.
        names: what each is called in ``model.lora.names``.
        output: folder to be made; it appears whole or not at all.
        overwrite: replace an earlier result.

    Returns:
        The network with its adapters.

    Raises:
        CheckpointError: an adapter is of another model, or a folder cannot be read.
        ConfigurationError: names do not fit, or the model has one of them already.
    """
    folder = resolve_checkpoint(checkpoint)
    stored = read_model(folder)
    if len(names) != len(adapters):
        raise ConfigurationError(
            f"--names has {len(names)} names for {len(adapters)} adapters; give one for each of --adapters"
        )
    read = [read_peft_folder(each) for each in adapters]
    before = stored.lora
    targets = before.target_modules if before.names else read[0].target_modules
    for each in read:
        if set(each.target_modules) != set(targets):
            raise CheckpointError(
                f"{each.folder} adapts {_words(each.target_modules)}, the others adapt {_words(targets)}; "
                f"adapters of one model have the same target modules"
            )
    lora = LoraConfig(
        names=[*before.names, *names],
        ranks=[*map(before.rank, before.names), *(each.rank for each in read)],
        alphas=[*map(before.alpha, before.names), *(each.alpha for each in read)],
        weights=[*map(before.weight, before.names), *(1.0 for _ in read)],
        target_modules=list(targets),
        dropout=before.dropout,
    )
    model = replace(stored, lora=lora)
    check_model(model)
    source = _source(folder)
    new: dict[str, Tensor] = {}
    for each, name in zip(read, names, strict=True):
        new |= stored_tensors(each, model, name, source)
    reader = MegatronCheckpointReader(folder)
    check_tensors(reader, stored)

    def value(parameter: Parameter) -> Tensor:
        return new[parameter.name] if parameter.name in new else reader.read(parameter.name)

    write_checkpoint(output, folder, model, value, reader.nbytes, overwrite=overwrite)
    return model


def merge(
    checkpoint: Path, output: Path, names: Sequence[str] = (), *, overwrite: bool = False
) -> ModelConfig:
    """Write a checkpoint of weights alone, at iteration 0, in whose matrices adapters are added up.

    ``W + sum of weight * alpha / rank * B A``, in float32, in the number format of W.

    Args:
        checkpoint: as of :func:`attach`.
        output: folder to be made.
        names: of the adapters; empty merges all of them. The others stay beside the weights.
        overwrite: replace an earlier result.

    Returns:
        The network as it is then.

    Raises:
        ConfigurationError: the checkpoint has no such adapter, or its projections are rounded, so that the
            result would compute something else.
        CheckpointError: it cannot be read.
    """
    folder = resolve_checkpoint(checkpoint)
    stored = read_model(folder)
    lora = stored.lora
    merged = [*names] or lora.names
    unknown = [name for name in merged if name not in lora.names] or ([] if merged else ["(all)"])
    if unknown:
        has = ", ".join(lora.names) or "none"
        raise ConfigurationError(f"--names {unknown[0]} is no adapter of {checkpoint}, which has {has}")
    check_merge(stored)
    model = replace(stored, lora=lora.only([name for name in lora.names if name not in merged]))
    reader = MegatronCheckpointReader(folder)
    check_tensors(reader, stored)

    def value(parameter: Parameter) -> Tensor:
        weight = reader.read(parameter.name)
        places = {ROLES[role]: place for place, role in enumerate(parameter.roles) if role in ROLES}
        prefix = f"{parameter.name.removesuffix('weight')}lora."
        present = [
            (place, name, f"{prefix}{target.value}.{name}")
            for target, place in places.items()
            for name in merged
            if f"{prefix}{target.value}.{name}_A" in reader.tensors
        ]
        if not present:
            return weight
        parts = parameter.separate(weight.float())
        for place, name, factor in present:
            a, b = (reader.read(f"{factor}_{letter}").float() for letter in "AB")
            added = lora.scaling(name) * (b @ a)
            if len(parameter.roles) == 1 and not parameter.is_routed:  # rows in the order of the weight's
                (added,) = parameter.separate(added)
            for expert, of_expert in enumerate(added if parameter.is_routed else [added]):
                position = expert * len(parameter.roles) + place
                parts[position] = parts[position] + of_expert
        return parameter.join(parts).to(weight.dtype)

    write_checkpoint(output, folder, model, value, reader.nbytes, overwrite=overwrite)
    return model


def detach(
    checkpoint: Path, name: str, output: Path, *, base: str | None = None, overwrite: bool = False
) -> None:
    """Write an adapter of a checkpoint as a folder of peft.

    Args:
        checkpoint: as of :func:`attach`.
        name: of the adapter.
        output: folder to be made.
        base: folder of the base's export, which peft loads by itself; None leaves it open.
        overwrite: replace an earlier result.

    Raises:
        ConfigurationError: the checkpoint has no such adapter.
        CheckpointError: it cannot be read.
    """
    folder = resolve_checkpoint(checkpoint)
    model = read_model(folder)
    if name not in model.lora.names:
        has = ", ".join(model.lora.names) or "none"
        raise ConfigurationError(f"--name {name} is no adapter of {checkpoint}, which has {has}")
    reader = MegatronCheckpointReader(folder, once=False)
    tensors = {}
    for factor in factors(model, name, _source(folder)):
        tensors[factor.peft] = factor.exported(reader.read(factor.weight.name))
    check_output_folder(
        output, source=folder, overwrite=overwrite, marker=CONFIG, needed_bytes=0, dry_run=False
    )
    with complete_folder(output, progress=False) as temporary:
        write_peft_folder(temporary, model, name, tensors, base)


def _source(folder: Path) -> dict[str, Any] | None:
    path = folder / HF_SOURCE_FOLDER
    return load_config_json(path) if (path / CONFIG_FILE).is_file() else None


def _words(targets: Sequence[LoraTarget]) -> str:
    return ", ".join(target.value for target in targets)
