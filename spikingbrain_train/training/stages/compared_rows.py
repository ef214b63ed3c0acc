"""Which tokens a model with sinks and its dense source, which has none, can be compared on.

Sinks have no counterpart. Nor does the first token of a document: in the source it is what attention rests
on, with hidden states far larger than all others (arXiv 2402.17762); with sinks in front it is a token like
any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.parallel.process_groups import ProcessGroups


def compared_rows(batch: MicroBatch) -> Tensor | None:
    """[slice_length, B] bool: all text but the first token of each document; None without sinks, for all."""
    layout, (rows, text) = batch.layout, batch.tokens.shape
    if layout.num_sink_tokens == 0:
        return None
    compared = torch.ones(layout.local_sink_tokens + text, rows, dtype=torch.bool, device=batch.tokens.device)
    compared[: layout.local_sink_tokens] = False
    first = layout.text_range().start
    for row in range(rows):
        for document in layout.local_documents(row):
            if document.before == 0:
                compared[layout.local_sink_tokens + document.start - first, row] = False
    return compared


def share_of_rows(rows: Tensor | None, groups: ProcessGroups, *, sequence_parallel: bool) -> Tensor | None:
    """Those of ``rows`` that hidden states of this tensor-parallel rank hold."""
    if rows is None or not sequence_parallel:
        return rows
    return rows.chunk(groups.collection.tp.size())[groups.collection.tp.rank()]
