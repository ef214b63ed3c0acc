"""Whether the layout of a parameter gives back what it was made of."""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.checkpoint.saved_tensor import bytes_of
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.safetensors_io import same_bytes
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.models.fused_tensors import transform_of


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; a NaN is the same as itself."""
    return tensor.shape == other.shape and same_bytes(bytes_of(tensor), bytes_of(other))


def check_fused(parameter: Parameter, parts: list[Tensor], fused: Tensor) -> None:
    """Undo what made a parameter of a dense source's tensors, and compare.

    Raises:
        CheckpointError: a tensor does not come back as it was.
    """
    if [tuple(part.shape) for part in parts] != parameter.hf_shapes:
        return  # heads were copied
    separate = transform_of(parameter.weight).split(fused, parameter.hf_shapes, parameter.model)
    for role, part, back in zip(parameter.roles, parts, separate, strict=True):
        _refuse(is_same(part, back), parameter, role)


def check_joined(parameter: Parameter, tensors: dict[str, Tensor], joined: Tensor) -> None:
    """The same for what is stored as it is: an expert, a branch, a whole parameter.

    Raises:
        CheckpointError: a tensor does not come back as it was.
    """
    for name, back in zip(tensors, parameter.separate(joined), strict=True):
        _refuse(is_same(tensors[name], back), parameter, name)


def check_split(parameter: Parameter, fused: Tensor, parts: list[Tensor]) -> None:
    """Undo what made Hugging Face tensors of a parameter, and compare.

    Raises:
        CheckpointError: the parameter does not come back as it was.
    """
    if len(parts) > 1:
        _refuse(is_same(fused, parameter.join(parts)), parameter, "the whole")


def _refuse(same: bool, parameter: Parameter, what: str) -> None:
    if not same:
        raise CheckpointError(
            f"the layout {parameter.weight.layout} of {parameter.name} does not give {what} back as it was; "
            "correct the split or the fuse of its Transform"
        )
