"""``spikingbrain-train`` and ``spikingbrain-plan``: a run, and what it would take.

Composes the config, checks it before torch is imported, and hands it to `spikingbrain_train.training.run`.
"""

from __future__ import annotations

import os
import sys

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings


def plan() -> None:
    """What a run would take: ``spikingbrain-train ... dry_run=true`` without building anything.

    It takes the arguments of ``spikingbrain-train`` and prints the plan, for which no torch is imported. One
    rank's share of the model is built, as in a dry run, where ``dry_run_rank`` says whose.
    """
    build = any(argument.startswith("dry_run_rank=") for argument in sys.argv[1:])
    train(further=["dry_run=true"], build_share=build)


def train(further: list[str] | None = None, *, build_share: bool = True) -> None:
    """Train one stage of a model, or plan it.

    Args:
        further: arguments behind those of the command line; they win.
        build_share: a dry run builds one rank's share of the model.

    Raises:
        SystemExit: what :func:`~spikingbrain_train.config.command_line.user_errors` makes of an error.
    """
    with user_errors(same_on_all_ranks=True):
        from spikingbrain_train.config.compose import compose_from_command_line
        from spikingbrain_train.config.load import to_run_config
        from spikingbrain_train.planning.checks import check_run_config
        from spikingbrain_train.planning.host_capacity import check_host
        from spikingbrain_train.planning.launch import Launch
        from spikingbrain_train.planning.plan_report.report import render
        from spikingbrain_train.planning.planner import check_disk_space, launched_world_size, plan_run
        from spikingbrain_train.planning.resume import nothing_left
        from spikingbrain_train.training.callbacks.outside import check_callbacks

        composed = compose_from_command_line(further or [])
        if composed is None:  # --help, --cfg job and the like have printed what they were asked for
            return
        config = to_run_config(composed)
        world_size = launched_world_size(config)
        stored = check_run_config(config, world_size)
        check_callbacks(config)
        if stored is not None and (done := nothing_left(config, stored)):
            if os.environ.get("RANK", "0") == "0":
                print(done, flush=True)
            return
        plan = plan_run(config, world_size)
        if config.dry_run:
            if os.environ.get("RANK", "0") != "0":
                return
            print(render(plan), flush=True)
            if not build_share:
                return

    if not config.dry_run:
        with user_errors():  # a rank's own variables: no other rank may see that they are wrong
            launch = Launch.from_environment()
        with user_errors(same_on_all_ranks=True):
            check_host(plan, launch)
            check_disk_space(plan)

    ignore_megatron_warnings()
    with user_errors():
        if config.dry_run:
            with activity("importing torch and megatron-core"):
                from spikingbrain_train.training.dry_run import build_share as build
            with activity("building one rank's share of the model"):
                share = build(plan)
            print(f"\n{share.render()}")
        else:
            from spikingbrain_train.training import run

            run(config)
