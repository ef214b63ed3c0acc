"""Exports of models of known weights with a real tokenizer, and what both commands have to say of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.data.gpt_dataset import open_valid_dataset
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.evaluation.command_line import evaluate
from spikingbrain_train.evaluation.generate_command_line import generate
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
)
from tests.distributed.gradients import model_of_known_weights
from tests.distributed.pool import RankPool
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

SEQ_LENGTH, WINDOWS, NEW_TOKENS = 40, 2, 8
PROMPT = "The for statement"


@dataclass(frozen=True)
class Text:
    """A folder with a tokenizer, and held-out text in its tokens."""

    source: Path
    prefix: str


def save_text(folder: Path) -> Text:
    """Tokenize a text with a small tokenizer of its own."""
    source = save_small_source(folder / "source")
    (folder / "held_out.txt").write_text("The for statement is used to iterate over the elements. " * 9)
    preprocess(PreprocessOptions([str(folder / "held_out.txt")], str(folder / "text"), str(source)))
    return Text(source, str(folder / "text"))


def check_both_commands(
    ranks: RankPool,
    folder: Path,
    network: ModelConfig,
    text: Text,
    *,
    format_name: str | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Export a model; spikingbrain-evaluate and -generate give what the Megatron model gives.

    Returns:
        The export.
    """
    network = replace(network, vocab_size=MODEL_VOCAB_SIZE)
    dataset, tokenizer = (
        open_valid_dataset([text.prefix], SEQ_LENGTH),
        AutoTokenizer.from_pretrained(text.source),
    )
    windows = torch.stack([dataset[index]["tokens"] for index in range(WINDOWS)])
    labels = torch.stack([dataset[index]["labels"] for index in range(WINDOWS)])
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    arguments = (network, folder / "megatron", text.source, windows, labels, prompt)
    ((loss, tokens),) = ranks.run(_save_and_measure, *arguments, world_size=1, parallel=ParallelConfig())

    export = folder / f"export_{folder.name}"
    export_checkpoint(folder / "megatron", export, format_name=format_name)
    common = ["--model", str(export), "--trust-remote-code", "--dtype", "float32", "--device", "cpu"]
    data = ["--data", text.prefix, "--seq-length", str(SEQ_LENGTH), "--max-windows", str(WINDOWS)]
    evaluate([*common, *data, "--output", str(folder / "evaluated.json")])
    measured = json.loads((folder / "evaluated.json").read_text())
    assert abs(measured["cross_entropy"] - loss) <= tolerance

    wanted = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(NEW_TOKENS)]
    generate([*common, *wanted, "--output", str(folder / "generated.json")])
    written = json.loads((folder / "generated.json").read_text())
    assert written["text"] == tokenizer.decode([*prompt[0].tolist(), *tokens], skip_special_tokens=True)
    return export


def _save_and_measure(
    groups: ProcessGroups,
    model: ModelConfig,
    target: Path,
    source: Path,
    windows: Tensor,
    labels: Tensor,
    prompt: Tensor,
) -> tuple[float, list[int]]:
    """Save a model of known weights to ``target``; its mean loss on windows, and its greedy text."""
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder
    from tests.checkpoint.shards import save_shards
    from tests.conversion.megatron_models import _sharded_weights

    built = model_of_known_weights(groups, model, ParallelConfig()).eval()
    checkpoint = target / "iter_0000003"
    checkpoint.mkdir(parents=True)
    save_config(model, checkpoint / MODEL_CONFIG_FILE)
    save_shards({"model": _sharded_weights(built), "iteration": 3}, checkpoint)
    shutil.copytree(source, checkpoint / HF_SOURCE_FOLDER)
    described = checkpoint / HF_SOURCE_FOLDER / "config.json"
    config = json.loads(described.read_text()) | {"num_hidden_layers": model.num_layers}
    config.pop("layer_types", None)  # of as many layers as the source has
    described.write_text(json.dumps(config))
    (target / LATEST_ITERATION_FILE).write_text("3")
    with torch.no_grad():
        logits = built(windows)[..., : model.vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()).item()
    decoder, tokens = IncrementalDecoder(built), []
    decoder.begin()
    read = prompt
    for _ in range(NEW_TOKENS):
        read = decoder.read(read).argmax(-1, keepdim=True)
        tokens.append(int(read))
        if tokens[-1] == 0:  # the end of a text
            break
    return loss, tokens
