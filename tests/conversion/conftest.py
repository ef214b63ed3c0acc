"""Fixtures of the conversion tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conversion.hf_models import FAMILIES, SIZES, HFCheckpoint, randomise


@pytest.fixture
def hf_checkpoint(tmp_path: Path) -> HFCheckpoint:
    """Save a random model of a family; keyword arguments replace sizes. Returns its folder and the model."""

    def make(
        family: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        folder: str = "source",
        **changes: Any,
    ) -> tuple[Path, PreTrainedModel]:
        config_class, model_class, settings = FAMILIES[family]
        model = model_class(config_class(**{**SIZES, **settings, **changes}))
        randomise(model)
        model = model.to(dtype).eval()
        path = tmp_path / folder
        model.save_pretrained(path, max_shard_size=max_shard_size)
        (path / "tokenizer.json").write_text("{}")
        return path, model

    return make
