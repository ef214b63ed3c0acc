"""Claim: on a GPU our ops are at least as fast as what a user could have called, and a stack as wide as the
7B reaches 45 % MFU at 8k.

All that is to be measured there, in pieces of at most ten minutes. What a piece has measured is a JSON file
in the output folder, whether it came to its end or its minutes did; the same call goes on with what is
missing:

  python benchmarks/gpu.py --list
  python benchmarks/gpu.py --dry-run             (needs no GPU: shapes, commands, estimated memory)
  python benchmarks/gpu.py --piece step-7b-8k    (several may be named)
  python benchmarks/gpu.py --minutes 28          (all that is missing, one by one)
  python benchmarks/gpu.py --report              (tables of what is measured)

Pieces: errors of kernels against the naive forms; kernels beside fla, flash-attn, SDPA and cuBLAS
(gpu_ops.py) at 8k, 32k and 128k; the demo, and its losses on the GPU against those on the CPU (bound 1e-2);
tokens/s, MFU and peak memory of training steps (training_contenders.py) of 135M, 1B and four layers of the
7B, beside the planner's estimate, and at 8k beside transformers; linears and steps of the 7B's width in FP8
(gpu_fp8.py), where the GPU and Transformer Engine have it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_pieces import PIECES, Loan, Results, run_piece, stated_memory  # noqa: E402
from benchmarks.gpu_report import report  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.errors import PlatformError  # noqa: E402
from spikingbrain_train.storage.durable_files import write_text_durably  # noqa: E402

PIECE_MINUTES = 10.0
REPORT_FILE = "report.md"


def machine() -> dict[str, str]:
    """The GPU and the versions that decide how fast it is.

    Raises:
        PlatformError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise PlatformError("torch sees no GPU here; --dry-run shows what would be measured")
    packages = ("megatron-core", "flash-linear-attention", "flash-attn", "transformer-engine", "triton")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    cuda = torch.version.cuda or "none"
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "CUDA": cuda, **versions}


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--output", type=Path, default=Path("outputs/gpu"), help="folder of results (default outputs/gpu)"
    )
    flags.add_argument(
        "--piece", nargs="+", choices=list(PIECES), metavar="NAME", help="measure these (default: all)"
    )
    flags.add_argument(
        "--minutes",
        type=float,
        default=PIECE_MINUTES,
        help=f"of this call; a piece takes at most {PIECE_MINUTES:g} of them (default {PIECE_MINUTES:g})",
    )
    flags.add_argument(
        "--model", type=Path, help="folder of the demo's dense model, where nothing can be downloaded"
    )
    flags.add_argument("--memory-gib", type=float, help="of the GPU of a dry run (default: an H200's)")
    what = flags.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="name the pieces, and what is there of them")
    what.add_argument("--dry-run", action="store_true", help="compose and plan the pieces; needs no GPU")
    what.add_argument(
        "--report", action="store_true", help=f"write {REPORT_FILE} into the folder, and print it"
    )
    return flags


def state(output: Path, name: str) -> str:
    """How much of a piece is measured."""
    results, piece = Results.read(output, name), PIECES[name]
    if not results.missing(piece):
        return "measured"
    return "begun" if results.cells else "to do"


def measure(arguments: argparse.Namespace, names: list[str]) -> int:
    """Measure pieces one by one; 75 where something is left to the next call."""
    found, end = machine(), time.monotonic() + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    whole = True
    for name in names:
        deadline = min(end, time.monotonic() + 60 * PIECE_MINUTES)
        loan = Loan(arguments.output.resolve(), deadline, arguments.model)
        whole &= run_piece(PIECES[name], loan, found)
        if time.monotonic() >= end:
            break
    left = [name for name in names if state(arguments.output, name) != "measured"]
    print(f"the same call goes on with: {', '.join(left)}" if left else "all is measured; see --report")
    return 75 if left or not whole else 0


def main() -> None:
    arguments = parser().parse_args()
    names: list[str] = arguments.piece or list(PIECES)
    with user_errors():
        if arguments.list:
            for name in names:
                print(f"{name:16s} {state(arguments.output, name)}")
        elif arguments.dry_run:
            memory = stated_memory(arguments.memory_gib)
            for name in names:
                print(name, *PIECES[name].describe(memory), sep="\n  ", flush=True)
        elif arguments.report:
            text = report(arguments.output)
            if arguments.output.is_dir():
                write_text_durably(arguments.output / REPORT_FILE, text)
            print(text, end="")
        else:
            sys.exit(measure(arguments, names))


if __name__ == "__main__":
    main()
