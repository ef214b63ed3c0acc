"""A Megatron model says to texts what its export says in plain forward passes, in every topology.

In float32: 1e-5 nats against transformers, and between topologies, whose sums round at other places.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.language_model import Score
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from tests.distributed.pool import RankPool
from tests.evaluation.plain_scores import plain_continuation, plain_log_probs, some_requests
from tests.small_source import MODEL_VOCAB_SIZE

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel

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


@contextmanager
def _opened(checkpoint: Path, settings: list[str]) -> Iterator[Callable[..., MegatronLanguageModel]]:
    """Makes language models of a checkpoint, on this rank."""
    from spikingbrain_train.evaluation.checkpoint_model import checkpoint_model
    from spikingbrain_train.evaluation.checkpoint_request import for_reading, request_checkpoint
    from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    size = int(os.environ["WORLD_SIZE"])
    request = for_reading(
        request_checkpoint(checkpoint, settings=settings, device="cpu", dtype="float32", world_size=size)
    )
    assert request.tokenizer is not None
    tokenizer = TextTokenizer(request.tokenizer)
    with checkpoint_model(request) as opened:
        yield partial(MegatronLanguageModel, opened.model, opened.groups, tokenizer)


Answers = tuple[list[Score], list[list[int]], list[float]]
"""Of REQUESTS, continuations of PROMPTS, and sums of probabilities that are 1."""


def _answers(checkpoint: Path, settings: list[str]) -> Answers:
    with _opened(checkpoint, settings) as open_model:
        model = open_model(tokens_per_batch=128)
        scores = model.score(REQUESTS)
        generated = model.generate(PROMPTS, NEW_TOKENS)
        end = {generated[0][1]}
        assert model.generate(PROMPTS, NEW_TOKENS, end_tokens=end) == [_until(ids, end) for ids in generated]
        sums = [float(each.exp().sum()) for each in model.log_probs(REQUESTS[:6])]
    return scores, generated, sums


def _until(ids: list[int], end: set[int]) -> list[int]:
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in end), ids)


def _written_in_pieces(checkpoint: Path, settings: list[str]) -> tuple[list[int], list[list[list[int]]]]:
    """Most tokens that a layer was given at once, and continuations, for pieces of 2, 3 and as it chooses."""
    longest, written = [], []
    with _opened(checkpoint, settings) as open_model:
        for piece in (2, 3, None):
            model, seen = open_model(prefill_chunk=piece), []
            hook = model.model.decoder.layers[0].register_forward_pre_hook(
                lambda _, __, kwargs, seen=seen: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
            )
            written.append(model.generate(PROMPTS, NEW_TOKENS))
            hook.remove()
            longest.append(max(seen))
    return longest, written


@pytest.fixture(scope="module")
def of_one_rank(ranks: RankPool) -> Callable[[Path], Answers]:
    """What one rank says of a checkpoint."""

    @cache
    def answers(checkpoint: Path) -> Answers:
        (found,) = ranks.run(_answers, checkpoint, [], world_size=1)
        return found

    return answers


@pytest.mark.parametrize("topology", ["one rank", "TP 2", "PP 2", "DP 2", "CP 2"])
def test_prompts_in_pieces_are_continued_as_prompts_at_once(
    topology: str, ranks: RankPool, text_checkpoint: Path, of_one_rank: Callable[[Path], Answers]
) -> None:
    _, generated, _ = of_one_rank(text_checkpoint)
    size, settings = TOPOLOGIES.get(topology, (1, []))
    for longest, written in ranks.run(_written_in_pieces, text_checkpoint, settings, world_size=size):
        assert written == [generated] * 3
        assert longest[:2] == [2, 3] and longest[2] > 3


def test_pieces_of_what_cannot_read_on_are_one_sentence(ranks: RankPool, text_checkpoint: Path) -> None:
    size, settings = TOPOLOGIES["TP 2 + sequence parallel x CP 2"]
    found = ranks.run(_refusal_of_pieces, text_checkpoint, settings, 4, world_size=size)
    assert all("prefill_chunk reads prompts in pieces, which ranks that split" in each for each in found)
    (found,) = ranks.run(_refusal_of_pieces, text_checkpoint, [], 0, world_size=1)
    assert found == "prefill_chunk is 0; give at least 1, or leave it out"


def _refusal_of_pieces(checkpoint: Path, settings: list[str], piece: int) -> str:
    with _opened(checkpoint, settings) as open_model, pytest.raises(ConfigurationError) as error:
        open_model(prefill_chunk=piece).generate(PROMPTS, NEW_TOKENS)
    return str(error.value)


def test_a_checkpoint_says_what_plain_forward_passes_of_its_export_say(
    text_checkpoint: Path, tmp_path: Path, of_one_rank: Callable[[Path], Answers]
) -> None:
    export_checkpoint(text_checkpoint, tmp_path / "export")
    plain: Any = load_causal_lm(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu")
    )
    scores, generated, _ = of_one_rank(text_checkpoint)
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
    form: str,
    ranks: RankPool,
    text_checkpoint: Path,
    text_checkpoint_76b: Path,
    of_one_rank: Callable[[Path], Answers],
) -> None:
    """The experts of the 76B form have a capacity, which a reading leaves out."""
    checkpoint = text_checkpoint if form == "7B" else text_checkpoint_76b
    scores, generated, sums = of_one_rank(checkpoint)
    for name in sorted(set(TOPOLOGIES) - {"EP 2"}) if form == "7B" else EXPERTS:
        size, settings = TOPOLOGIES[name]
        for found, written, summed in ranks.run(_answers, checkpoint, settings, world_size=size):
            assert written == generated, name
            assert summed == pytest.approx(sums, abs=1e-4), name
            for one, several in zip(scores, found, strict=True):
                assert several.log_probs == pytest.approx(one.log_probs, abs=1e-5), name
                assert several.greedy == one.greedy, name
