"""An export in the middle of quantization annealing says how far the weights were."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config, save_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import (
    QuantizationAnnealingConfig,
    StageConfig,
    SubNormAnnealingConfig,
)
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, RUN_CONFIG_FILE
from spikingbrain_train.storage.checkpoint_paths import LATEST_ITERATION_FILE
from tests.small_source import save_small_source


@pytest.mark.parametrize(
    ("iteration", "anneal_iters", "words"),
    [(3, 10, "after 3 of 10 steps: its weights were 30% of the way"), (10, 10, None), (3, 0, None)],
)
def test_the_share_that_was_reached_is_named(
    iteration: int, anneal_iters: int, words: str | None, tmp_path: Path
) -> None:
    source = save_small_source(tmp_path / "source")
    import_checkpoint(source, tmp_path / "run", ConversionConfig(mixers=["gla", "swa"], sliding_window=7))
    checkpoint = (tmp_path / "run/iter_0000000").rename(tmp_path / f"run/iter_{iteration:07d}")
    (tmp_path / "run" / LATEST_ITERATION_FILE).write_text(str(iteration))
    written = OmegaConf.load(checkpoint / MODEL_CONFIG_FILE)
    written.quantization = {"projections": ["qkv", "mlp_fc1"], "group_size": 16}
    OmegaConf.save(written, checkpoint / MODEL_CONFIG_FILE)
    stage = StageConfig(
        train_iters=20,
        seq_length=8,
        global_batch_size=1,
        quantization_annealing=QuantizationAnnealingConfig(anneal_iters),
    )
    model = load_model_config(checkpoint / MODEL_CONFIG_FILE)
    save_config(RunConfig(model=model, stage=stage, output_dir="run"), checkpoint / RUN_CONFIG_FILE)

    def notes(**options: bool) -> list[str]:
        report = export_checkpoint(tmp_path / "run", tmp_path / "out", dry_run=True, **options)
        return [note for note in report.notes if "quantization_annealing" in note]

    found = notes()
    assert (words is None and not found) or (words is not None and len(found) == 1 and words in found[0])
    assert not notes(float_weights=True), "the parameters are what they are"


@pytest.mark.parametrize(("iteration", "words"), [(3, "its sub-norms had come in by 30%"), (10, None)])
def test_sub_norms_on_their_way_are_named(iteration: int, words: str | None, tmp_path: Path) -> None:
    source = save_small_source(tmp_path / "source")
    recipe = ConversionConfig(mixers=["full"], attn_sub_norm=True, ffn_sub_norm=True)
    import_checkpoint(source, tmp_path / "run", recipe)
    checkpoint = (tmp_path / "run/iter_0000000").rename(tmp_path / f"run/iter_{iteration:07d}")
    (tmp_path / "run" / LATEST_ITERATION_FILE).write_text(str(iteration))
    annealing = SubNormAnnealingConfig(10)
    stage = StageConfig(train_iters=20, seq_length=8, global_batch_size=1, sub_norm_annealing=annealing)
    model = load_model_config(checkpoint / MODEL_CONFIG_FILE)
    save_config(RunConfig(model=model, stage=stage, output_dir="run"), checkpoint / RUN_CONFIG_FILE)
    report = export_checkpoint(tmp_path / "run", tmp_path / "out", dry_run=True)
    found = [note for note in report.notes if "sub_norm_annealing" in note]
    assert [words in note for note in found] == ([] if words is None else [True])
