"""The small hybrid of the tests of configs, checks and plans, and checkpoint folders without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig


def small_model(**changes: Any) -> ModelConfig:
    """Four layers, linear attention and windows in turn; ``changes`` replace fields."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=512,
        max_position_embeddings=1024,
    )
    return replace(model, **changes)


def write_checkpoint(
    folder: Path, model: ModelConfig, iteration: int = 0, run: RunConfig | None = None
) -> str:
    """What a checkpoint folder holds besides weights; of a training run if there is one.

    Returns:
        ``folder``, as settings name it.
    """
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    save_config(model, checkpoint / "model_config.yaml")
    if run is not None:
        save_config(run, checkpoint / "run_config.yaml")
    (checkpoint / ".metadata").touch()
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return str(folder)
