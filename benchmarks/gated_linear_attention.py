"""Claim: chunked gated linear attention is at least 40 x faster on CPU than flash-linear-attention's naive
recurrence.

Forward and backward at T = 2048 in float32, the contenders in turns in one process, best of the repeats.
Causal SDPA at the same shape puts the numbers in relation; longer bfloat16 shapes of the 135M model follow.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_clock import add_clock, clock_of  # noqa: E402
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention  # noqa: E402
from spikingbrain_train.ops.softmax_attention import softmax_attention  # noqa: E402


def naive_recurrent_gla() -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's reference, loaded from its file: importing its package needs Triton and a GPU."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the comparison needs flash-linear-attention: pip install fla-core")
    file = Path(package.submodule_search_locations[0], "ops", "gla", "naive.py")
    return runpy.run_path(str(file))["naive_recurrent_gla"]


def make_inputs(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a log gate as strong as the 7B model's at initialisation."""
    q, k, v = (torch.randn(B, T, heads, D).to(dtype) for heads in (H, G, G))
    log_gate = F.logsigmoid(torch.randn(B, T, G, D)) / 16
    return [x.requires_grad_() for x in (q.relu(), k.relu(), v, log_gate)]


def make_tied_inputs(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and log gate with the 76B model's tied gate, g = 1 - k and k = sigmoid(x): some steps decay by
    more than exp(-5), which takes the form of the op that stands any gate."""
    q, v = (torch.randn(B, T, heads, D).to(dtype) for heads in (H, G))
    x = 1.5 * torch.randn(B, T, G, D)
    return [x.requires_grad_() for x in (q.sigmoid(), x.sigmoid().to(dtype), v, F.logsigmoid(-x))]


def sdpa(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    return softmax_attention(q, k, v, window=None, backend="sdpa")


def seconds(function: Callable[..., Tensor], inputs: list[Tensor], clock: Callable[[], float]) -> float:
    """Time of one forward and backward pass."""
    start = clock()
    o = function(*inputs)
    torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)
    return clock() - start


def fastest(
    contenders: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    repeats: dict[str, int],
    clock: Callable[[], float],
) -> dict[str, float]:
    """Best time of each contender; they take turns, so that a busy machine slows all of them."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(max(repeats.values())):
        for name, function in contenders.items():
            if turn < repeats[name]:
                best[name] = min(best[name], seconds(function, inputs, clock))
    return best


def print_row(shape: str, best: dict[str, float]) -> None:
    others = "  ".join(
        f"{n} {t * 1e3:8.1f} ms = {t / best['chunk']:6.1f} x" for n, t in best.items() if n != "chunk"
    )
    print(f"{shape:42s} chunk {best['chunk'] * 1e3:8.1f} ms  {others}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clock(parser)
    parser.add_argument("--repeats", type=int, default=10, help="turns of the fast contenders (default 10)")
    parser.add_argument(
        "--naive-repeats", type=int, default=2, help="turns of the naive recurrence (default 2)"
    )
    parser.add_argument(
        "--longest", type=int, default=16384, help="longest sequence in bfloat16 (default 16384)"
    )
    args = parser.parse_args()
    clock = clock_of(args)
    torch.manual_seed(0)
    naive = naive_recurrent_gla()

    def chunk(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
        return gated_linear_attention(q, k, v, log_gate, backend="chunk")[0]

    def fla_naive(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
        return naive(q, k, v, log_gate)[0]

    print(f"torch {torch.__version__}, {args.threads} threads, {args.clock} time, forward + backward")
    best = fastest(
        {"chunk": chunk, "fla_naive": fla_naive, "sdpa": sdpa},
        make_inputs(2, 2048, 9, 9, 64, torch.float32),
        {"chunk": args.repeats, "sdpa": args.repeats, "fla_naive": args.naive_repeats},
        clock,
    )
    print_row("float32 B 2, T 2048, H 9, G 9, K V 64", best)
    T = 2048
    while args.longest >= T:
        inputs = make_inputs(1, T, 9, 3, 64, torch.bfloat16)
        repeats = {"chunk": args.repeats, "sdpa": max(1, min(args.repeats, 16384 // T // 2))}
        print_row(
            f"bfloat16 B 1, T {T}, H 9, G 3, K V 64",
            fastest({"chunk": chunk, "sdpa": sdpa}, inputs, repeats, clock),
        )
        T *= 2
    for B, T, H, G, D, dtype in (
        (2, 2048, 9, 9, 64, torch.float32),
        (1, 4096, 9, 3, 64, torch.bfloat16),
        (1, 4096, 8, 2, 128, torch.bfloat16),
    ):
        weak = fastest({"chunk": chunk}, make_inputs(B, T, H, G, D, dtype), {"chunk": args.repeats}, clock)
        tied = fastest(
            {"chunk": chunk}, make_tied_inputs(B, T, H, G, D, dtype), {"chunk": args.repeats}, clock
        )
        shape = f"{str(dtype).removeprefix('torch.')} B {B}, T {T}, H {H}, G {G}, K V {D}"
        print_row(shape, {"chunk": weak["chunk"], "tied_gate": tied["chunk"]})


if __name__ == "__main__":
    main()
