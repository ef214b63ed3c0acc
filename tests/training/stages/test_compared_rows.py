"""Which tokens a model with sinks is held against its dense source on."""

from __future__ import annotations

import torch

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.training.stages.compared_rows import compared_rows

BOUNDS = ((0, 6), (0, 4, 6))


def _rows(sinks: int, rank: int = 0, ranks: int = 1) -> list[str] | None:
    """A word a row of the batch: ``x`` for a token that counts, ``.`` for one that does not."""
    layout = SequenceLayout(6, sinks, rank, ranks, cu_seqlens=BOUNDS)
    tokens = torch.zeros(2, len(layout.text_range()), dtype=torch.int64)
    rows = compared_rows(MicroBatch(tokens, tokens, tokens.float(), layout))
    return None if rows is None else ["".join(".x"[int(each)] for each in row) for row in rows.t()]


def test_all_rows_count_without_sinks() -> None:
    assert _rows(0) is None


def test_sinks_and_first_tokens_of_documents_do_not_count() -> None:
    assert _rows(2) == ["...xxxxx", "...xxx.x"]


def test_each_context_parallel_rank_has_its_part() -> None:
    assert [_rows(2, rank, 2) for rank in (0, 1)] == [["...x", "...x"], ["xxxx", "xx.x"]]
