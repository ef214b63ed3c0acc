"""Prompts that ``spikingbrain-bricks route`` has chosen adapters for, each computed with its own alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.bricks.adapters import attach
from spikingbrain_train.bricks.command_line import bricks
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.generate_command_line import generate as generate_here
from tests.bricks.test_adapters import adapter_of
from tests.distributed.pool import RankPool
from tests.distributed.test_checkpoint_generation import GREEDY, texts

SAMPLES = {"numbers": "0123456789 " * 200, "letters": "abcdefghij " * 200}
PROMPTS = ["345 6789012345", "cdefghij abcdefghij", "The for statement"]


@pytest.fixture(scope="module")
def folder(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with both adapters and with each alone, and the choices of ``route`` beside them."""
    folder = tmp_path_factory.mktemp("routed")
    export_checkpoint(text_checkpoint, folder / "base")
    for rank, (name, text) in enumerate(SAMPLES.items(), start=2):
        (folder / f"{name}.txt").write_text(text)
        adapter_of(folder / "base", folder / "adapters" / name, rank)
        attach(text_checkpoint, [folder / "adapters" / name], [name], folder / name)
    attach(text_checkpoint, [folder / "adapters" / name for name in SAMPLES], list(SAMPLES), folder / "both")
    words = ["route", "--model", str(folder / "base"), "--device", "cpu", "--dtype", "float32"]
    words += ["--bricks", *(f"{name}={folder / name}.txt" for name in SAMPLES), "--seq-length", "24"]
    words += ["--trust-remote-code", "--prompt", *PROMPTS, "--output", str(folder / "choices.json")]
    bricks(words)
    return folder


def chosen(folder: Path) -> list[str]:
    return [each["chosen"] for each in json.loads((folder / "choices.json").read_text())["prompts"]]


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, ()), (2, ("--parallel", "tp2"))], ids=["one rank", "TP 2"]
)
def test_every_answer_is_that_of_the_model_with_the_chosen_adapter_alone(
    world_size: int, parallel: tuple[Any, ...], folder: Path, ranks: RankPool, tmp_path: Path
) -> None:
    names = chosen(folder)
    assert names[:2] == ["numbers", "letters"]
    routed = ("--model", folder / "both", "--routed", folder / "choices.json", *GREEDY, *parallel)
    found = texts(ranks, tmp_path, *routed, world_size=world_size)
    assert [each["chosen"] for each in found] == names
    for prompt, name, answer in zip(PROMPTS, names, found, strict=True):
        (alone,) = texts(ranks, tmp_path, "--model", folder / name, "--prompt", prompt, *GREEDY)
        (other,) = texts(ranks, tmp_path, "--model", folder / "both", "--prompt", prompt, *GREEDY)
        assert answer["text"] == alone["text"] != other["text"]


@pytest.mark.parametrize(
    ("model", "content", "sentence"),
    [
        ("numbers", None, "has chosen letters, but the adapters of .*numbers are numbers; name bricks as"),
        ("base", None, "is a Hugging Face folder; name the checkpoint that spikingbrain-bricks attach"),
        ("both", "{}", r"is no result of spikingbrain-bricks route \('prompts'\)"),
        ("both", "no JSON", "is no result of spikingbrain-bricks route"),
        ("both", '{"prompts": []}', "has no prompts; give spikingbrain-bricks route some with --prompt"),
    ],
)
def test_choices_that_cannot_be_computed_are_refused(
    model: str,
    content: str | None,
    sentence: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = folder / "choices.json"
    if content is not None:
        file = tmp_path / "choices.json"
        file.write_text(content)
    words = ["--model", str(folder / model), "--routed", str(file), "--trust-remote-code", "--device", "cpu"]
    with pytest.raises((SystemExit, ConfigurationError)):
        generate_here(words)
    assert re.search(sentence, capsys.readouterr().err)
