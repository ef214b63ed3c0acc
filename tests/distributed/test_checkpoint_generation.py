"""Text from a Megatron checkpoint: what transformers generates from the export, the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.distributed.pool import RankPool
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

PROMPT = "The for statement"


def generate(*arguments: str) -> None:
    """spikingbrain-generate, on every rank of a pool."""
    from spikingbrain_train.evaluation.generate_command_line import generate

    generate([*arguments, "--device", "cpu", "--dtype", "float32"])


def texts(ranks: RankPool, folder: Path, *arguments: Any, world_size: int = 1) -> list[dict[str, Any]]:
    """What the command writes, of each prompt."""
    result = folder / "generation.json"
    words = [*map(str, arguments), "--output", str(result), "--max-new-tokens", "16"]
    ranks.run(generate, *words, world_size=world_size)
    found = json.loads(result.read_text())
    return found if isinstance(found, list) else [found]


GREEDY = ("--temperature", 0)
SAMPLED = ("--temperature", 1.5, "--top-p", 0.9, "--seed", 7)


@pytest.mark.parametrize("choice", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_that_of_the_exported_folder(
    choice: tuple[Any, ...], ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    export_checkpoint(text_checkpoint, tmp_path / "export")
    arguments = ("--prompt", PROMPT, *choice)
    (ours,) = texts(ranks, tmp_path, "--model", text_checkpoint, *arguments)
    (theirs,) = texts(ranks, tmp_path, "--model", tmp_path / "export", "--trust-remote-code", *arguments)
    for name in ("text", "prompt_tokens", "new_tokens"):
        assert ours[name] == theirs[name]
    assert ours["cache"]["recurrent"] == theirs["cache"]["recurrent"] > 0


LONG = " ".join([PROMPT, "has a body"] * 3)


def test_a_prompt_read_in_pieces_is_continued_as_one_read_at_once(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    """Here and in the export; below windows of 7 tokens and above them."""
    export_checkpoint(text_checkpoint, tmp_path / "export")
    arguments = ("--prompt", LONG, *GREEDY)
    (whole,) = texts(ranks, tmp_path, "--model", text_checkpoint, *arguments)
    for piece in (5, 11):
        pieces = (*arguments, "--prefill-chunk", piece)
        assert whole["prompt_tokens"] > 2 * piece
        (ours,) = texts(ranks, tmp_path, "--model", text_checkpoint, *pieces)
        exported = ("--model", tmp_path / "export", "--trust-remote-code")
        (theirs,) = texts(ranks, tmp_path, *exported, *pieces)
        assert ours["text"] == theirs["text"] == whole["text"]


def test_a_prompt_beyond_the_declared_positions_is_one_sentence(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    export_checkpoint(text_checkpoint, tmp_path / "export")
    positions = json.loads((tmp_path / "export" / "config.json").read_text())["max_position_embeddings"]
    prompt = " ".join([PROMPT] * positions)
    for model in ([text_checkpoint], [tmp_path / "export", "--trust-remote-code"]):
        (found,) = ranks.run(_refusal, "--model", *map(str, model), "--prompt", prompt, world_size=1)
        assert f"tokens, but the model's rotary positions are declared up to {positions}" in found


def test_mamba_reads_on_beyond_the_declared_positions(ranks: RankPool, tmp_path: Path) -> None:
    recipe = ConversionConfig(mixers=["mamba"])
    import_checkpoint(save_small_source(tmp_path / "source"), tmp_path / "checkpoint", recipe)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export")
    positions = json.loads((tmp_path / "export" / "config.json").read_text())["max_position_embeddings"]
    arguments = ("--prompt", " ".join([LONG] * 10), *GREEDY)
    (ours,) = texts(ranks, tmp_path, "--model", tmp_path / "checkpoint", *arguments)
    exported = ("--model", tmp_path / "export", "--trust-remote-code")
    (theirs,) = texts(ranks, tmp_path, *exported, *arguments, "--prefill-chunk", 99)
    assert ours["prompt_tokens"] > positions and ours["text"] == theirs["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "settings"),
    [(2, ["tp2"]), (2, ["pp2"]), (4, ["tp2_pp2"]), (2, ["context_parallel_size=2"])],
    ids=["TP 2", "PP 2", "TP 2 x PP 2", "CP 2"],
)
def test_ranks_write_what_one_writes(
    size: int, settings: list[str], ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ("--model", text_checkpoint, "--prompt", PROMPT, *SAMPLED)
    (one,) = texts(ranks, tmp_path, *arguments)
    (several,) = texts(ranks, tmp_path, *arguments, "--parallel", *settings, world_size=size)
    assert several["text"] == one["text"]
    assert several["cache"] == one["cache"]


@pytest.mark.slow
def test_experts_drop_nothing_whatever_ranks_hold_them(
    ranks: RankPool, text_checkpoint_76b: Path, tmp_path: Path
) -> None:
    arguments = ("--model", text_checkpoint_76b, "--prompt", PROMPT, *GREEDY)
    (one,) = texts(ranks, tmp_path, *arguments)
    assert one["cache"]["recurrent"] > 0 and one["cache"]["windowed"] > 0
    for settings in (["ep2"], ["pp2"], ["tp2_sp"]):
        (several,) = texts(ranks, tmp_path, *arguments, "--parallel", *settings, world_size=2)
        assert several["text"] == one["text"]


def test_every_prompt_is_continued_as_if_it_were_alone(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    prompts = (PROMPT, "A class")
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = texts(ranks, tmp_path, "--model", text_checkpoint, *given, *SAMPLED)
    alone = [texts(ranks, tmp_path, "--model", text_checkpoint, "--prompt", p, *SAMPLED)[0] for p in prompts]
    assert [each["text"] for each in together] == [each["text"] for each in alone]
    assert all(each["text"].startswith(prompt) for each, prompt in zip(together, prompts, strict=True))


def test_text_ends_at_the_token_that_the_source_names(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    (whole,) = texts(ranks, tmp_path, "--model", text_checkpoint, "--prompt", PROMPT, *GREEDY)
    described = text_checkpoint / "iter_0000000" / "hf_source" / "generation_config.json"
    before = described.read_text() if described.exists() else None
    described.write_text(json.dumps({"eos_token_id": list(range(MODEL_VOCAB_SIZE))}))
    try:
        (short,) = texts(ranks, tmp_path, "--model", text_checkpoint, "--prompt", PROMPT, *GREEDY)
    finally:
        described.unlink() if before is None else described.write_text(before)
    assert whole["new_tokens"] > 1 == short["new_tokens"] and short["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("size", "settings", "sentence"),
    [
        (2, [], "2 ranks are 2 copies of a model"),
        (3, ["tp2"], "the world size 3 is not divisible"),
        (1, ["tensor_model_parallel_size=two"], "tensor_model_parallel_size"),
        (1, ["tp9"], "parallel=tp9 does not exist"),
    ],
)
def test_degrees_that_cannot_work_are_one_sentence(
    size: int, settings: list[str], sentence: str, ranks: RankPool, text_checkpoint: Path
) -> None:
    words = ["--model", str(text_checkpoint), "--prompt", PROMPT, "--parallel", *settings]
    found = ranks.run(_refusal, *words, world_size=size)
    assert sentence in found[0] and found[0].count("\n") == 1
    assert not any(found[1:])  # said once


def _refusal(*arguments: str) -> str:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as exit_:
        generate(*arguments)
    assert exit_.value.code == 2
    return said.getvalue()


def test_a_checkpoint_without_a_tokenizer_asks_for_one(ranks: RankPool, hybrid_checkpoint: Path) -> None:
    (found,) = ranks.run(_refusal, "--model", str(hybrid_checkpoint), "--prompt", "x", world_size=1)
    assert "carries no tokenizer; name the one that its data were made with: --tokenizer" in found
