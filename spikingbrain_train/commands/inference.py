"""Commands that run a model without training it: in this process, or in ranks that they start."""

from __future__ import annotations

import sys
from typing import Protocol

from spikingbrain_train.commands import ranks
from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.evaluation.inference_command_line import Elsewhere


class InferenceCommand(Protocol):
    """As those of :mod:`spikingbrain_train.evaluation.inference_command_line`."""

    def __call__(self, *, elsewhere: Elsewhere | None = None) -> None:
        """Read ``sys.argv`` and do it, here or elsewhere."""
        ...


def here_or_on_ranks(name: str, command: InferenceCommand) -> None:
    """Run a command; with ``--nproc-per-node`` on ranks, once its arguments are found good for them.

    Args:
        name: of the command in the table.
        command: what reads ``sys.argv`` less the launcher's flags.
    """
    with user_errors(same_on_all_ranks=True):
        launched = ranks.launcher_of_command_line()
        world_size = None if launched is None else launched.world_size()
    if launched is None:
        command()
        return
    words = [name, *sys.argv[1:]]
    if world_size is None:  # torchrun counts them
        with user_errors():
            ranks.run_ranks(launched, words)
    else:
        command(elsewhere=Elsewhere(world_size, lambda: ranks.run_ranks(launched, words)))
