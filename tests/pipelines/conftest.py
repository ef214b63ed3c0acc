"""Where published pipelines are planned."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What planning looks for: a source's settings, and tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text('{"hidden_act": "silu", "max_position_embeddings": 8192}')
    (tmp_path / "text.jsonl").touch()
    return tmp_path
