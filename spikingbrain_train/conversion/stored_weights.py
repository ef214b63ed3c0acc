"""The weights of a folder by name, Megatron or Hugging Face, for commands that hold folders side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.architecture.same_architecture import roles, settings_in_use
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import Role
from spikingbrain_train.config.shown import shown
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.registry import packed_format
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.conversion.packed_ternary import PackedReader
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_rounding, ternary_scales
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_BOOKKEEPING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map", "use_cache")
"""Keys of a config.json that say nothing of what the model computes."""


Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a part of a tensor."""


@dataclass(frozen=True)
class Stored:
    """What is known of a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredWeights(ABC):
    """The tensors of a folder; opening reads headers, :meth:`read` the values of one."""

    folder: Path
    kind: str
    """``Megatron`` or ``Hugging Face``."""
    tensors: dict[str, Stored]
    """In the order in which reading is cheapest."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One of them, on CPU.

        Raises:
            CheckpointError: its file is damaged.
        """

    def parts(self, name: str) -> list[Part]:
        """Offset and shape of the parts in which it is best read: experts one by one, all else whole."""
        shape = self.tensors[name].shape
        return [((0,) * len(shape), shape)]

    def read_part(self, name: str, part: Part) -> Tensor:
        """One of its :meth:`parts`, on CPU. Raises CheckpointError."""
        return self.read(name)

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What is said of the architecture beside the weights: name of a setting -> its value in words."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in self.tensors.values())


class MegatronWeights(StoredWeights):
    """Parameters of a Megatron checkpoint, without the padding of its vocabulary.

    Args:
        folder: of one checkpoint.
        with_training: with optimizer and other state of training.

    Raises:
        CheckpointError: it is incomplete, damaged, or not of the architecture that it says.
    """

    kind = "Megatron"

    def __init__(self, folder: Path, *, with_training: bool = False):
        self.folder = folder
        self.model = read_model(folder)
        self._reader = MegatronCheckpointReader(folder)
        dtypes = check_tensors(self._reader, self.model)
        self.parameters = list(model_parameters(self.model))
        self.tensors = {each.name: Stored(each.shape, dtypes[each.name]) for each in self.parameters}
        rows = {each.name: each.shape[0] for each in self.parameters if each.weight.pads_vocabulary}
        self._routed = {
            each.name for each in self.parameters if each.copies is not None and each.copies.routed
        }
        for name, entry in self._reader.tensors.items() if with_training else ():
            if name not in self.tensors:
                shape = tuple(entry.size)
                of = next((weight for weight in rows if name.endswith(f".{weight}")), None)
                if of is not None and shape and shape[0] >= rows[of]:
                    shape = (rows[of], *shape[1:])
                self.tensors[name] = Stored(shape, entry.properties.dtype)

    @property
    def has_training(self) -> bool:
        """Whether the checkpoint holds more than weights."""
        return len(self._reader.tensors) > len(self.parameters)

    def parts(self, name: str) -> list[Part]:
        shape = self.tensors[name].shape
        if name not in self._routed:
            return super().parts(name)
        return [((expert, 0, 0), (1, *shape[1:])) for expert in range(shape[0])]

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        return self._reader.read_region(name, (0,) * len(shape), shape)

    def read_part(self, name: str, part: Part) -> Tensor:
        return self._reader.read_region(name, *part)

    def settings(self) -> dict[str, str]:
        return deciding_settings(self.model)


class HfWeights(StoredWeights):
    """Tensors of a safetensors folder, whatever model it is of; packed ternary weights times their scale.

    Attributes:
        is_packed: whether it has such.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """

    kind = "Hugging Face"

    def __init__(self, folder: Path):
        self.folder = folder
        packed = packed_format(load_config_json(folder))
        self.is_packed = packed is not None
        self._reader = SafetensorsReader(folder) if packed is None else PackedReader(folder, packed)
        self.tensors = {name: Stored(spec.shape, spec.dtype) for name, spec in self._reader.specs.items()}

    def read(self, name: str) -> Tensor:
        return self._reader.read(name)

    def settings(self) -> dict[str, str]:
        config = load_config_json(self.folder)
        return {key: shown(value) for key, value in config.items() if key not in _BOOKKEEPING}


class AsHuggingFace(StoredWeights):
    """A Megatron checkpoint under the names of a Hugging Face format, as far as that has names for it.

    What the format packs as ternary numbers is these, times their scale.

    Args:
        megatron: the checkpoint.
        hf_format: whose names; a parameter that it has none for keeps its own.
    """

    kind = "Megatron"

    def __init__(self, megatron: MegatronWeights, hf_format: HfFormat):
        self.folder = megatron.folder
        self._megatron = megatron
        self._of: dict[str, tuple[Parameter, int]] = {}
        self._packed: set[str] = set()
        self._split: tuple[str, list[Tensor]] | None = None
        self.tensors = {}
        for parameter in megatron.parameters:
            dtype = megatron.tensors[parameter.name].dtype
            try:
                tensors = parameter.tensors(hf_format)
            except CheckpointError:  # it has no place in the format
                self.tensors[parameter.name] = Stored(parameter.shape, dtype)
                continue
            is_packed = hf_format.packs_ternary(parameter.weight, megatron.model)
            for position, (name, shape) in enumerate(tensors.items()):
                self.tensors[name] = Stored(shape, torch.float32 if is_packed else dtype)
                if is_packed:
                    self._packed.add(name)
                self._of[name] = (parameter, position)

    def read(self, name: str) -> Tensor:
        if name not in self._of:
            return self._megatron.read(name)
        parameter, position = self._of[name]
        if self._split is None or self._split[0] != parameter.name:
            self._split = None
            self._split = (parameter.name, parameter.separate(self._megatron.read(parameter.name)))
        part = self._split[1][position]
        if name not in self._packed:
            return part
        wide = part.float()
        return ternary_rounding(wide, ternary_scales(magnitude_sum(part), part.numel(), wide.dtype))

    def settings(self) -> dict[str, str]:
        return self._megatron.settings()


class HfOfFormat(HfWeights):
    """A folder of a format that this project reads, without the tensors that only repeat others."""

    def __init__(self, folder: Path, hf_format: HfFormat, model: ModelConfig):
        super().__init__(folder)
        self._model = model
        repeated = {extra.name for extra in hf_format.completions(model)}
        if model.share_embeddings_and_output_weights:
            repeated.add(hf_format.names["output"])
        for name in repeated:
            self.tensors.pop(name, None)

    def settings(self) -> dict[str, str]:
        return deciding_settings(self._model)


def open_weights(path: Path, setting: str, *, with_training: bool = False) -> StoredWeights:
    """The weights of a folder of either form.

    Args:
        path: Hugging Face folder, run folder (its newest checkpoint is taken), or one ``iter_*`` folder.
        setting: what named it, for sentences.
        with_training: of a Megatron checkpoint, optimizer and other state of training too.

    Raises:
        CheckpointError: there is neither, or it is incomplete or damaged.
    """
    if (path / CONFIG_FILE).is_file():
        return HfWeights(path)
    return MegatronWeights(resolve_checkpoint(path, setting), with_training=with_training)


def side_by_side(weights: Sequence[StoredWeights]) -> list[StoredWeights]:
    """Folders of both forms under the names of the Hugging Face one; folders of one form as they are.

    Raises:
        CheckpointError: the Hugging Face folder is of no format that this project maps.
    """
    hf = next((each for each in weights if isinstance(each, HfWeights)), None)
    if hf is None or all(isinstance(each, HfWeights) for each in weights):
        return list(weights)
    hf_format, model = read_hf_config(hf.folder)
    return [
        AsHuggingFace(each, hf_format)
        if isinstance(each, MegatronWeights)
        else HfOfFormat(each.folder, hf_format, model)
        for each in weights
    ]


def deciding_settings(model: ModelConfig) -> dict[str, str]:
    """What decides its weights and what it computes; how it began and how it is trained is left out."""
    known = roles()
    counts = (Role.weights, Role.function, None)
    return {n: shown(value) for n, value in settings_in_use(model).items() if known.get(n) in counts}
