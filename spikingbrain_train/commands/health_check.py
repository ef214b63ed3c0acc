"""``spikingbrain-health-check``: what a run needs, from its settings, held against its hosts."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from spikingbrain_train.commands import ranks
from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.health.command_line import health_check as check
from spikingbrain_train.health.command_line import health_check_parser
from spikingbrain_train.health.facts import Need
from spikingbrain_train.planning.launch import Launch


def health_check() -> None:
    """Check the hosts of this process's world, or with ``--nproc-per-node`` of the ranks that it starts."""
    with user_errors(same_on_all_ranks=True):
        launched = ranks.launcher_of_command_line()
        parsed = parse_words(sys.argv[1:])
    if launched is not None:
        with user_errors():
            ranks.run_ranks(launched, ["health-check", *sys.argv[1:]])
        return

    def need(launch: Launch) -> Need:
        return need_of_run(parsed.settings, launch)

    check(parsed, need)


def parse_words(words: Sequence[str]) -> argparse.Namespace:
    """The check's own flags; all other words, those of spikingbrain-train with dashes too, in their order."""
    parser = health_check_parser()
    flags = {f"--{name.replace('_', '-')}" for name in vars(parser.parse_args([])) if name != "settings"}
    own: list[str] = []
    settings: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            own.append(word)
        elif flag in flags:
            own += [word] if equals else [word, *itertools.islice(waiting, 1)]
        else:
            settings.append(word)
    return parser.parse_args([*own, "--", *settings])


def need_of_run(settings: list[str], launch: Launch) -> Need:
    """What a run with these settings takes.

    Raises:
        SpikingBrainError: it cannot run as it is, on these ranks.
    """
    if not settings:
        return Need()
    from spikingbrain_train.commands.train import checked_run
    from spikingbrain_train.planning.host_capacity import check_host

    sys.argv[1:] = settings
    plan = checked_run(None)
    if plan is None:  # nothing is left to do
        return Need()
    check_host(plan, launch)
    return Need(
        output_dir=plan.config.output_dir,
        accelerator=plan.config.cluster.accelerator,
        checkpoint_bytes=plan.checkpoint_bytes,
        device_bytes=int(plan.fullest.memory.total),
    )
