"""Every kind of rotary scaling computes what transformers computes, within and beyond the original context.

Bound of every comparison: 2e-4 on float32 logits of order 1-10, as in test_logits.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.rope_scaling import RopeType
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import TOKENS, load_megatron_model
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE = 2e-4
ORIGINAL, DECLARED = 24, 96
LENGTHS = (ORIGINAL - 5, ORIGINAL, ORIGINAL + 1, TOKENS.shape[1])
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 4.0},
    "llama3": {
        **{"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        **{"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    },
}


def logits_and_texts(
    groups: ProcessGroups, folders: list[Path]
) -> list[tuple[list[torch.Tensor], list[list[int]]]]:
    """Of every checkpoint: logits of as many of TOKENS as LENGTHS say, and a text of each prompt."""
    return [_logits_and_texts(groups, folder) for folder in folders]


def _logits_and_texts(groups: ProcessGroups, folder: Path) -> tuple[list[torch.Tensor], list[list[int]]]:
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    model = load_megatron_model(groups, folder)
    with torch.no_grad():
        logits = [model(TOKENS[:, :length])[..., : model.model_config.vocab_size] for length in LENGTHS]
    decoder, texts = IncrementalDecoder(model), []
    for prompt in PROMPTS:
        decoder.begin()
        read, text = torch.tensor([prompt]), []
        for _ in range(NEW_TOKENS):
            found = decoder.read(read)
            assert found is not None
            read = found.argmax(-1, keepdim=True)
            text.append(read.item())
        texts.append(text)
    decoder.release()
    return logits, texts


PROMPTS, NEW_TOKENS = [TOKENS[0, :9].tolist(), TOKENS[1, : ORIGINAL - 2].tolist()], 12
"""The second text grows out of the original context."""


@pytest.mark.parametrize("kind", ROPES)
def test_models_and_exports_compute_what_transformers_does(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, kind: str
) -> None:
    declared = ORIGINAL if kind == "dynamic" else DECLARED
    rope = ROPES[kind] | {"rope_type": kind, "rope_theta": 1000.0}
    source, _ = hf_checkpoint("llama", rope_parameters=rope, max_position_embeddings=declared)
    import_checkpoint(source, tmp_path / "dense")
    stored = load_model_config(tmp_path / "dense/iter_0000000/model_config.yaml")
    assert stored.rope_scaling.rope_type is RopeType[kind]
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    recipe.gla.init_gate_std, recipe.gla.rotary = 1.0, True
    import_checkpoint(source, tmp_path / "hybrid", recipe)
    report = export_checkpoint(tmp_path / "hybrid", tmp_path / "export")
    assert "rotary scaling" in " ".join(report.notes)

    checkpoints = {"dense": source, "hybrid": tmp_path / "export"}
    (computed,) = ranks.run(
        logits_and_texts,
        [tmp_path / checkpoint for checkpoint in checkpoints],
        world_size=1,
        parallel=ParallelConfig(),
    )
    for (checkpoint, folder), (logits, texts) in zip(checkpoints.items(), computed, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            for length, ours in zip(LENGTHS, logits, strict=True):
                theirs = model.eval()(TOKENS[:, :length]).logits
                assert theirs.std() > 0.1
                assert (ours - theirs).abs().max() <= TOLERANCE, (checkpoint, length)
        # transformers takes the length of the longest text of a batch for all: one by one for its own.
        for prompt, text in zip(PROMPTS, texts, strict=True):
            found = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
            assert found[0, len(prompt) :].tolist() == text, checkpoint
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    found = model.generate(
        padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    assert found[:, longest:].tolist() == texts

    # Both formats give the same model back.
    export_checkpoint(tmp_path / "dense", tmp_path / "dense_export")
    written = json.loads((tmp_path / "dense_export/config.json").read_text())
    assert written["rope_parameters"] == json.loads((source / "config.json").read_text())["rope_parameters"]
    for folder, checkpoint in (("dense_export", "dense"), ("export", "hybrid")):
        import_checkpoint(tmp_path / folder, tmp_path / "again" / folder)
        again = load_model_config(tmp_path / "again" / folder / "iter_0000000/model_config.yaml")
        before = load_model_config(tmp_path / checkpoint / "iter_0000000/model_config.yaml")
        assert again.rope_scaling == before.rope_scaling
