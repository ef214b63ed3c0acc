"""Threads and clock of benchmarks that time ops on a CPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch


def add_clock(parser: argparse.ArgumentParser) -> None:
    """``--threads`` and ``--clock``."""
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads (default 2)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu with --threads 1 suits a machine that others use",
    )


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    """Set torch's threads to those of :func:`add_clock`; returns a function that tells seconds."""
    torch.set_num_threads(arguments.threads)
    return time.perf_counter if arguments.clock == "wall" else time.process_time
