"""What a run hands from checkpoint to checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from spikingbrain_train.checkpoint import run_checkpoints
from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints
from spikingbrain_train.config.run import CheckpointConfig, RunConfig
from spikingbrain_train.storage.checkpoint_folder import iteration_folder, set_latest_iteration


def _checkpoint(folder: Path, iteration: int) -> Path:
    checkpoint = iteration_folder(folder, iteration)
    (checkpoint / "hf_source").mkdir(parents=True)
    for name in ("model_config.yaml", ".metadata"):
        (checkpoint / name).touch()
    set_latest_iteration(folder, iteration)
    return checkpoint


def test_a_run_whose_checkpoints_are_archived_while_it_trains_goes_on_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[Path | None] = []

    class Save:
        """Written at once."""

        @classmethod
        def begin(cls, folder, state, beside, groups, copies):
            sources.append(beside.hf_source)
            written = _checkpoint(folder, state.iteration)
            return SimpleNamespace(advance=lambda: written)

    monkeypatch.setattr(run_checkpoints, "PendingSave", Save)
    loaded, own, said = tmp_path / "dense", tmp_path / "run" / "checkpoints", list[str]()
    _checkpoint(loaded, 0)
    config = RunConfig(output_dir=str(tmp_path / "run"), checkpoint=CheckpointConfig(load=str(loaded)))
    checkpoints = RunCheckpoints(config, SimpleNamespace(is_main_process=True), said.append)

    def step(iteration: int) -> Path | None:
        checkpoints.begin(SimpleNamespace(iteration=iteration), record=None)
        checkpoints.wait()
        return sources[-1]

    assert step(2) == iteration_folder(loaded, 0) / "hf_source"
    assert step(4) == iteration_folder(own, 2) / "hf_source"
    shutil.rmtree(iteration_folder(own, 4))
    assert step(6) == iteration_folder(own, 2) / "hf_source"
    for folder in (iteration_folder(own, 2), iteration_folder(own, 6)):
        shutil.rmtree(folder)
    assert step(8) == iteration_folder(loaded, 0) / "hf_source"
    assert not said
    shutil.rmtree(loaded)
    shutil.rmtree(iteration_folder(own, 8))
    assert step(10) is None
    assert len(said) == 1 and "iteration 10 is saved without the tokenizer" in said[0]
