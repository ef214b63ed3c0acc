"""Documents that lie behind each other in one sequence, as ops are told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def document_bounds(cu_seqlens: Sequence[int] | Tensor, rows: int, length: int) -> tuple[int, ...]:
    """``cu_seqlens`` as plain integers: [0, end of the first document, ..., length].

    Args:
        cu_seqlens: integers, one more than there are documents.
        rows: of the sequence, which must be one.
        length: of the sequence, in tokens.

    Raises:
        ValueError: they do not rise from 0 to ``length``, or there are several rows.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be integers [D + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}."
            )
        cu_seqlens = cu_seqlens.tolist()
    bounds = tuple(cu_seqlens)
    if rows != 1:
        raise ValueError(f"cu_seqlens needs B = 1, not {rows}: flatten the rows into one sequence.")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {length} without empty documents: {list(bounds)}."
        )
    return bounds


def run_documents(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    states: Tensor,
    bounds: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Run documents one by one.

    Split rather than sliced: the gradients of D slices are D tensors of full size.

    Args:
        run: of the inputs of one document and the state before it; gives its output and the state behind it.
        inputs: [1, T, ...] of the whole sequence.
        states: before every document [documents, ...].
        bounds: from :func:`document_bounds`.

    Returns:
        Outputs [1, T, ...] and states [documents, ...].
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    documents = zip(*(x.split(lengths, dim=1) for x in inputs), states.split(1), strict=True)
    outputs, final_states = zip(*(run(*document) for document in documents), strict=True)
    return torch.cat(outputs, dim=1), torch.cat(final_states)
