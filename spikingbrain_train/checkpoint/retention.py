"""Which checkpoints of a run stay.

``checkpoint.keep_last`` keeps the newest ``iter_*`` folders, ``checkpoint.keep_every`` some of the others for
good, and the one that counts as newest always stays.
Folders set aside (``iter_*.superseded``), because the run went on from an older one or wrote the same
iteration again, are not counted and never removed: whoever went back may want them. What a killed save left
(``.iter_*.incomplete``) is removed by the next save.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import iteration_folder, iterations, latest_iteration


def prune_checkpoints(
    folder: Path, keep_last: int | None, keep_every: int | None, groups: ProcessGroups
) -> None:
    """Remove all but the ``keep_last`` newest checkpoints of the run, never the one that counts as newest.

    Args:
        folder: checkpoint folder of the run.
        keep_last: how many stay; None keeps all.
        keep_every: iterations that it divides stay, too.
        groups: process groups; only the main process removes.
    """
    if keep_last is None or not groups.is_main_process:
        return
    kept = latest_iteration(folder)
    for iteration in iterations(folder)[:-keep_last]:
        if iteration != kept and not (keep_every and iteration % keep_every == 0):
            shutil.rmtree(iteration_folder(folder, iteration), ignore_errors=True)
