"""Probes of a Megatron checkpoint: the same numbers in every topology, and in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.test_checkpoint_evaluation import evaluate

PROBES = ["--probes", "passkey,associative_recall", "--probe-lengths", "500", "--probe-samples", "1"]
PROBES += ["--probe-depths", "0,100"]
TOPOLOGIES = {
    "TP 2": ["tp2"],
    "PP 2": ["pp2"],
    "CP 2": ["context_parallel_size=2"],
    "DP 2": [],
}


def _probe(
    ranks: RankPool, checkpoint: Path, folder: Path, *more: str, world_size: int = 1
) -> dict[str, Any]:
    result = folder / "result.json"
    words = ["--model", str(checkpoint), *PROBES, *more, "--output", str(result)]
    ranks.run(evaluate, *words, world_size=world_size)
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_every_topology_finds_what_one_rank_finds(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    """To 1e-5 nats, by which sums round at other places."""
    picture = tmp_path / "probes.png"
    one = _probe(ranks, text_checkpoint, tmp_path, "--plot", str(picture))
    assert picture.stat().st_size > 0
    assert "cross_entropy" not in one and one["dtype"] == "float32"
    passkey = one["probes"]["results"]["passkey"]["500"]
    assert passkey["answers"] == 2 and passkey["nats_per_token"] > 1
    for name, settings in TOPOLOGIES.items():
        several = _probe(ranks, text_checkpoint, tmp_path, "--parallel", *settings, world_size=2)
        for probe, lengths in one["probes"]["results"].items():
            for length, cell in lengths.items():
                found = several["probes"]["results"][probe][length]
                assert found["nats_per_token"] == pytest.approx(cell["nats_per_token"], abs=1e-5), name
                assert found["accuracy"] == cell["accuracy"] and found["answers"] == cell["answers"], name
