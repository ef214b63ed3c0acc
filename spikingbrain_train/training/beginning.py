"""What a run says at its beginning: which weights were loaded, what is fresh, and what has changed."""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.resume import StoredRun, changes_since, is_same_topology, nothing_left
from spikingbrain_train.storage.checkpoint_folder import iteration_of, latest_checkpoint
from spikingbrain_train.training.optimizer import learning_rate_at


def started(config: RunConfig) -> str:
    """The line of a run that starts at iteration 0."""
    load = config.checkpoint.load
    if load is None:
        return f"starts from random weights of seed={config.seed}"
    checkpoint = latest_checkpoint(load, "checkpoint.load")
    iteration = iteration_of(checkpoint)
    return (
        f"starts from the weights of {load} at iteration {iteration}; optimizer, schedule and data order "
        "start anew"
    )


def resumed(stored: StoredRun, config: RunConfig, consumed_samples: int, world_size: int) -> list[str]:
    """The lines of a run that goes on: where, what it brings along, and what has changed since.

    Args:
        stored: the run as it was.
        config: the run as it goes on.
        consumed_samples: sequences that it has read.
        world_size: its ranks.
    """
    brought = "weights, optimizer, schedule and position in the data"
    fresh = ""
    if is_same_topology(stored, config, world_size):
        brought = f"{brought.replace(' and ', ', ')} and random generators"
    else:
        fresh = "; random generators start anew, for another layout of ranks"
    lines = [
        f"resumed from {stored.checkpoint} at iteration {stored.iteration} with its {brought} "
        f"({consumed_samples} sequences read){fresh}"
    ]
    changes = changes_since(stored, config, world_size) + _changed_rates(stored, config)
    lines.append(f"changed since the checkpoint: {', '.join(changes) if changes else 'nothing'}")
    if done := nothing_left(config, stored):
        lines.append(done)
    return lines


def _changed_rates(stored: StoredRun, config: RunConfig) -> list[str]:
    """What the changes make of the learning rate of the next step; a longer schedule lifts it, too."""
    step = stored.iteration + 1
    if step > config.stage.train_iters:
        return []
    before, after = (
        learning_rate_at(step, each.optimizer, each.stage.train_iters) for each in (stored.config, config)
    )
    if before == after:
        return []
    return [f"so that the learning rate of step {step} is {after:.3g} instead of {before:.3g}"]
