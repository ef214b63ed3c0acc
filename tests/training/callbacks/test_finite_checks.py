"""What a run that is no longer finite advises."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.training.callbacks.finite_checks import advice


def test_no_learning_rate_is_blamed_before_the_first_update(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), precision=Precision.bf16)
    config.checkpoint.load = "converted"
    sentence = advice(config, steps_done=0)
    assert "optimizer." not in sentence
    assert "checkpoint.load (now converted), or compute in precision=fp32 (now bf16)" in sentence
    config.precision, config.checkpoint.load = Precision.fp32, None
    assert advice(config, steps_done=0).endswith("yet: name weights as checkpoint.load.")


def test_the_learning_rate_is_named_after_an_update(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path))
    sentence = advice(config, steps_done=1)
    assert f"lower optimizer.lr (now {config.optimizer.lr})" in sentence and "start again" in sentence
