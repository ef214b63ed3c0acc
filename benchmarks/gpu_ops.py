"""Claim: on a GPU our ops are at least as fast as the library kernels that one could have called instead.

Forward and backward in bfloat16 at the shape of the 7B (28 heads in 4 groups of width 128), 8k to 128k
tokens, the contenders in turns in one process, best of the repeats, timed by CUDA events:

- gated linear attention: our op with backend auto, against fla.ops.gla.chunk_gla with keys, values and gates
  already repeated to heads
- a window of 4096 and full attention: our op with backend auto, against flash_attn_func where flash-attn is
  installed, and torch's SDPA over the whole sequence

Before that, outputs and gradients of every kernel that our ops can choose here are held to the naive forms in
float64: windows, sinks, packed documents, initial states. fla tunes its kernels for minutes when it meets a
shape for the first time.

Needs a GPU; nothing here runs on CPU (see gated_linear_attention.py and softmax_attention.py there).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.errors import PlatformError  # noqa: E402
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention  # noqa: E402
from spikingbrain_train.ops.softmax_attention import softmax_attention  # noqa: E402
from spikingbrain_train.runtime.packages import has_package  # noqa: E402

H, G, D = 28, 4, 128
WINDOW = 4096
OURS = "ours"

Contenders = dict[str, tuple[Callable[..., Tensor], list[Tensor]]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linear_attention(T: int) -> Contenders:
    """Our op and fla's kernel on the same numbers, fla's with one key head a query head."""
    from fla.ops.gla import chunk_gla

    q, k, v = leaf(1, T, H, D).relu(), leaf(1, T, G, D).relu(), leaf(1, T, G, D)
    log_gate = F.logsigmoid(torch.randn(1, T, G, D, device="cuda")) / 16
    repeated = [x.repeat_interleave(H // G, dim=2) for x in (k, v, log_gate)]
    return {
        OURS: (lambda *x: gated_linear_attention(*x)[0], [q, k, v, log_gate]),
        "fla chunk_gla": (lambda *x: chunk_gla(*x)[0], [q, *repeated]),
    }


def softmax_attention_contenders(T: int, window: int | None) -> Contenders:
    """Our op, flash-attn where it is installed, and SDPA over everything (torch's best without a mask)."""
    q, k, v = leaf(1, T, H, D), leaf(1, T, G, D), leaf(1, T, G, D)
    contenders: Contenders = {
        OURS: (lambda *x: softmax_attention(*x, window=window), [q, k, v]),
    }
    if has_package("flash_attn"):
        from flash_attn import flash_attn_func

        size = (-1, -1) if window is None else (window - 1, 0)
        contenders["flash_attn_func"] = (
            lambda *x: flash_attn_func(*x, causal=True, window_size=size),
            [q, k, v],
        )
    repeated = [x.repeat_interleave(H // G, dim=2).transpose(1, 2) for x in (k, v)]
    contenders["SDPA, full causal"] = (
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True),
        [q.transpose(1, 2), *repeated],
    )
    return contenders


def relative_error(
    function: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: list[Tensor]
) -> float:
    """Largest relative error (2-norm) of output and gradients against ``naive`` in float64."""
    results = []
    for run, dtype in ((function, None), (naive, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        o = run(*leaves)
        weight = torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64).view_as(o)
        results.append([o, *torch.autograd.grad(o, leaves, weight.to(o.dtype))])
    errors = [
        (got.double() - exact).norm() / exact.norm().clamp_min(1e-30)
        for got, exact in zip(*results, strict=True)
    ]
    return max(float(error) for error in errors)


def check_against_naive() -> None:
    """Print the error of every kernel in bfloat16 on 2048 tokens; rounding the output alone is 2e-3."""
    torch.manual_seed(0)
    heads, groups, T, bounds = 12, 2, 2048, [0, 700, 701, 2048]
    q, k, v = leaf(1, T, heads, D), leaf(1, T, groups, D), leaf(1, T, groups, D)
    print("| kernel | case | largest relative error of output and gradients |")
    print("|---|---|---|")

    def row(case: str, op: Callable[..., Tensor], inputs: list[Tensor], backend: str, **options: Any) -> None:
        run, naive = (partial(op, backend=name, **options) for name in (backend, "naive"))
        try:
            error = f"{relative_error(run, naive, inputs):.1e}"
        except (ValueError, PlatformError) as refusal:
            error = f"refused: {str(refusal)[:70]}"
        print(f"| {backend} | {case} | {error} |", flush=True)

    documents = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    for window, sinks, packed in itertools.product((None, WINDOW // 8), (0, 128), (False, True)):
        keys = [torch.cat([leaf(1, sinks, groups, D), x], dim=1) for x in (k, v)]
        case = f"window {window}, {sinks} sinks" + (", documents" if packed else "")
        for backend in ("flash_attn", "flex", "sdpa", "blocked"):
            options = {"window": window, "num_sink_tokens": sinks, **(documents if packed else {})}
            row(case, softmax_attention, [q, *keys], backend, **options)

    def linear(*inputs: Tensor, backend: str, **options: Any) -> Tensor:
        state = inputs[4] if len(inputs) > 4 else None
        return gated_linear_attention(*inputs[:4], initial_state=state, backend=backend, **options)[0]

    log_gate = F.logsigmoid(torch.randn(1, T, groups, D, device="cuda")) / 4
    states = torch.randn(len(bounds) - 1, groups, D, D, device="cuda")
    for backend in ("chunk", "fla"):
        row("gated linear attention", linear, [q, k, v, log_gate], backend)
    for backend in ("chunk", "fla"):
        row(
            "gated linear attention, documents",
            linear,
            [q, k, v, log_gate, states],
            backend,
            cu_seqlens=bounds,
        )


def milliseconds(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Time of one forward and backward pass on the device."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    o = function(*inputs)
    torch.autograd.grad(o, inputs, torch.ones_like(o))
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def compare(op: str, T: int, contenders: Contenders, repeats: int) -> None:
    """Print one row a contender."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats + 2):
        for name, (function, inputs) in contenders.items():
            time = milliseconds(function, inputs)
            if turn > 1:  # kernels are compiled and tuned first
                best[name] = min(best[name], time)
    for name, time in best.items():
        print(f"| {op} | {T} | {name} | {time:.2f} ms | {time / best[OURS]:.2f} x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [8192, 16384, 32768, 65536, 131072]
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=lengths, metavar="T")
    parser.add_argument("--repeats", type=int, default=10, help="turns that count (default 10)")
    parser.add_argument(
        "--check-only", action="store_true", help="hold kernels to the naive forms, no timing"
    )
    args = parser.parse_args()
    with user_errors():
        if not torch.cuda.is_available():
            raise PlatformError("this benchmark compares GPU kernels, but torch sees no GPU here")
        if not has_package("fla"):
            raise PlatformError(
                "the comparison needs flash-linear-attention: pip install flash-linear-attention"
            )
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        check_against_naive()
        if args.check_only:
            return
        print("\nForward and backward in bfloat16")
        print("| op | tokens | contender | time | time against ours |")
        print("|---|---|---|---|---|")
        for T in args.seq_lengths:
            compare("gated linear attention", T, linear_attention(T), args.repeats)
            compare(f"window {WINDOW}", T, softmax_attention_contenders(T, WINDOW), args.repeats)
            compare("full attention", T, softmax_attention_contenders(T, None), args.repeats)


if __name__ == "__main__":
    main()
