"""Adapters in peft's form: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read.

Tensors are called as peft calls them beside an export of the base:
``base_model.model.<linear>.lora_A.weight`` [rank, inputs] and ``lora_B.weight`` [outputs, rank]. They are
what the checkpoint holds, bit for bit: factors of q, k and v, and of gate and up projection, lie apart there,
too. Routed experts are one linear each, and rows of B are in the order of the weight's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.lora import LORA, check_places, targets_in
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.lora import LoraConfig, LoraTarget
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.errors import CheckpointError, first_line

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "trainable_token_indices": ([], None),
    "target_parameters": ([], None),
}
"""Settings of peft that change the function -> the values with which an adapter is one of ours."""


@dataclass(frozen=True)
class Factor:
    """A tensor of a peft folder and where it lies in a Megatron checkpoint."""

    peft: str
    """Its name there."""
    weight: Weight
    """The parameter here, under its whole name."""
    expert: int | None
    """Which of the routed experts that the parameter holds; None where it holds none."""
    parameter: Parameter
    """The same as conversions have it."""

    def exported(self, value: Tensor) -> Tensor:
        """The tensor of the folder, of the whole parameter here."""
        return (self.parameter.separate(value)[0] if self.expert is None else value[self.expert]).clone()


@dataclass(frozen=True)
class PeftAdapter:
    """What a peft folder holds."""

    rank: int
    alpha: float
    target_modules: list[LoraTarget]
    tensors: dict[str, Tensor]
    """By peft's names."""
    folder: Path
    base: str | None
    """What it calls its base."""


def factors(model: ModelConfig, name: str, source: dict[str, Any] | None = None) -> Iterator[Factor]:
    """Every tensor of an adapter.

    Args:
        model: the network with the adapter.
        name: of the adapter.
        source: config.json of what the model was imported from, whose family an export of the base has.
    """
    base, alone = replace(model, lora=LoraConfig()), replace(model, lora=model.lora.only([name]))
    hf_format = format_of_model(base, None, source)
    for number, layer in enumerate(layers(base)):
        for inside in layer.weights(base):
            beside = LORA.stored_beside(alone, inside)
            if not beside or inside.projection is None:
                continue
            weight = inside.below(f"decoder.layers.{number}.")
            names = dict(zip(weight.roles, hf_format.tensor_names(weight, number, base), strict=True))
            present = [
                names[role]
                for role, target in targets_in(inside.projection[0], inside.roles)
                if target in alone.lora.target_modules
            ]
            linears = [each.removesuffix(".weight") for each in present for _ in "AB"]
            for position, (linear, factor) in enumerate(zip(linears, beside, strict=True)):
                whole = factor.below(f"decoder.layers.{number}.")
                routed = weight.copies is not None and weight.copies.routed
                for expert in range(whole.shape[0]) if routed else (None,):
                    of_expert = linear if expert is None else linear.format(expert=expert)
                    letter = "AB"[position % 2]
                    yield Factor(
                        f"base_model.model.{of_expert}.lora_{letter}.weight",
                        whole,
                        expert,
                        Parameter(whole, number, model),
                    )


def write_peft_folder(
    folder: Path, model: ModelConfig, name: str, tensors: dict[str, Tensor], base: str | None
) -> None:
    """Write one adapter. ``base`` is what peft shall call the base: the folder of its export."""
    lora = model.lora
    write_peft_files(
        folder,
        tensors,
        rank=lora.rank(name),
        alpha=lora.alpha(name),
        targets=lora.target_modules,
        dropout=lora.dropout,
        base=base,
    )


def write_peft_files(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[LoraTarget],
    dropout: float = 0.0,
    base: str | None,
) -> None:
    """The two files of an adapter; ``tensors`` by peft's names."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": [target.value for target in targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / TENSORS)


def read_peft_folder(folder: Path) -> PeftAdapter:
    """An adapter as peft saved it.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter computes something that this model's
            adapters do not.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no folder of a peft adapter ({first_line(error)}); name one with "
            f"{CONFIG} and {TENSORS}"
        ) from None
    except Exception as error:  # safetensors has an error of its own
        raise CheckpointError(f"{folder / TENSORS} is damaged ({first_line(error)}); copy it again") from None
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} has peft_type {config.get('peft_type')!r}; LoRA adapters can be read, no others"
        )
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise CheckpointError(f"{path} sets {key} to {config[key]!r}, which adapters here do not compute")
    found = sorted({key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors})
    unknown = [each for each in found if each not in LoraTarget.__members__]
    if unknown or not found:
        known = ", ".join(LoraTarget.__members__)
        raise CheckpointError(
            f"{folder} adapts {', '.join(unknown) or 'nothing'}; adapters here stand beside {known}"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{path} has rank r={rank!r}; a rank is at least 1")
    targets = [target for target in LoraTarget if target.value in found]
    base = config.get("base_model_name_or_path")
    return PeftAdapter(rank, float(config.get("lora_alpha", rank)), targets, tensors, folder, base)


def stored_tensors(adapter: PeftAdapter, model: ModelConfig, name: str, source: Any) -> dict[str, Tensor]:
    """An adapter as parameters of ``model``, which lists it as ``name``.

    Raises:
        CheckpointError: it is an adapter of another model.
    """
    check_places(model)
    found: dict[str, Tensor] = {}
    left = set(adapter.tensors)
    for factor in factors(model, name, source):
        tensor = adapter.tensors.get(factor.peft)
        shape = factor.weight.shape if factor.expert is None else factor.weight.shape[1:]
        if tensor is None or tuple(tensor.shape) != shape:
            has = (
                "is missing" if tensor is None else f"has shape {list(tensor.shape)} instead of {list(shape)}"
            )
            raise CheckpointError(
                f"{adapter.folder} is an adapter of another model: {factor.peft} {has}; name "
                f"an adapter of this base"
            )
        left.discard(factor.peft)
        if factor.expert is None:
            found[factor.weight.name] = factor.parameter.join([tensor])
        else:
            whole = found.setdefault(factor.weight.name, torch.empty(factor.weight.shape, dtype=tensor.dtype))
            whole[factor.expert] = tensor
    if left:
        raise CheckpointError(
            f"{adapter.folder} is an adapter of another model: this base has no place for {min(left)}"
        )
    return found
