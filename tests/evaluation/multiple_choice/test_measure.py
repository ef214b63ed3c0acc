"""Answers of models whose habits are known: one that knows, one that likes a letter, a real one untouched."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.language_model import LanguageModel, Score, ScoreRequest
from spikingbrain_train.evaluation.multiple_choice.measure import by_metric, measure_tasks
from spikingbrain_train.evaluation.multiple_choice.plan import TaskPlan
from spikingbrain_train.evaluation.multiple_choice.result import describe
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from tests.evaluation.multiple_choice.small_tasks import ROWS, TASKS, write_tasks
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

RIGHT = {"apple", "eight", "honey", "June", "ice", "a sparrow"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("source") / "model")


class Habitual(LanguageModel):
    """Says of each option what ``likes`` of its letter and text says."""

    def __init__(self, source: Path, likes: Any) -> None:
        super().__init__(TextTokenizer(source), vocab_size=MODEL_VOCAB_SIZE, max_length=256)
        self.likes = likes
        self.prompts: list[str] = []

    def score(self, requests: Sequence[ScoreRequest], *, what: str = "") -> list[Score]:
        scores = []
        for context, continuation in requests:
            prompt, option = (self.tokenizer.decode(list(ids)) for ids in (context, continuation))
            self.prompts.append(prompt)
            shown = dict(re.findall(r"^([A-D])\. (.*)$", prompt, re.MULTILINE)[-4:])
            letter = option.strip()
            scores.append(Score((self.likes(letter, shown.get(letter, "")),), (False,)))
        return scores

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    _read = _device = generate  # type: ignore[assignment]


def test_who_knows_is_right_in_all_four_orders(folder: Path, source: Path) -> None:
    model = Habitual(source, lambda letter, text: 0.0 if text in RIGHT else -1.0)
    found = measure_tasks(model, TaskPlan.of("mmlu,cmmlu,ceval", folder, permutations=True))
    for name, questions in (("mmlu", 8), ("cmmlu", 3), ("ceval", 3)):
        result, permutations = found[name], found[name].permutations
        assert (result.score.accuracy, result.score.questions, result.chance) == (1.0, questions, 0.25)
        assert permutations is not None and permutations.accuracy == (1.0,) * 4
        assert (permutations.right_under_all, permutations.right_under_some) == (1.0, 0.0)
        assert permutations.consistency == 1.0
        # Over all orders the right option has had every letter.
        assert permutations.letters == {letter: 0.25 for letter in "ABCD"}
    assert found["mmlu"].subjects.keys() == {"anatomy", "virology"} and found["mmlu"].all_subjects == 57
    assert by_metric(found)["tasks/mmlu/right_under_all_orders"] == 1.0
    table = describe(found)
    assert "mmlu (2 of 57 subjects)" in table and "100.0 100.0 100.0 100.0" in table


def test_who_likes_a_letter_knows_nothing(folder: Path, source: Path) -> None:
    model = Habitual(source, lambda letter, text: 0.0 if letter == "B" else -1.0)
    permutations = measure_tasks(model, TaskPlan.of("mmlu", folder, permutations=True))["mmlu"].permutations
    assert permutations is not None
    assert sum(permutations.accuracy) == pytest.approx(1.0)
    assert permutations.accuracy[0] == pytest.approx(2 / 8)
    assert (permutations.right_under_all, permutations.right_under_some) == (0.0, 1.0)
    assert permutations.consistency == 0.0
    assert permutations.letters == {"A": 0.0, "B": 1.0, "C": 0.0, "D": 0.0}


def test_examples_stand_in_front_of_the_question(folder: Path, source: Path) -> None:
    model = Habitual(source, lambda letter, text: 0.0)
    plan = TaskPlan.of("mmlu_virology", folder, num_fewshot=1, limit=1)
    found = measure_tasks(model, plan)["mmlu_virology"]
    assert (found.score.questions, found.num_fewshot, found.score.stderr) == (1, 1, None)
    assert found.as_json().keys() == {"questions", "accuracy", "chance", "num_fewshot", "shortened_prompts"}
    (prompt,) = set(model.prompts)
    first, second = ROWS["mmlu/dev/virology"][0]["question"], ROWS["mmlu/test/virology"][0]["question"]
    assert prompt.index("about virology") < prompt.index(first) < prompt.index(second)
    assert prompt.count("Answer: A") == 1 and prompt.endswith("\nAnswer:")


def test_every_task_is_asked_without_network_and_leaves_everything_as_it_was(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = load_causal_lm(source, trust_remote_code=False, dtype=torch.float32, device=torch.device("cpu"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generators = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    asked = HuggingFaceLanguageModel(model, TextTokenizer(source))
    asked.max_length = 90
    found = measure_tasks(asked, TaskPlan.of(TASKS, folder))
    assert list(found) == TASKS.split(",")
    assert {name: each.score.questions for name, each in found.items()} == {
        **{"mmlu": 8, "cmmlu": 3, "ceval": 3},
        **{"arc_challenge": 4, "hellaswag": 2, "winogrande": 2, "piqa": 3},
    }
    with_norm = {name for name, each in found.items() if each.score.acc_norm is not None}
    assert with_norm == {"cmmlu", "ceval", "arc_challenge", "hellaswag", "piqa"}
    assert found["arc_challenge"].chance == pytest.approx((3 / 4 + 1 / 2) / 4)
    assert found["mmlu"].shortened > 0 and "lost their beginning" in describe(found)
    assert generators == (
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
