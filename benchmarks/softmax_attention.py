"""Claim: blocked attention on CPU costs O(T x window) and beats torch's SDPA, also where the window covers
everything.

Forward and backward at the 135M model's shape in bfloat16, the contenders in turns in one process, best of
the repeats: blocked with the window, blocked with full causal attention, and SDPA with full causal attention
(the best that torch offers a dense model; with a window it needs a T x T mask).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_clock import add_clock, clock_of  # noqa: E402
from spikingbrain_train.ops.softmax_attention import softmax_attention  # noqa: E402


def seconds(function: partial[Tensor], inputs: list[Tensor], clock: Callable[[], float]) -> float:
    """Time of one forward and backward pass."""
    start = clock()
    o = function(*inputs)
    torch.autograd.grad(o, inputs, torch.ones_like(o))
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clock(parser)
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns at T 2048; fewer for longer ones (default 5)"
    )
    parser.add_argument("--window", type=int, default=4096, help="window of the sliding form (default 4096)")
    parser.add_argument("--longest", type=int, default=16384, help="longest sequence (default 16384)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    clock = clock_of(args)
    torch.manual_seed(0)
    contenders = {
        f"window {args.window}": partial(softmax_attention, window=args.window, backend="blocked"),
        "blocked": partial(softmax_attention, window=None, backend="blocked"),
        "sdpa": partial(softmax_attention, window=None, backend="sdpa"),
    }
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.clock} time, {args.dtype}, "
        "B 1, H 9, G 3, K V 64, forward + backward"
    )
    T = 2048
    while args.longest >= T:
        inputs = [
            torch.randn(1, T, heads, 64).to(getattr(torch, args.dtype)).requires_grad_()
            for heads in (9, 3, 3)
        ]
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(max(1, args.repeats * 2048 // T)):
            for name, function in contenders.items():
                best[name] = min(best[name], seconds(function, inputs, clock))
        columns = "  ".join(f"{n} {t * 1e3:8.1f} ms ({best['sdpa'] / t:4.1f} x)" for n, t in best.items())
        print(f"T {T:6d}  {columns}", flush=True)
        T *= 2


if __name__ == "__main__":
    main()
