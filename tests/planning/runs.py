"""Plans of composed runs, without files and launchers."""

from __future__ import annotations

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import Plan, launched_world_size, plan_run


def plan_of(*overrides: str) -> Plan:
    """The plan that a dry run with these arguments would print; they may hold several each."""
    arguments = [argument for override in overrides for argument in override.split()]
    config = to_run_config(compose_run([*arguments, "dry_run=true", "checkpoint.load=null"]))
    world_size = launched_world_size(config)
    check_run_config(config, world_size)
    return plan_run(config, world_size)
