"""What is said of a model's folder before torch and transformers are there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.model_folder import check_model_folder


def test_a_config_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another user, or a file system that fails; root may read everything, so it is faked."""
    path = tmp_path / "config.json"
    path.write_text("{}")

    def refuse(self: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON .*Permission denied"):
        check_model_folder(tmp_path, trust_remote_code=False)
