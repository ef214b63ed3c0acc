"""A run that two CPU ranks finish in seconds, or that goes on for as long as a test wants."""

from __future__ import annotations

from pathlib import Path

PACE = 0.25
"""Seconds of a step at least: time for Slurm to act in the middle of a run, on a fast machine too."""
SAVE_INTERVAL = 5


def small_settings(text: Path, output: Path | str, hurry: Path, steps: int) -> tuple[str, ...]:
    """Settings of a training.

    Args:
        text: prefix of an indexed dataset.
        output: folder of the run.
        hurry: a file; once it is there, steps take the time that they need.
        steps: steps in all.
    """
    pace = f"{{seconds: {PACE}, until: '{hurry}'}}"
    return (
        *("model=tiny_hybrid", "model.vocab_size=130", "stage=cpt", "parallel=single"),
        *(f"data.train=[{text}]", f"stage.train_iters={steps}", "stage.seq_length=64"),
        *("stage.global_batch_size=2", "stage.micro_batch_size=1", "logging.log_interval=1"),
        *("logging.tensorboard=false", "precision=fp32", f"checkpoint.save_interval={SAVE_INTERVAL}"),
        *("checkpoint.keep_last=2", "cluster=cpu", "cluster.peak_tflops=0.1", f"output_dir={output}"),
        f"callbacks=[{{path: tests.slurm.pace.Pace, settings: {pace}}}]",
    )
