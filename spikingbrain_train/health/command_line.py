"""Arguments of ``spikingbrain-health-check``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from spikingbrain_train.config.command_line import USER_ERROR, command_parser, user_errors
from spikingbrain_train.health.facts import Need
from spikingbrain_train.health.findings import GB, Limits
from spikingbrain_train.health.slurm_step import hosts_of_job, launch_of_step
from spikingbrain_train.planning.launch import Launch

_DESCRIPTION = """\
See whether the hosts of a run are fit for it, before it starts: GPUs, free memory, clocks, free disk,
permission to write, versions and commit, bandwidth between ranks. Start it as the run, on all of its ranks.
It prints a line a host and a sentence for whatever is out of line, and ends with exit code 2 on every rank
then; a rank that does not come is named. The jobs of scripts/slurm begin with it.
"""

_EXAMPLES = """\
examples:
  # ranks on this machine
  spikingbrain-health-check --nproc-per-node 2 output_dir=outputs/mine

  # what the settings of a run need, as srun starts its ranks
  srun --nodes=4 --ntasks-per-node=8 spikingbrain-health-check experiment=spikingbrain_7b_8k

  # the same under torchrun, on each node
  torchrun --nnodes=4 --nproc-per-node=8 ... -m spikingbrain_train health-check --min-bandwidth 40
"""


def health_check_parser() -> argparse.ArgumentParser:
    """The flags of ``spikingbrain-health-check``."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="name=value",
        help="of the run, as spikingbrain-train takes them: its layout, memory and checkpoints are held "
        "against what is there. Without them output_dir is the current folder",
    )
    parser.add_argument(
        "--timeout", type=float, default=180.0, metavar="SECONDS", help="to wait for a rank (default: 180)"
    )
    parser.add_argument(
        "--max-clock-skew", type=float, default=2.0, metavar="SECONDS", help="between hosts (default: 2)"
    )
    parser.add_argument(
        "--slow-factor",
        type=float,
        default=2.0,
        metavar="FACTOR",
        help="name hosts that exchange tensors so many times slower than the median (default: 2)",
    )
    parser.add_argument(
        "--min-bandwidth",
        type=float,
        metavar="GB/S",
        help="that the all-reduce over all ranks has to reach (default: any)",
    )
    return parser


def health_check(parsed: argparse.Namespace, need_of_run: Callable[[Launch], Need]) -> None:
    """Run the check on this rank and end with exit code 2 where something is out of line.

    Args:
        parsed: of :func:`health_check_parser`.
        need_of_run: on rank 0, what the settings ask for.
    """
    started = time.monotonic()
    with user_errors():
        for name in ("timeout", "max_clock_skew", "slow_factor", "min_bandwidth"):
            _check_positive(name, getattr(parsed, name))
        os.environ.update(launch_of_step())
        launch = Launch.from_environment()
        from spikingbrain_train.health.check import Outcome, check_health

        least = None if parsed.min_bandwidth is None else parsed.min_bandwidth * GB
        limits = Limits(parsed.max_clock_skew, parsed.slow_factor, least)
        hosts = hosts_of_job() if launch.rank == 0 else []

        def report(outcome: Outcome) -> None:
            _report(outcome.table, outcome.sentences, time.monotonic() - started)

        outcome = check_health(launch, lambda: need_of_run(launch), limits, parsed.timeout, hosts, report)
    code = USER_ERROR if outcome.sentences else 0
    if outcome.stuck:
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def _check_positive(name: str, value: float | None) -> None:
    from spikingbrain_train.errors import ConfigurationError

    if value is not None and not value > 0:
        raise ConfigurationError(f"--{name.replace('_', '-')} is {value:g}; give a number above 0")


def _report(table: str, sentences: Sequence[str], seconds: float) -> None:
    if table:
        print(table, flush=True)
    if not sentences:
        print(f"health check: all in line, after {seconds:.1f} s", flush=True)
    for sentence in sentences:
        sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()
