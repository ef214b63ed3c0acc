"""A run's own folder of checkpoints: where it goes on from, what it adds there, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spikingbrain_train.checkpoint.loading import resume
from spikingbrain_train.checkpoint.retention import prune_checkpoints
from spikingbrain_train.checkpoint.saving import FilesBesideWeights, save_checkpoint
from spikingbrain_train.checkpoint.sharded_state import RunState
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RunRecord
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.parallel.agreement import on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.file_checks import iteration_to_resume
from spikingbrain_train.planning.resume import StoredRun
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    iteration_folder,
    iterations,
    latest_checkpoint,
    latest_iteration,
    set_aside_newer,
    set_latest_iteration,
)


class RunCheckpoints:
    """The checkpoints in a run's output_dir. All ranks call every method together.

    Args:
        config: the run; its precision is settled.
        groups: process groups.
        say: writes a line for the user; called on the main process only.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups, say: Callable[[str], None]) -> None:
        self.config = config
        self.groups = groups
        self.folder = Path(config.output_dir) / CHECKPOINT_FOLDER
        self._say = say
        self._loaded = _loaded_checkpoint(config)
        self._has_source = self._hf_source() is not None

    def are_resumed(self) -> bool:
        """Whether the run goes on from one of them. Points to the newest again where that word was lost.

        Raises:
            SpikingBrainError: what lies there and checkpoint.resume do not go together.
        """
        newest = iteration_to_resume(self.config)

        def restore_lost_tracker() -> None:
            if newest is not None and latest_iteration(self.folder) is None:
                self._say(
                    f"{self.folder} has lost its {LATEST_ITERATION_FILE}; going on from iteration {newest}, "
                    "the newest complete one"
                )
                set_latest_iteration(self.folder, newest)

        on_main_process(restore_lost_tracker, self.groups)
        return newest is not None

    def resume(self, state: RunState) -> StoredRun:
        """Fill ``state`` from the newest, and set aside those beyond it, which a user has gone back from.

        Returns:
            The run as it was when it wrote that checkpoint.

        Raises:
            CheckpointError: it is damaged, or of a run that this one cannot go on with.
        """
        stored = resume(self.folder, state, self.config, self.groups)

        def set_aside() -> None:
            for folder in set_aside_newer(self.folder, state.iteration):
                self._say(f"set aside a checkpoint newer than iteration {state.iteration}: {folder}")

        on_main_process(set_aside, self.groups)
        return stored

    def save(self, state: RunState, record: RunRecord) -> Path:
        """Write one of ``state``, and remove those that checkpoint.keep_last does not keep.

        Returns:
            Its folder.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are untouched.
            NumericalError: a number in it is NaN or infinite; nothing is written.
        """
        source = self._hf_source()
        if source is None and self._has_source and self.groups.is_main_process:
            self._say(
                f"iteration {state.iteration} is saved without the tokenizer for its export: no checkpoint "
                f"in {self.folder} or checkpoint.load has a {HF_SOURCE_FOLDER} any more"
            )
        self._has_source = source is not None
        beside = FilesBesideWeights(self.config, record, source)
        folder = save_checkpoint(self.folder, state, beside, self.groups)
        prune_checkpoints(self.folder, self.config.checkpoint.keep_last, self.groups)
        return folder

    def _hf_source(self) -> Path | None:
        """The source's configuration and tokenizer, handed from checkpoint to checkpoint for the export.

        From the newest checkpoint that still has them: a user may archive any of them while the run trains.
        """
        own = [iteration_folder(self.folder, iteration) for iteration in reversed(iterations(self.folder))]
        loaded = [] if self._loaded is None else [self._loaded]
        return next((f for each in own + loaded if (f := each / HF_SOURCE_FOLDER).is_dir()), None)


def _loaded_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that a run starts from, None where it has none or, resumed, has it no more."""
    try:
        load = config.checkpoint.load
        return None if load is None else latest_checkpoint(load, "checkpoint.load")
    except CheckpointError:
        return None
