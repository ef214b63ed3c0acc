"""What a choice of layers is made of, decided and checked without torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikingbrain_train.architecture.layers import source_names
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.sections import with_layers
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.layer_choice.measurements import MEASUREMENTS_FILE
from spikingbrain_train.layer_choice.selection import Pair, keeps_weights
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

RECIPE_FILE, RESULT_FILE, PICTURE_FILE = "conversion.yaml", "layers.json", "layers.png"
_WORK = "work"
_SOURCE, _TEACHER, _CANDIDATES = "source", "teacher", "candidates"


@dataclass(frozen=True)
class ChoiceRequest:
    """One choice, as the command line asks for it."""

    model: Path
    """The dense source: a Hugging Face folder or a Megatron checkpoint."""
    is_checkpoint: bool
    aligned: Path | None
    """A checkpoint in which every candidate is swapped and aligned; None sets them in closed form."""
    recipe: ConversionConfig
    """The layers besides ``mixers``."""
    pair: Pair
    num_layers: int
    candidates: list[int]
    number: int
    greedy: bool
    data: list[str]
    calibration_data: list[str]
    tokens: int
    calibration_tokens: int
    seq_length: int
    micro_batch_size: int
    parallel: list[str]
    device: str
    dtype: str
    output: Path

    def settings(self) -> dict[str, Any]:
        """What every measurement depends on."""
        fitted = {} if self.aligned else self._fit()
        return {
            "model": str(self.model.resolve()),
            "aligned": None if self.aligned is None else str(resolve_checkpoint(self.aligned, "--aligned")),
            "swapped mixer": self.pair.swapped,
            "kept mixer": self.pair.kept,
            "conversion": OmegaConf.to_yaml(OmegaConf.structured(self.measured_recipe([self.pair.swapped]))),
            "data": self.data,
            "tokens": self.tokens,
            "seq_length": self.seq_length,
            "dtype": self.dtype,
            **fitted,
        }

    def _fit(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "calibration_data": self.calibration_data,
            "calibration_tokens": self.calibration_tokens,
        }
        measured = {Path(prefix).resolve() for prefix in self.data}
        fitted = {Path(prefix).resolve() for prefix in self.calibration_data}
        if measured & fitted:  # earlier releases set the mixers on what they measured on
            found["mixers set on"] = "windows behind those that are measured on"
        return found

    def measured_recipe(self, mixers: Sequence[Any]) -> ConversionConfig:
        """The recipe as it is measured: the feed-forwards as the source has them."""
        _, feed_forward = source_names()
        return replace(self.recipe, mixers=list(mixers), feed_forwards=[feed_forward])

    def write_recipe(self, swapped: Sequence[int]) -> Path:
        """The conversion with the chosen layers, as ``spikingbrain-convert import --conversion`` takes it."""
        path = self.output / RECIPE_FILE
        save_config(replace(self.recipe, mixers=self.pair.mixers(self.num_layers, swapped)), path)
        return path

    @property
    def source(self) -> Path:
        """Megatron checkpoint of the dense source; :func:`convert` makes it where there is none."""
        return self.model if self.is_checkpoint else self.output / _WORK / _TEACHER

    @property
    def swapped(self) -> Path:
        """Megatron checkpoint in which every candidate is swapped; likewise."""
        return self.aligned or self.output / _WORK / _CANDIDATES

    @property
    def has_checkpoints(self) -> bool:
        """Whether nothing is left to convert."""
        made = [path for path in (self.source, self.swapped) if path.is_relative_to(self.output / _WORK)]
        return all((path / LATEST_ITERATION_FILE).is_file() for path in made)

    def begin_anew(self) -> None:
        """Remove what an earlier choice left in the output folder."""
        self.remove_work()
        for name in (MEASUREMENTS_FILE, RECIPE_FILE, RESULT_FILE, PICTURE_FILE):
            (self.output / name).unlink(missing_ok=True)

    def remove_work(self) -> None:
        """Remove the conversions that were made to measure."""
        shutil.rmtree(self.output / _WORK, ignore_errors=True)


def convert(request: ChoiceRequest) -> None:
    """Make the Megatron checkpoints that the user did not bring; what lies there already is taken."""
    if request.has_checkpoints:
        return
    from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
    from spikingbrain_train.conversion.import_checkpoint import import_checkpoint

    folder = request.model
    if request.is_checkpoint:  # conversions read Hugging Face folders: a dense model is one, bit for bit
        folder = request.output / _WORK / _SOURCE
        export_checkpoint(request.model, folder, overwrite=True, progress=True)
    for path, recipe in (
        (request.source, None),
        (request.swapped, request.measured_recipe([request.pair.swapped])),
    ):
        if path.is_relative_to(request.output / _WORK) and not (path / LATEST_ITERATION_FILE).is_file():
            import_checkpoint(folder, path, recipe, overwrite=True, progress=True)


def check_source(model: ModelConfig, folder: Path) -> None:
    """All layers of the source have softmax attention, windows or not. Raises ConfigurationError."""
    if not all(keeps_weights(list(branches)) for branches in model.layer_mixers()):
        raise ConfigurationError(
            f"--model {folder} is a hybrid already; name the dense source, and a form of it that was aligned "
            "with --aligned"
        )


def check_recipe(source: ModelConfig, recipe: ConversionConfig) -> None:
    """The layers of a recipe fit the source. Raises ConfigurationError."""
    check_model(with_layers(source, recipe))


def aligned_recipe(folder: Path, source: ModelConfig) -> tuple[ConversionConfig, list[int]]:
    """The recipe of an aligned checkpoint, and its swapped layers.

    Args:
        folder: of --aligned.
        source: the dense source.

    Raises:
        ConfigurationError: it is of another source, swaps nothing, or swaps layers in different ways.
    """
    model = read_stored_model(resolve_checkpoint(folder, "--aligned"))
    if (model.num_layers, model.hidden_size, model.vocab_size) != (
        source.num_layers,
        source.hidden_size,
        source.vocab_size,
    ):
        raise ConfigurationError(
            f"--aligned {folder} has {model.num_layers} layers of width {model.hidden_size} and --model "
            f"{source.num_layers} of width {source.hidden_size}; name a form of the same source"
        )
    if model.layer_feed_forwards() != source.layer_feed_forwards():
        raise ConfigurationError(
            f"--aligned {folder} has other feed-forwards than the source, which would be measured with every "
            "swap; align a conversion of its mixers alone"
        )
    entries = [list(branches) if len(branches) > 1 else branches[0] for branches in model.layer_mixers()]
    swapped = [layer for layer, entry in enumerate(entries) if not keeps_weights(entry)]
    kinds = [entries[layer] for layer in swapped]
    if not swapped or any(kind != kinds[0] for kind in kinds):
        raise ConfigurationError(
            f"--aligned {folder} does not swap every candidate for the same mixer; convert the source with "
            "mixers=[...] of one entry, and align that"
        )
    fields = OmegaConf.structured(ConversionConfig)
    values = {name: getattr(model, name) for name in fields if hasattr(model, name)}
    if model.activation_func is not ActivationFunc.fatrelu:
        values["fatrelu_threshold"] = None  # a recipe says it of that function alone
    return replace(ConversionConfig(), **{**values, "mixers": [kinds[0]]}), swapped
