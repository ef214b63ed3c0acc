"""Fixtures of the conversion tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conversion.hf_models import FAMILIES, SIZES, HFCheckpoint, randomise

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Any]:
    """The client of llama.cpp; where nobody has installed it, it is built from its source package, once.

    `make llama-cpp` and .ci/run build it before; workers that come here while somebody builds wait for it.
    """
    if importlib.util.find_spec("llama_cpp") is not None:
        yield importlib.import_module("llama_cpp")
        return
    folder = f"{sys.prefix}-llama-cpp"
    compilers = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
    if not Path(folder, ".installed").exists() and not all(map(shutil.which, compilers)):
        pytest.skip("llama.cpp is built from source, and there is no compiler for C and C++")
    subprocess.run([str(ROOT / "scripts" / "setup_llama_cpp.sh"), sys.prefix], check=True)
    sys.path.append(folder)
    yield importlib.import_module("llama_cpp")
    sys.path.remove(folder)


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
