"""Ranks that srun starts itself, one a task: who they are, as a launcher's variables would say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping


def launch_of_step(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """RANK, WORLD_SIZE ... for a task of srun; empty where a launcher has set them, or there is no step.

    Args:
        environment: variables; None for this process's own.
    """
    known = os.environ if environment is None else environment
    tasks = known.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in known or "SLURM_PROCID" not in known or tasks == "1":
        return {}
    nodes = int(known.get("SLURM_STEP_NUM_NODES", "1"))
    hosts = hosts_of_job(known)
    return {
        "RANK": known["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": known.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(int(tasks) // nodes),
        "MASTER_ADDR": known.get("MASTER_ADDR") or (hosts[0] if hosts else ""),
        # As launch.sh chooses it.
        "MASTER_PORT": known.get("MASTER_PORT") or str(15000 + int(known.get("SLURM_JOB_ID", "0")) % 15000),
    }


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
