"""An allocation of Slurm as a batch script sees it: stand-ins for srun, scontrol, Python and Apptainer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "scripts" / "slurm"

# Runs what srun was given once per node, as srun would, and hands SIGUSR1 on to all of it.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/srun"
while [ "$1" != bash ]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do
    while wait "$task"; code=$?; kill -0 "$task" 2> /dev/null; do :; done
    [ "$code" = 0 ] || worst=$code
done
exit "${worst:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$1 $2" >> "$RECORD/scontrol_calls"
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else
    (cd "$RECORD" && ls -d saved* 2> /dev/null) > "$RECORD/.saved"
    mv "$RECORD/.saved" "$RECORD/saved_when_requeued"
    printf '%s\\n' "$@" > "$RECORD/scontrol"
fi
"""
PYTHON = """#!/usr/bin/env bash
if [ "$3" = health-check ]; then
    printf '%s\\n' "$@" > "$RECORD/check$RANK"
    env > "$RECORD/check_env$RANK"
    [ "$RANK" != "${UNFIT:-}" ] || exit 2
    exit 0
fi
printf '%s\\n' "$@" > "$RECORD/torchrun$PET_NODE_RANK"
env > "$RECORD/env$PET_NODE_RANK"
[ -z "$TRAINER" ] || exec "$TRAINER_PYTHON" "$TRAINER"
exit "${EXIT_CODE:-0}"
"""
APPTAINER = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/apptainer$PET_NODE_RANK"
while [ "${1##*.}" != sif ]; do shift; done
shift
exec "$@"
"""


class Allocation:
    """An allocation of two nodes with eight GPUs each, as Slurm describes it to a batch script."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record"
        programs = folder / "bin"
        self.record.mkdir()
        programs.mkdir()
        for name, text in {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "python": PYTHON,
            "apptainer": APPTAINER,
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.log_dir = folder / "logs"
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "PYTHON": str(programs / "python"),
            "LOG_DIR": str(self.log_dir),
            "SLURM_JOB_ID": "31007",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "HEALTH_CHECK": "no",
        }

    def command(self, *arguments: str, script: str = "launch.sh") -> list[str]:
        return ["bash", str(SLURM / script), *arguments]

    def run(
        self, *arguments: str, script: str = "launch.sh", **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in {**self.environment, **variables}.items() if v is not None}
        command = self.command(*arguments, script=script)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)

    def called(self, name: str) -> list[str]:
        """Arguments of the last call of a stand-in."""
        return (self.record / name).read_text().splitlines()
