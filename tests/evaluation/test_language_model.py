"""What a Hugging Face folder says to texts is what plain forward passes of transformers say, one by one.

In float32 with a tolerance of 1e-5 nats: batches of padded rows round at other places.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.language_model import ScoreRequest
from spikingbrain_train.evaluation.score_batches import batch_groups, rows_of
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from tests.evaluation.plain_scores import plain_continuation, plain_log_probs, some_requests
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


@pytest.fixture(scope="module")
def model(plain: torch.nn.Module, folder: Path) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel(plain, TextTokenizer(folder), tokens_per_batch=128)


def test_scores_are_those_of_plain_forward_passes(
    model: HuggingFaceLanguageModel, plain: torch.nn.Module
) -> None:
    requests = some_requests(MODEL_VOCAB_SIZE)
    scores, distributions = model.score(requests), model.log_probs(requests)
    assert len(scores) == len(distributions) == len(requests)
    for request, score, distribution in zip(requests, scores, distributions, strict=True):
        expected = plain_log_probs(plain, request)
        targets = torch.tensor(list(request.continuation), dtype=torch.long)
        torch.testing.assert_close(distribution, expected, rtol=0, atol=1e-5)
        of_targets = expected.gather(1, targets.unsqueeze(1)).flatten()
        assert score.log_probs == pytest.approx(of_targets.tolist(), abs=1e-5)
        assert score.log_prob == pytest.approx(of_targets.sum().item(), abs=1e-4)
        assert list(score.greedy) == (expected.argmax(-1) == targets).tolist()
    assert any(any(score.greedy) for score in scores) and not all(all(score.greedy) for score in scores)


def test_continuations_are_the_likeliest_tokens_one_after_the_other(
    model: HuggingFaceLanguageModel, plain: torch.nn.Module
) -> None:
    prompts = [list(request.context) for request in some_requests(MODEL_VOCAB_SIZE)[:5]]
    found = model.generate(prompts, 7)
    assert found == [plain_continuation(plain, prompt, 7) for prompt in prompts]
    end = found[0][3]
    assert model.generate(prompts[:1], 7, end_tokens={end}) == [found[0][: found[0].index(end) + 1]]
    assert model.generate([], 7) == [] and model.score([]) == []


def test_what_a_model_declares(model: HuggingFaceLanguageModel) -> None:
    assert (model.vocab_size, model.max_length) == (MODEL_VOCAB_SIZE, 256)
    assert model.tokenizer.decode(model.tokenizer.encode("for x in y")) == "for x in y"


def test_an_unknown_id_is_one_sentence_and_a_request_needs_a_context(model: HuggingFaceLanguageModel) -> None:
    with pytest.raises(DataError, match="gives a text the id 384, but the model knows 384; name the"):
        model.score([ScoreRequest([1], [384])])
    with pytest.raises(ValueError, match="no context"):
        model.score([ScoreRequest([], [1])])


def test_requests_that_part_in_the_last_token_are_read_once() -> None:
    question = list(range(30))
    rows = rows_of([ScoreRequest(question, [letter]) for letter in (7, 8, 9)] + [ScoreRequest([1], [2, 3])])
    assert [row.tokens for row in rows] == [tuple(question), (1, 2)]
    assert (rows[0].positions, rows[0].targets, rows[0].slots) == ([29, 29, 29], [7, 8, 9], [0, 1, 2])
    assert (rows[1].positions, rows[1].targets, rows[1].slots) == ([0, 1], [2, 3], [3, 4])


@pytest.mark.parametrize("replicas", [1, 3])
def test_batches_hold_every_row_once_in_few_shapes(replicas: int) -> None:
    lengths = [random.Random(0).randint(1, 300) for _ in range(500)]
    rows = rows_of([ScoreRequest([number % 50] * length, [1]) for number, length in enumerate(lengths)])

    def fitting(length: int) -> int:
        return -(-(length + 4) // 8) * 8 - 4

    groups = batch_groups(rows, tokens_per_batch=1024, replicas=replicas, fitting=fitting)
    held = [row.tokens for group in groups for batch in group.batches for row in batch]
    assert sorted(held) == sorted(row.tokens for row in rows)
    assert [group.length for group in groups] == sorted((group.length for group in groups), reverse=True)
    assert len(groups) < 40
    for group in groups:
        assert len(group.batches) % replicas == 0 and (group.length + 4) % 8 == 0
        assert group.rows * group.length <= 1024
        assert all(len(batch) <= group.rows for batch in group.batches)
        for row in (row for batch in group.batches for row in batch):
            assert len(row.tokens) <= group.length <= len(row.tokens) * 1.125 + 8
