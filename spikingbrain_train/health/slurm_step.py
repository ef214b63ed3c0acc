"""Ranks that srun starts itself, one a task: who they are, as a launcher's variables would say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from spikingbrain_train.errors import PlatformError


def launch_of_step(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """RANK, WORLD_SIZE ... for a task of srun; empty where a launcher has set them, or there is no step.

    Ranks are counted node by node, as torchrun counts them, however srun deals its tasks out to the nodes
    (``--distribution``): by the task's node and its place there.

    Args:
        environment: variables; None for this process's own.

    Raises:
        PlatformError: the nodes have different numbers of tasks, or Slurm does not say where this one stands.
    """
    known = os.environ if environment is None else environment
    tasks = known.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in known or "SLURM_PROCID" not in known or tasks == "1":
        return {}
    local, place = _tasks_per_node(known), known.get("SLURM_LOCALID", "")
    node = known.get("SLURM_NODEID", "")
    if not (node.isdecimal() and place.isdecimal()):
        raise PlatformError(
            f"SLURM_NODEID={node} and SLURM_LOCALID={place} do not say which rank this task is; "
            "start the ranks with srun, or with torchrun"
        )
    hosts = hosts_of_job(known)
    return {
        "RANK": str(int(node) * local + int(place)),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": place,
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": known.get("MASTER_ADDR") or (hosts[0] if hosts else ""),
        # As launch.sh chooses it.
        "MASTER_PORT": known.get("MASTER_PORT") or str(15000 + int(known.get("SLURM_JOB_ID", "0")) % 15000),
    }


def _tasks_per_node(known: Mapping[str, str]) -> int:
    """Tasks of the step on each node. Raises PlatformError where they are not as many everywhere."""
    tasks, nodes = known["SLURM_STEP_NUM_TASKS"], known.get("SLURM_STEP_NUM_NODES", "1")
    told = known.get("SLURM_STEP_TASKS_PER_NODE", "")  # 8(x4), or 8(x3),4
    numbers = {each.partition("(")[0] for each in told.split(",") if each}
    if len(numbers) > 1 or int(tasks) % int(nodes):
        raise PlatformError(
            f"srun has started {tasks} tasks on {nodes} nodes ({told or 'not as many on each'}), but a run "
            "has as many ranks on each; give it --ntasks-per-node"
        )
    return int(tasks) // int(nodes)


def hosts_of_job(environment: Mapping[str, str] | None = None) -> list[str]:
    """Names of the nodes of this Slurm step or job, in its order; empty where Slurm does not say."""
    known = os.environ if environment is None else environment
    nodes = known.get("SLURM_STEP_NODELIST") or known.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        found = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.split() if found.returncode == 0 else []
