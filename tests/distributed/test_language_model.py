"""A Megatron model says to texts what its export says in plain forward passes, in every topology.

In float32: 1e-5 nats against transformers, and between topologies, whose sums round at other places.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.evaluation.language_model import Score
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from tests.distributed.pool import RankPool
from tests.evaluation.plain_scores import plain_continuation, plain_log_probs, some_requests
from tests.small_source import MODEL_VOCAB_SIZE

REQUESTS = some_requests(MODEL_VOCAB_SIZE)
PROMPTS = [list(request.context) for request in REQUESTS[4:20:4]] + [[5], [6]]
NEW_TOKENS = 5

TOPOLOGIES: dict[str, tuple[int, list[str]]] = {
    "TP 2": (2, ["tp2"]),
    "TP 2 + sequence parallel": (2, ["tp2_sp"]),
    "PP 2": (2, ["pp2"]),
    "DP 2": (2, []),
    "EP 2": (2, ["ep2"]),
    "CP 2": (2, ["context_parallel_size=2"]),
    "TP 2 + sequence parallel x CP 2": (4, ["tp2_sp", "context_parallel_size=2"]),
}

EXPERTS = ("TP 2 + sequence parallel", "PP 2", "DP 2", "EP 2", "CP 2")


def _answers(checkpoint: Path, settings: list[str]) -> tuple[list[Score], list[list[int]], list[float]]:
    from spikingbrain_train.evaluation.checkpoint_model import checkpoint_model
    from spikingbrain_train.evaluation.checkpoint_request import for_reading, request_checkpoint
    from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    size = int(os.environ["WORLD_SIZE"])
    request = for_reading(
        request_checkpoint(checkpoint, settings=settings, device="cpu", dtype="float32", world_size=size)
    )
    assert request.tokenizer is not None
    with checkpoint_model(request) as opened:
        model = MegatronLanguageModel(
            opened.model, opened.groups, TextTokenizer(request.tokenizer), tokens_per_batch=128
        )
        scores = model.score(REQUESTS)
        generated = model.generate(PROMPTS, NEW_TOKENS)
        end = {generated[0][1]}
        assert model.generate(PROMPTS, NEW_TOKENS, end_tokens=end) == [_until(ids, end) for ids in generated]
        sums = [float(each.exp().sum()) for each in model.log_probs(REQUESTS[:6])]
    return scores, generated, sums


def _until(ids: list[int], end: set[int]) -> list[int]:
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in end), ids)


def test_a_checkpoint_says_what_plain_forward_passes_of_its_export_say(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    export_checkpoint(text_checkpoint, tmp_path / "export")
    plain: Any = load_causal_lm(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu")
    )
    ((scores, generated, _),) = ranks.run(_answers, text_checkpoint, [], world_size=1)
    for request, score in zip(REQUESTS, scores, strict=True):
        expected = plain_log_probs(plain, request)
        targets = torch.tensor(list(request.continuation), dtype=torch.long)
        of_targets = expected.gather(1, targets.unsqueeze(1)).flatten().tolist()
        assert score.log_probs == pytest.approx(of_targets, abs=1e-5)
        assert list(score.greedy) == (expected.argmax(-1) == targets).tolist()
    assert generated == [plain_continuation(plain, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["7B", "76B"])
def test_every_topology_says_what_one_rank_says(
    form: str, ranks: RankPool, text_checkpoint: Path, text_checkpoint_76b: Path
) -> None:
    """The experts of the 76B form have a capacity, which a reading leaves out."""
    checkpoint = text_checkpoint if form == "7B" else text_checkpoint_76b
    ((scores, generated, sums),) = ranks.run(_answers, checkpoint, [], world_size=1)
    for name in sorted(set(TOPOLOGIES) - {"EP 2"}) if form == "7B" else EXPERTS:
        size, settings = TOPOLOGIES[name]
        for found, written, summed in ranks.run(_answers, checkpoint, settings, world_size=size):
            assert written == generated, name
            assert summed == pytest.approx(sums, abs=1e-4), name
            for one, several in zip(scores, found, strict=True):
                assert several.log_probs == pytest.approx(one.log_probs, abs=1e-5), name
                assert several.greedy == one.greedy, name
