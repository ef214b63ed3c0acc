"""What products and attention of a SmolLM2-135M training step reach on one CPU thread in fp32, in CPU time.

Forward (x W^T), gradient of the input (g W) and of the weight (g^T x) of every linear's shape; adding the
latter to a buffer; a square product; causal SDPA forward and backward. What surrounds them in a step is what
`spikingbrain-profile-step` shows. CPU time of the thread, because other programs may share the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

LINEARS = {"gate and up": (3072, 576), "down": (576, 1536), "q, k, v": (960, 576), "output": (576, 576)}
"""Of a layer: [out, in]."""
HEADS, HEAD_DIM, SQUARE = 9, 64, 2048


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The shortest of some calls behind one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        function()
        best = min(best, time.thread_time() - begin)
    return best


def products(tokens: int, repeats: int) -> None:
    """Print a row a shape."""
    print("| linear | forward | input's gradient | weight's gradient | adding it |\n|---|---|---|---|---|")
    for name, (out, width) in LINEARS.items():
        x, weight, g = torch.randn(tokens, width), torch.randn(out, width), torch.randn(tokens, out)
        total = torch.zeros(out, width)
        flops = 2 * tokens * out * width
        calls: list[Callable[[], object]] = [
            lambda x=x, w=weight: x @ w.t(),  # type: ignore[misc]
            lambda g=g, w=weight: g @ w,  # type: ignore[misc]
            lambda g=g, x=x: g.t() @ x,  # type: ignore[misc]
        ]
        rates = " | ".join(f"{flops / seconds(call, repeats) / 1e9:.0f} GFLOP/s" for call in calls)
        adding = seconds(lambda t=total, w=weight: t.add_(w), repeats)  # type: ignore[misc]
        print(f"| {name} {out} x {width} | {rates} | {1e3 * adding:.2f} ms |", flush=True)
    a = torch.randn(SQUARE, SQUARE)
    rate = 2 * SQUARE**3 / seconds(lambda: a @ a, repeats) / 1e9
    print(f"\nsquare product of {SQUARE}: {rate:.0f} GFLOP/s")


def attention(tokens: int, repeats: int) -> None:
    """Print causal SDPA; a backward pass has 2.5 times the products of a forward one."""
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> None:
        o = forward()
        o.backward(o.detach())

    flops = 2 * HEADS * tokens**2 * HEAD_DIM  # two products over half of the square
    with torch.no_grad():
        once = seconds(forward, repeats)
    back = seconds(both, repeats) - once
    for name, time_, count in (("forward", once, flops), ("backward", back, 2.5 * flops)):
        print(f"SDPA {name}: {1e3 * time_:.0f} ms, {count / time_ / 1e9:.0f} GFLOP/s")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the sequence (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the best counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    products(arguments.tokens, arguments.repeats)
    attention(arguments.tokens, arguments.repeats)


if __name__ == "__main__":
    main()
