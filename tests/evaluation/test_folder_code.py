"""One process at a time has transformers copy the code of an export to where all import it from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from filelock import FileLock, Timeout
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.evaluation.folder_code import LOCK_FILE
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from tests.small_source import save_small_source

LOCK = Path(HF_MODULES_CACHE) / LOCK_FILE


def test_nobody_else_copies_or_imports_while_code_is_copied(tmp_path: Path) -> None:
    import_checkpoint(save_small_source(tmp_path / "source"), tmp_path / "hybrid", ConversionConfig())
    export = tmp_path / "export_of_this_test"  # a name that no other test's code has
    export_checkpoint(tmp_path / "hybrid", export)
    copied = []

    def copy_while_others_wait(source: Path, target: Path, **_: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(LOCK, is_singleton=False).acquire(timeout=0)
        copied.append(Path(target).name)
        Path(target).write_bytes(Path(source).read_bytes())

    with mock.patch.object(shutil, "copyfile", copy_while_others_wait):
        load_causal_lm(export, trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu"))
    assert set(copied) == {path.name for path in export.glob("*.py")}
    with FileLock(LOCK, is_singleton=False).acquire(timeout=0):
        pass
