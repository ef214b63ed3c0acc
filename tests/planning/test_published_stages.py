"""The published stages as experiments: tokens and lengths of the report, and how their samples are packed."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config

STAGES = {
    "7b_8k": (8192, 100e9),
    "7b_32k": (32768, 25e9),
    "7b_128k": (131072, 25e9),
    "76b_8k": (8192, 100e9),
    "76b_32k": (32768, 30e9),
    "76b_128k": (131072, 30e9),
}
"""arXiv 2509.05276, section 3.4: 100B, 20-30B, 20-30B; table 2 counts 150B (7B) and 160B (76B) in all."""
BEFORE = {32768: 8192, 131072: 32768}
"""Length of a long stage -> of the stage before."""


@pytest.mark.parametrize("name", STAGES)
def test_tokens_lengths_and_packing(name: str) -> None:
    length, tokens = STAGES[name]
    run = to_run_config(
        compose_run([f"experiment=spikingbrain_{name}", "dry_run=true", "checkpoint.load=null"])
    )
    stage, data = run.stage, run.data
    assert stage.seq_length == length
    assert stage.train_iters * stage.global_batch_size * length == pytest.approx(tokens, rel=1e-3)
    assert data.source_tokens == 18e12
    is_long = length in BEFORE
    assert data.pack_by_domain is is_long
    assert (data.long_documents.share, data.long_documents.min_tokens) == (
        (0.5, BEFORE[length]) if is_long else (None, None)
    )
