"""Prompts that ``spikingbrain-bricks route`` has chosen adapters for, each computed with its own alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.bricks.adapters import attach
from spikingbrain_train.bricks.command_line import bricks
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.command_line import evaluate as evaluate_here
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


def evaluate(*arguments: str) -> None:
    """spikingbrain-evaluate, on every rank of a pool."""
    from spikingbrain_train.evaluation.command_line import evaluate

    evaluate([*arguments, "--device", "cpu", "--dtype", "float32"])


def beside_the_export(folder: Path) -> tuple[str, ...]:
    """Flags of the exported base with the folders of peft."""
    adapters = (f"{name}={folder / 'adapters' / name}" for name in SAMPLES)
    return ("--model", str(folder / "base"), "--trust-remote-code", "--adapters", *adapters)


def losses_of_peft(folder: Path) -> dict[str | None, list[float]]:
    """Of every adapter, and of none, nats of each prompt: transformers' model and peft's own."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder / "base"), {}
    for name in (*SAMPLES, None):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", trust_remote_code=True, dtype=torch.float32
        )
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, folder / "adapters" / name)
        nats = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                logits = model.eval()(ids).logits
            nats.append(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item())
        found[name] = nats
    return found


@pytest.mark.parametrize("form", ["one rank", "TP 2", "Hugging Face folder"])
def test_routed_texts_cost_what_peft_says_of_the_chosen_adapter(
    form: str, folder: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """Bound: 1e-5, relative, in float32, whose sums are in another order."""
    model: tuple[str, ...] = ("--model", str(folder / "both"))
    if form == "Hugging Face folder":
        model = beside_the_export(folder)
    elif form == "TP 2":
        model = (*model, "--parallel", "tp2")
    output = tmp_path / "routed.json"
    words = (*model, "--routed", str(folder / "choices.json"), "--output", str(output))
    ranks.run(evaluate, *words, world_size=2 if form == "TP 2" else 1)
    routed = json.loads(output.read_text())["routed"]

    nats, names = losses_of_peft(folder), chosen(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokens = sum(len(tokenizer(prompt)["input_ids"]) - 1 for prompt in PROMPTS)
    with_chosen = sum(nats[name][index] for index, name in enumerate(names))
    best = sum(min(nats[name][index] for name in SAMPLES) for index in range(len(PROMPTS)))
    assert (routed["texts"], routed["tokens"]) == (len(PROMPTS), tokens)
    assert routed["cross_entropy"] == pytest.approx(with_chosen / tokens, rel=1e-5)
    assert routed["cross_entropy_of_the_best"] == pytest.approx(best / tokens, rel=1e-5)
    assert routed["cross_entropy_without_adapters"] == pytest.approx(sum(nats[None]) / tokens, rel=1e-5)
    assert routed["cross_entropy_without_adapters"] != pytest.approx(routed["cross_entropy"], rel=1e-3)
    assert {name: each["texts"] for name, each in routed["adapters"].items()} == {
        name: names.count(name) for name in names
    }


def test_answers_with_adapters_beside_a_folder_are_those_of_the_checkpoint(
    folder: Path, ranks: RankPool, tmp_path: Path
) -> None:
    routed = ("--routed", folder / "choices.json", *GREEDY)
    ours = texts(ranks, tmp_path, "--model", folder / "both", *routed)
    theirs = texts(ranks, tmp_path, *beside_the_export(folder), *routed)
    for name in ("text", "chosen"):
        assert [each[name] for each in theirs] == [each[name] for each in ours]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--model", "both", "--adapters", "numbers=adapters/numbers"],
            "both is a Megatron checkpoint, which",
        ),
        (
            ["--model", "base", "--adapters", "numbers=adapters/numbers"],
            "has chosen letters, but --adapters are",
        ),
        (["--model", "base", "--adapters", "numbers"], "has 'numbers'; write each as name=folder"),
        (["--model", "base", "--adapters", "numbers=base"], "has no adapter_config.json; name a folder"),
        (["--model", "numbers"], "has chosen letters, but the adapters of .*numbers are numbers"),
    ],
)
def test_adapters_that_are_not_there_are_refused_by_both_commands(
    words: list[str],
    sentence: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    for command in (generate_here, evaluate_here):
        with pytest.raises((SystemExit, ConfigurationError)):
            command([*words, "--routed", "choices.json", "--trust-remote-code", "--device", "cpu"])
        assert re.search(sentence, capsys.readouterr().err)


def test_adapters_that_nothing_is_routed_to_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(folder / "base"), "--adapters", f"numbers={folder / 'adapters' / 'numbers'}"]
    for command, more in ((generate_here, ["--prompt", "a"]), (evaluate_here, ["--probes", "passkey"])):
        with pytest.raises((SystemExit, ConfigurationError)):
            command([*model, *more, "--trust-remote-code", "--device", "cpu"])
        assert "--adapters is read with --routed only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "content", "sentence"),
    [
        ("numbers", None, "has chosen letters, but the adapters of .*numbers are numbers; name bricks as"),
        ("base", None, "is a Hugging Face folder; name their folders with --adapters, or the checkpoint"),
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
