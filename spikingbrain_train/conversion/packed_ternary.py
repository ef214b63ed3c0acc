"""Folders of packed ternary weights, read as what these stand for or as parameters whose rounding they are.

``<linear>.weight`` [out / 4, in] uint8 holds four ternary numbers a byte (:func:`~.pack_ternary`), and
``<linear>.weight_scale`` [1] their scale or its reciprocal. What reads a folder sees ``<linear>.weight``
[out, in] of floats alone: the numbers times their scale (:class:`PackedReader`), or, where parameters are
made of them, what the linear transform ``ternary`` rounds to just those numbers and that scale.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.mapping import model_parameters
from spikingbrain_train.conversion.safetensors_io import DTYPES, SafetensorsReader, TensorSpec
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.ternary import (
    magnitude_sum,
    ternary_codes,
    ternary_parameters,
    ternary_scales,
    unpack_ternary,
)


def open_tensors(folder: Path, hf_format: HfFormat, model: ModelConfig) -> SafetensorsReader:
    """The tensors of a folder of a known format as parameters are made of them. Raises CheckpointError.

    Args:
        folder: Hugging Face folder.
        hf_format: its format.
        model: what its config.json describes.
    """
    if not hf_format.unpacks_ternary:
        return SafetensorsReader(folder)
    return PackedTernaryReader(folder, hf_format, model)


class PackedReader(SafetensorsReader):
    """The tensors of a folder whose linears, or some of them, are packed; each number times its scale.

    Attributes:
        dtype: of unpacked weights.

    Args:
        folder: Hugging Face folder.
        hf_format: its format.

    Raises:
        CheckpointError: as its base; or a linear has no scale.
    """

    dtypes = DTYPES | {"U8": torch.uint8}

    def __init__(self, folder: Path, hf_format: HfFormat):
        super().__init__(folder)
        self._divides = hf_format.divides_by_ternary_scales
        self._stored_nbytes = super().nbytes
        self._scales: dict[str, str] = {}
        """Name of a packed weight -> that of its scale."""
        for name, spec in self.specs.items():
            if spec.dtype is torch.uint8:
                (self._scales[name],) = hf_format.scale_names([name])
        for name, scale in self._scales.items():
            if scale not in self.specs or self.specs[scale].shape not in ((), (1,)):
                raise CheckpointError(
                    f"{self.file_of(name)}: {name} is packed, but there is no {scale} of one number beside "
                    f"it; copy the folder again from its source"
                )
        scales = set(self._scales.values())
        others = [spec.dtype for n, spec in self.specs.items() if n not in self._scales and n not in scales]
        self.dtype = self._dtype_beside(others)
        for name, scale in self._scales.items():
            rows, *inputs = self.specs[name].shape
            self.specs[name] = TensorSpec(name, (4 * rows, *inputs), self.dtype)
            del self.specs[scale]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self._stored_nbytes

    def blocks(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """As its base; an unpacked weight is one block."""
        if name in self._scales:
            yield self.read(name, rows)
        else:
            yield from super().blocks(name, rows)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As its base; of an unpacked weight all is made, whatever rows are asked for.

        Raises:
            CheckpointError: it cannot be read, or is not what it is to be made of.
        """
        if name not in self._scales:
            return super().read(name, rows)
        codes = unpack_ternary(super().read(name))
        if codes.amax() > 1:
            raise CheckpointError(
                f"{self.file_of(name)}: {name} holds other numbers than -1, 0 and 1, four in a byte; copy "
                f"the file again from its source"
            )
        stored = super().read(self._scales[name]).float().reshape(())
        scale = _scale_behind(stored) if self._divides else stored
        if not torch.isfinite(scale) or scale < ternary_scales(torch.zeros(()), 1, torch.float32):
            raise CheckpointError(
                f"{self.file_of(name)}: {self._scales[name]} is {stored.item():g}, but ternary weights here "
                f"have a scale of at least 1e-5; import the unquantised checkpoint"
            )
        weight = self._made(name, codes, scale)
        return weight if rows is None else weight[rows[0] : rows[1]]

    def _dtype_beside(self, others: list[torch.dtype]) -> torch.dtype:
        """Of unpacked weights, given those of all other tensors."""
        return torch.float32

    def _made(self, name: str, codes: Tensor, scale: Tensor) -> Tensor:
        """[O, I] of the numbers [O, I] int8 and their scale [] float32."""
        return codes * scale


def _scale_behind(stored: Tensor) -> Tensor:
    """The scale [] whose reciprocal, rounded to float32, is stored; the nearest one where none is."""
    nearest = stored.reciprocal()
    neighbours = [torch.nextafter(nearest, nearest.new_tensor(end)) for end in (0.0, torch.inf)]
    return next((each for each in (nearest, *neighbours) if each.reciprocal() == stored), nearest)


class PackedTernaryReader(PackedReader):
    """The same as parameters, whose rounding the numbers are; in what holds all tensors that are not packed.

    Args:
        folder: Hugging Face folder.
        hf_format: its format.
        model: what its config.json describes.

    Raises:
        CheckpointError: as its base; or a linear is not packed.
    """

    def __init__(self, folder: Path, hf_format: HfFormat, model: ModelConfig):
        super().__init__(folder, hf_format)
        for parameter in model_parameters(model):
            if not hf_format.packs_ternary(parameter.weight, model):
                continue
            for name in parameter.tensors(hf_format):
                if name in self.specs and name not in self._scales:
                    raise CheckpointError(
                        f"{self.file_of(name)}: {name} is not packed, although config.json says that it is; "
                        f"take both from the same model"
                    )

    def _dtype_beside(self, others: list[torch.dtype]) -> torch.dtype:
        return functools.reduce(torch.promote_types, others or [torch.float32])

    def _made(self, name: str, codes: Tensor, scale: Tensor) -> Tensor:
        weight = ternary_parameters(codes, scale.item(), self.dtype)
        again = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
        has_numbers = bool(codes.any())  # a matrix of zeros is 0 at any scale, and refused elsewhere
        if has_numbers and not (again == scale and torch.equal(ternary_codes(weight, again), codes.float())):
            raise CheckpointError(
                f"{self.file_of(name)}: no parameters of {str(self.dtype).removeprefix('torch.')} are "
                f"rounded to {name} times its scale exactly; save the folder's embedding and norms in float32"
            )
        return weight
