"""spikingbrain-bricks route: texts find the brick whose samples they are like."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.bricks.command_line import bricks
from spikingbrain_train.bricks.route import Retriever, embed
from spikingbrain_train.errors import ConfigurationError
from tests.small_source import save_small_source

TEXTS = {"numbers": "0123456789 " * 200, "letters": "abcdefghij " * 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    save_small_source(folder / "source")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_text_is_most_like_the_brick_at_its_place() -> None:
    generator = torch.Generator().manual_seed(0)
    common, places = 50 * torch.randn(8, generator=generator), torch.eye(8)[:3]
    samples = {
        name: common + place + 0.1 * torch.randn(5, 8, generator=generator)
        for name, place in zip("abc", places, strict=True)
    }
    scores = Retriever.of(samples).scores(common + 3 * places)  # without a common part all cosines were 1
    assert scores.argmax(-1).tolist() == [0, 1, 2]
    assert (scores.diagonal() > 0.8).all() and scores[~torch.eye(3, dtype=torch.bool)].max() < 0


def test_prompts_and_held_out_texts_find_their_bricks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["route", "--model", str(folder / "source"), "--device", "cpu", "--dtype", "float32"]
    words += ["--bricks", *(f"{name}={folder / name}.txt" for name in TEXTS), "--seq-length", "24"]
    words += ["--windows", "8", "--prompt", "345 678 901", "hijab cafe", "--output", str(folder / "out.json")]
    bricks(words)
    found = json.loads((folder / "out.json").read_text())
    assert found["held_out"] == {name: [name] * 4 for name in TEXTS}
    assert [each["chosen"] for each in found["prompts"]] == ["numbers", "letters"]
    assert "8 of 8 other windows" in capsys.readouterr().out

    # The same of transformers' own hidden states.
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder / "source")("345 678 901")["input_ids"]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(embed(model, [ids])[0], states[0].mean(0))


def test_a_text_that_is_too_short_is_named_with_its_flag(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "short.txt").write_text("too short")
    words = ["route", "--model", str(folder / "source"), "--device", "cpu", "--dtype", "float32", "--bricks"]
    with pytest.raises(SystemExit):
        bricks([*words, f"a={folder / 'short.txt'}", f"b={folder / 'numbers.txt'}"])
    sentence = rf"--bricks {folder}/short\.txt holds \d+ tokens, and 8 windows of 128 take"
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("bricks_asked_for", "more", "sentence"),
    [
        (["a=x"], [], "--bricks names one brick"),
        (["a=x", "a=y"], [], "--bricks names a twice; give each brick one"),
        (["a", "b=y"], [], "--bricks has 'a'; write each as name=file"),
        (["a=x", "b=y"], ["--windows", "3"], "--windows is 3; give an even number"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    folder: Path,
    bricks_asked_for: list[str],
    more: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises((SystemExit, ConfigurationError)) as error:
        bricks(["route", "--model", str(folder / "source"), "--bricks", *bricks_asked_for, *more])
    assert sentence in f"{error.value} {capsys.readouterr().err}"
