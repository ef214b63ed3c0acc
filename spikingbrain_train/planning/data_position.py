"""Where a run is in its data, and how many sequences it reads in all, also after another global batch.

Samples are a pure function of their number, so a position is one number, whatever the ranks and the global
batch are. Without torch.
"""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import SamplesRead
from spikingbrain_train.planning.resume import run_to_resume


def position_of(config: RunConfig) -> SamplesRead:
    """Where a run begins in its data: at 0, or where the checkpoint that it goes on from ends.

    Raises:
        CheckpointError: what lies in its output_dir is damaged.
    """
    stored = run_to_resume(config)
    return SamplesRead() if stored is None else SamplesRead(stored.iteration, stored.consumed_samples)


def samples_of(config: RunConfig) -> int:
    """Sequences that the whole stage reads, those before a resume included. Raises CheckpointError."""
    position, stage = position_of(config), config.stage
    return position.at(stage.train_iters, stage.batch_sizes) if position.iteration else stage.samples
