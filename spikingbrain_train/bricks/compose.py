"""Several adapters as one: the weighted sum of what they add.

A sum of products ``s_i B_i A_i`` is one product of the A_i below each other and the scaled B_i side by side:
exact, at the sum of the ranks. To a smaller rank it is cut by a singular value decomposition, which gives the
nearest of that rank (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.bricks.peft_folder import (
    CONFIG,
    PeftAdapter,
    read_peft_folder,
    write_peft_files,
)
from spikingbrain_train.config.lora import LoraTarget
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.errors import CheckpointError, ConfigurationError


def compose(
    folders: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> tuple[int, float]:
    """Write the weighted sum of adapters as one folder of peft.

    Args:
        folders: of peft, all beside one base. Where one of them leaves a linear alone it adds nothing there.
        weights: of each.
        output: folder to be made.
        rank: of the result; None keeps the sum exact, at the sum of the ranks.
        overwrite: replace an earlier result.

    Returns:
        Rank of the result, and the norm of what was cut off relative to that of all added matrices together.

    Raises:
        ConfigurationError: as many weights as adapters were not given, or a rank above the exact one.
        CheckpointError: a folder cannot be read, or adapters are of different models.
    """
    if len(weights) != len(folders):
        raise ConfigurationError(f"--weights has {len(weights)} numbers for {len(folders)} adapters")
    adapters = [read_peft_folder(folder) for folder in folders]
    exact = sum(adapter.rank for adapter in adapters)
    if rank is not None and not 1 <= rank <= exact:
        raise ConfigurationError(
            f"--rank {rank} must be from 1 to {exact}, the ranks of the adapters together, where the sum is "
            f"exact"
        )
    check_output_folder(
        output,
        source=folders[0],
        overwrite=overwrite,
        marker=CONFIG,
        needed_bytes=sum(tensor.nbytes for adapter in adapters for tensor in adapter.tensors.values()),
    )
    linears = sorted({key.split(".lora_")[0] for adapter in adapters for key in adapter.tensors})
    tensors: dict[str, Tensor] = {}
    cut, whole = 0.0, 0.0
    for linear in linears:
        a, b = _sum(adapters, weights, linear)
        if rank is not None:
            a, b, squares = nearest(a, b, rank)
            cut, whole = cut + float(squares[rank:].sum()), whole + float(squares.sum())
        dtype = next(iter(adapters[0].tensors.values())).dtype
        tensors[f"{linear}.lora_A.weight"], tensors[f"{linear}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    targets = {target for adapter in adapters for target in adapter.target_modules}
    result = exact if rank is None else rank
    with complete_folder(output) as temporary:
        write_peft_files(
            temporary,
            tensors,
            rank=result,
            alpha=result,
            targets=[target for target in LoraTarget if target in targets],
            base=adapters[0].base,
        )
    return result, (cut / whole) ** 0.5 if whole else 0.0


def _sum(adapters: Sequence[PeftAdapter], weights: Sequence[float], linear: str) -> tuple[Tensor, Tensor]:
    """A and B of the exact sum, in float32; zeros where an adapter has nothing beside the linear."""
    keys = [f"{linear}.lora_{letter}.weight" for letter in "AB"]
    shapes = {
        adapter.folder: (adapter.tensors[keys[0]].shape[1], adapter.tensors[keys[1]].shape[0])
        for adapter in adapters
        if keys[0] in adapter.tensors
    }
    inputs, outputs = next(iter(shapes.values()))
    for folder, shape in shapes.items():
        if shape != (inputs, outputs):
            raise CheckpointError(
                f"{folder} is an adapter of another model than {next(iter(shapes))}: beside {linear} it maps "
                f"{shape[0]} inputs to {shape[1]} outputs, not {inputs} to {outputs}; name adapters of one "
                f"base"
            )
    rows, columns = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.folder in shapes:
            a, b = (adapter.tensors[key].float() for key in keys)
        else:
            a, b = torch.zeros(adapter.rank, inputs), torch.zeros(outputs, adapter.rank)
        rows.append(a)
        columns.append(weight * adapter.alpha / adapter.rank * b)
    return torch.cat(rows), torch.cat(columns, dim=1)


def nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product of smaller rank that is nearest to ``b @ a``.

    Computed of the two factors alone, in float64: the product may be large.

    Args:
        a: [R, inputs].
        b: [outputs, R].
        rank: at most R.

    Returns:
        A [rank, inputs] and B [outputs, rank], and the squares of all singular values of ``b @ a`` in falling
        order, padded with zeros to R.
    """
    left, inner = torch.linalg.qr(b.double())
    right, outer = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(inner @ outer.T)
    squares = torch.zeros(len(a), dtype=values.dtype)
    squares[: len(values)] = values.square()
    kept = min(rank, len(values))
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    root = values[:kept].sqrt()
    new_a[:kept] = (root[:, None] * (right @ v[:kept].T).T).to(a.dtype)
    new_b[:, :kept] = (left @ u[:, :kept] * root).to(b.dtype)
    return new_a, new_b, squares
