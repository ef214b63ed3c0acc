"""Several documents in one sequence that do not see each other.

They come as ``cu_seqlens``, as in flash-attn's varlen calls.

Documents follow each other in q and in the text of k and v. The queries of a document are the last of its
keys (a document may have no queries at all); the sinks in front of all text keys belong to every document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end, [0, end of the first, ..., length], among queries and text keys."""

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]

    @property
    def query_lengths(self) -> list[int]:
        """Queries of every document."""
        return _differences(self.cu_seqlens_q)

    @property
    def key_lengths(self) -> list[int]:
        """Text keys of every document."""
        return _differences(self.cu_seqlens_k)


def _differences(bounds: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]


def as_documents(
    cu_seqlens_q: Sequence[int] | Tensor | None,
    cu_seqlens_k: Sequence[int] | Tensor | None,
    *,
    B: int,
    Tq: int,
    Tk: int,
) -> Documents | None:
    """Checked bounds; None where they say no more than that all is one document.

    Raises:
        ValueError: only one is given, B is not 1, or bounds do not fit the lengths or each other.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: give both or none.")
    if B != 1:
        raise ValueError(f"cu_seqlens need B = 1, not {B}: call once for every row, or lay rows end to end.")
    q_bounds, k_bounds = (
        tuple(x.tolist()) if isinstance(x, Tensor) else tuple(int(i) for i in x)
        for x in (cu_seqlens_q, cu_seqlens_k)
    )
    for name, bounds, T in (("cu_seqlens_q", q_bounds, Tq), ("cu_seqlens_k", k_bounds, Tk)):
        falls = any(a > b for a, b in zip(bounds, bounds[1:], strict=False))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or falls:
            raise ValueError(f"{name} must rise from 0 to {T}, not be {list(bounds)}.")
    documents = Documents(q_bounds, k_bounds)
    lengths = list(zip(documents.query_lengths, documents.key_lengths, strict=False))
    if len(q_bounds) != len(k_bounds) or any(queries > keys for queries, keys in lengths):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must name the same documents, each with at least as many keys as "
            f"queries, not {list(q_bounds)} and {list(k_bounds)}."
        )
    return documents if len(lengths) > 1 else None


def for_each_document(
    run: Callable[..., Tensor],
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    documents: Documents,
    *,
    num_sink_tokens: int,
    **settings: Any,
) -> Tensor:
    """Call ``run`` for the sinks and every document in turn: how kernels without documents get them.

    The inputs are split once: a slice for every document would fill a gradient of the whole sequence each.
    """
    q_parts = q_BTHK.split(documents.query_lengths, dim=1)
    (k_sinks, *k_parts), (v_sinks, *v_parts) = (
        x.split([num_sink_tokens, *documents.key_lengths], dim=1) for x in (k_BTGK, v_BTGV)
    )
    outputs = []
    for q, k, v in zip(q_parts, k_parts, v_parts, strict=True):
        if q.shape[1]:
            if num_sink_tokens:
                k, v = torch.cat((k_sinks, k), dim=1), torch.cat((v_sinks, v), dim=1)
            outputs.append(run(q, k, v, num_sink_tokens=num_sink_tokens, **settings))
    return torch.cat(outputs, dim=1)
