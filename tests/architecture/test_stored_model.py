"""A checkpoint whose model has a kind that is not known is refused with the file that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    model = ModelConfig(**SIZES, mixers=["gla", "full"])
    save_config(model, tmp_path / MODEL_CONFIG_FILE)
    assert read_stored_model(tmp_path) == model


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        ({"mixers": ["gla", "sva"]}, "names sva, which is no mixer; did you mean swa?"),
        ({"feed_forwards": ["mow"]}, "names mow, which is no feed-forward; did you mean moe?"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_file(
    tmp_path: Path, kinds: dict[str, list[str]], sentence: str
) -> None:
    save_config(ModelConfig(**SIZES, **kinds), tmp_path / MODEL_CONFIG_FILE)
    with pytest.raises(CheckpointError) as refusal:
        read_stored_model(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / MODEL_CONFIG_FILE}: model.") and sentence in str(
        refusal.value
    )
