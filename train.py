"""Train one stage of a model: `python train.py --help`.

Composes the config, checks it before torch is imported, and hands it to `spikingbrain_train.training.run`.
"""

from __future__ import annotations

import os

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings


def main() -> None:
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

        composed = compose_from_command_line()
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
                from spikingbrain_train.training.dry_run import build_share
            with activity("building one rank's share of the model"):
                share = build_share(plan)
            print(f"\n{share.render()}")
        else:
            from spikingbrain_train.training import run

            run(config)


# dist_checkpointing starts its writers with "spawn", which imports this file again in each of them.
if __name__ == "__main__":
    main()
