"""``spikingbrain-train`` and ``spikingbrain-plan``: a run, and what it would take.

Composes the config, checks it before torch is imported, and hands it to :mod:`spikingbrain_train.training`:
in this process, or in ranks that it starts (`--nproc-per-node`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from spikingbrain_train.commands import ranks
from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

if TYPE_CHECKING:
    from spikingbrain_train.planning.plan_report.report import Maker
    from spikingbrain_train.planning.planner import Plan

_MULTIRUN = ("--multirun", "-m")


def plan() -> None:
    """What a run would take: ``spikingbrain-train ... dry_run=true`` without building anything.

    It takes the arguments of ``spikingbrain-train`` and prints the plan, for which no torch is imported; with
    ``--json`` as plain values, for programs. One rank's share of the model is built, as in a dry run, where
    ``dry_run_rank`` says whose.
    """
    as_json = "--json" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--json"]
    build = not as_json and any(argument.startswith("dry_run_rank=") for argument in sys.argv[1:])
    with user_errors(same_on_all_ranks=True):
        launched = ranks.launcher_of_command_line()
        if _swept(launched, dry_run=True):
            return
        checked = checked_run(launched, ["dry_run=true"])
    if checked is not None:
        _dry_run(checked, build_share=build, as_json=as_json)


def train() -> None:
    """Train one stage of a model, or plan it (``dry_run=true``).

    Raises:
        SystemExit: with the codes of ``user_errors``, and 75 for a run that was asked to stop and has saved.
    """
    with user_errors(same_on_all_ranks=True):
        launched = ranks.launcher_of_command_line()
        if _swept(launched):
            return
        checked = checked_run(launched)
    if checked is None:
        return
    if checked.config.dry_run:
        _dry_run(checked)
    elif launched is not None:
        with user_errors():
            ranks.run_ranks(launched, ["train", *sys.argv[1:]])
    else:
        _run(checked)


def _swept(launched: ranks.Ranks | None, *, dry_run: bool = False) -> bool:
    """Whether the command line asked for several runs, which have then had their turn."""
    words = [word for word in sys.argv[1:] if word not in _MULTIRUN]
    if len(words) == len(sys.argv) - 1:
        return False
    from spikingbrain_train.commands.sweep import sweep

    sweep(words, launched, dry_run=dry_run)
    return True


def checked_run(launched: ranks.Ranks | None, further: Sequence[str] = ()) -> Plan | None:
    """The checked run; None where there is nothing to run, and what was asked for is printed.

    Args:
        launched: the ranks that there will be.
        further: arguments behind those of the command line; they win.
    """
    from spikingbrain_train.config.compose import compose_from_command_line
    from spikingbrain_train.config.load import to_run_config
    from spikingbrain_train.planning.checks import check_run_config
    from spikingbrain_train.planning.planner import launched_world_size, plan_run
    from spikingbrain_train.planning.resume import nothing_left
    from spikingbrain_train.training.callbacks.named import check_named_classes

    composed = compose_from_command_line(further)
    if composed is None:  # --help, --cfg job and the like
        return None
    config = to_run_config(composed)
    with _as_launched(launched) as counted:
        # Where torchrun counts devices, the ranks that the layout needs are as good a guess as any.
        world_size = launched_world_size(config if counted else replace(config, dry_run=True))
    stored = check_run_config(config, world_size)
    check_named_classes(config)
    if stored is not None and (done := nothing_left(config, stored)):
        if _speaks():
            print(done, flush=True)
        return None
    return plan_run(config, world_size)


def _dry_run(checked: Plan, *, build_share: bool = True, as_json: bool = False) -> None:
    """Print the plan, then build one rank's share of the model."""
    if not _speaks():
        return
    with user_errors():
        from spikingbrain_train.planning.plan_report.report import as_values, render

        more = _more_sections(checked)
        text = json.dumps(as_values(checked, more), indent=2) if as_json else render(checked, more=more)
        print(text, flush=True)
        if not build_share:
            return
        ignore_megatron_warnings()
        with activity("importing torch and megatron-core"):
            from spikingbrain_train.training.dry_run import build_share as build
        with activity("building one rank's share of the model"):
            share = build(checked)
        print(f"\n{share.render()}")


def _more_sections(checked: Plan) -> list[Maker]:
    """Of rooms above that of the plans, where a plan asks for them: they need numpy."""
    data = checked.config.data
    if not data.train or not (data.pack_by_domain or data.long_documents.share is not None):
        return []
    from spikingbrain_train.data.packing.section import packing_section

    return [packing_section]


def _run(checked: Plan) -> None:
    """Train in this process."""
    from spikingbrain_train.planning.host_capacity import check_host
    from spikingbrain_train.planning.launch import Launch
    from spikingbrain_train.planning.planner import check_disk_space

    with user_errors():  # a rank's own variables: no other rank may see that they are wrong
        launch = Launch.from_environment()
    with user_errors(same_on_all_ranks=True):
        check_host(checked, launch)
        check_disk_space(checked)
        ignore_megatron_warnings()
        with activity("importing torch and megatron-core", shown=_speaks()):
            from spikingbrain_train.training import trainer
    with user_errors():
        trainer.run(checked.config)


def _speaks() -> bool:
    """Whether this process prints what all ranks know."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _as_launched(launched: ranks.Ranks | None) -> Iterator[bool]:
    """As long as it lasts, this process counts ranks as those that it starts will, if it can."""
    world_size = None if launched is None else launched.world_size()
    if world_size is not None:
        os.environ["WORLD_SIZE"] = str(world_size)
    try:
        yield launched is None or world_size is not None
    finally:
        if world_size is not None:
            del os.environ["WORLD_SIZE"]
