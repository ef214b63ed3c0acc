"""What a Hugging Face format is: which models it holds, its config.json both ways, names of its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import feed_forwards_of, layers, mixers_of
from spikingbrain_train.architecture.linear_transforms import LinearTransformKind, transforms_of
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.architecture.weights import Shape, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.window_convention import WINDOW_KEY, WindowConvention
from spikingbrain_train.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class Completion:
    """A tensor of an export that holds nothing of its own: it repeats a parameter."""

    name: str
    shape: Shape
    layer: int | None
    """0-based; None around the layers."""
    beside: Weight
    """The parameter, under its whole name, whose number format it has and, unless it is :class:`Zeros`, whose
    values."""
    group: str
    """Heading under which the report counts it."""
    origin: str
    """Where it comes from, in the report's words."""


@dataclass(frozen=True)
class Zeros(Completion):
    """A tensor of zeros, for classes that draw it at random where it is missing."""

    what: str
    """What such tensors are, in the plural: ``q/k/v biases``."""
    setting: str
    """Key of config.json that is false because the model does not have them."""


class HfFormat(ABC):
    """One architecture of transformers, or of modelling code that exports carry."""

    architecture: str
    """Class name, as in ``architectures`` of config.json."""
    model_type: str
    """``model_type`` of config.json."""
    name: str = ""
    """What ``--format`` calls it; empty is its model type."""
    kinds: str
    """By what name kinds of mixers and feed-forwards say in ``hf_layers`` what they are in it."""
    holds: str
    """What it holds, for sentences: ``dense models``."""
    is_for_inference: bool = False
    """Whether it does not hold the parameters themselves: it is written where somebody asks for it alone."""
    divides_by_ternary_scales: bool = True
    """Whether the scale stored beside packed ternary weights is the reciprocal of what they are times."""
    unpacks_ternary: bool = False
    """Whether packed ternary weights become parameters where it is read: conversion/packed_ternary.py."""
    keeps_weights_beside_scales: bool = False
    """Whether INT8 weights stand beside their scales as the floats that they are made of."""
    file_writer: str | None = None
    """Module that writes it where it is no folder of safetensors: ``pieces`` say what a parameter is stored
    as, its ``layout`` where that lies."""
    names: Mapping[str, str]
    """Role of a tensor -> its name, with ``{layer}`` where there is one in every layer."""

    @abstractmethod
    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        """The architecture that a config.json describes.

        Args:
            keys: the file.
            window_convention: how to read a window that the file leaves in doubt.

        Raises:
            CheckpointError: it is malformed, or describes something that this model does not compute.
        """

    def reads(self, values: dict[str, Any]) -> bool:
        """Whether it is what a config.json of its architecture is read as; the first that says so is."""
        return not self.is_for_inference

    def is_packed(self, values: dict[str, Any]) -> bool:
        """Whether a config.json says that weights of its folder are packed as this format packs them."""
        return False

    @abstractmethod
    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        """config.json of an export.

        Args:
            model: the architecture, one that the format holds.
            source: config.json of the checkpoint that the model was imported from.
            dtype: name of the exported number format, such as ``"bfloat16"``.
        """

    def unsupported(self, model: ModelConfig) -> list[str]:
        """What of ``model`` the format cannot hold, in words; empty if there is a place for every weight.

        What is done to projections (spikes) does not count, as it adds no weights; see :meth:`leaves_out`.
        """
        several = dict.fromkeys(layer.mixer_name for layer in layers(model) if len(layer.mixers) > 1)
        single = dict.fromkeys(layer.mixers[0] for layer in layers(model) if len(layer.mixers) == 1)
        number = "two" if all(len(layer.mixers) <= 2 for layer in layers(model)) else "several"
        parts = [f"layers with {number} branches ({', '.join(several)})"] if several else []
        kinds: list[SubmoduleKind] = [*single, *feed_forwards_of(model)]
        parts += [kind.words for kind in kinds if self.kinds not in kind.hf_layers]
        if model.num_sink_tokens:
            parts.append(f"{model.num_sink_tokens} sink tokens")
        return parts

    def leaves_out(self, model: ModelConfig) -> list[LinearTransformKind]:
        """What is done to projections of ``model`` that the format's modelling code does not do."""
        return [kind for kind in transforms_of(model) if self.kinds not in kind.hf_formats]

    def tensor_names(self, weight: Weight, layer: int | None, model: ModelConfig) -> list[str]:
        """Names of the tensors that a parameter is made of, in the order of its roles.

        Those of routed experts have ``{expert}`` in the place of the expert's number.

        Args:
            weight: the parameter, under its whole name.
            layer: 0-based; None around the layers.
            model: whose parameter it is.

        Raises:
            CheckpointError: the format has no place for it.
        """
        if weight.copies is not None or any(role not in self.names for role in weight.roles):
            raise CheckpointError(f"{weight.name} has no counterpart in the requested Hugging Face format")
        return [self.names[role].format(layer=layer) for role in weight.roles]

    def num_unknown_kinds(self, model: ModelConfig) -> int:
        """How many kinds of mixers and feed-forwards of ``model`` the format does not have: its distance."""
        kinds: list[SubmoduleKind] = [*mixers_of(model), *feed_forwards_of(model)]
        return sum(self.kinds not in kind.hf_layers for kind in kinds)

    def int8_group(self, weight: Weight, model: ModelConfig) -> int | None:
        """How many neighbours of a weight share a scale where it is stored as INT8; None where it is not."""
        return None

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        """Whether a weight is stored as ternary numbers, four in a byte, and their scale."""
        return False

    def scale_names(self, names: list[str]) -> list[str]:
        """What it calls the scales of tensors of INT8 or ternary weights, ``<linear>.weight``."""
        return [f"{name}_scale" for name in names]

    def completions(self, model: ModelConfig) -> Iterator[Completion]:
        """Tensors that readers of the format want beside those of ``model``."""
        return iter(())

    def code_files(self, model: ModelConfig) -> dict[str, str]:
        """Modelling code that an export of ``model`` carries: texts of its files by their names.

        Raises:
            ConfigurationError: a kind's own file cannot be carried.
        """
        return {}

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        """What whoever loads an export should know, as sentences."""
        return []

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        """How what config.json leaves in doubt was read, as sentences.

        Args:
            folder: where it lies, for messages.
            config: the file.
            model: what was read from it.
            chosen: the window convention that somebody chose.

        Raises:
            ConfigurationError: the file leaves nothing for ``chosen`` to say.
        """
        if chosen is not None:
            raise ConfigurationError(
                f"--window-convention {chosen.value} has nothing to say about {folder}, which is no "
                f"published SpikingBrain-7B folder with windows, or names them in {WINDOW_KEY}; leave the "
                f"option out"
            )
        return []

    def mixer_of(self, layer_type: str) -> str:
        """The mixer that the format calls ``layer_type``."""
        return self._name_of(layer_type, MIXERS)

    def feed_forward_of(self, layer_type: str) -> str:
        """The feed-forward that the format calls ``layer_type``."""
        return self._name_of(layer_type, FEED_FORWARDS)

    def _name_of(self, layer_type: str, known: Iterable[SubmoduleKind]) -> str:
        for kind in known:
            if kind.hf_layers.get(self.kinds) == layer_type:
                return kind.name
        raise ConfigurationError(
            f"{self.architecture} has layers of {layer_type}, but no kind's hf_layers says that it is "
            f"{layer_type} in {self.kinds}; name the package of one with --plugins package.module"
        )

    def layer_types(self, model: ModelConfig) -> list[str]:
        """What the format calls the mixer of every layer of a model that it holds."""
        return [layer.mixers[0].hf_layers[self.kinds] for layer in layers(model)]
