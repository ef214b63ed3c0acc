"""Claim: forward and backward on a CPU, the chunked gated delta rule is about as fast as transformers' at
512 tokens and 1.2 x as fast at 2048, though it keeps no more than its inputs and some states, and the
selective scan is 10 x as fast.

The peers are transformers' own for CPUs: torch_chunk_gated_delta_rule of Qwen3-Next, and the scan of its
Mamba layers (slow_forward in older releases); fla's naive recurrence of the delta rule beside them where fla
is there. float32, the contenders in turns in one process, best of the repeats; before that, their outputs
are held against each other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_clock import add_clock, clock_of  # noqa: E402
from benchmarks.gated_linear_attention import fastest, print_row  # noqa: E402
from spikingbrain_train.ops.gated_delta_rule import gated_delta_rule  # noqa: E402
from spikingbrain_train.ops.l2_norm import l2_norm  # noqa: E402
from spikingbrain_train.ops.selective_scan import selective_scan  # noqa: E402

BOUNDS = {"delta rule": {512: 0.9, 2048: 1.2}, "scan": {256: 10.0}}
"""Least ratio to transformers, by op and tokens. Its scan takes a time that grows with their square."""
TOLERANCE = 1e-4
"""Of outputs, relative to the largest: float32 sums in other orders."""
Contenders = dict[str, Callable[..., Tensor]]


def _of_transformers(module: str, name: str) -> Callable[..., Any]:
    try:
        function = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"error: the comparison needs a release of transformers that has {name}") from error
    return inspect.unwrap(function)


def delta_rule_contenders() -> Contenders:
    """Each takes q, k [B, T, H, K] of length 1, v [B, T, H, V], log gate and beta [B, T, H]."""
    name = "torch_chunk_gated_delta_rule"
    theirs = _of_transformers("qwen3_next.modeling_qwen3_next", name)

    def chunk(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_rule(q, k, v, log_gate, beta, backend="chunk")[0]

    def transformers(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, beta: Tensor) -> Tensor:
        return theirs(q, k, v, g=log_gate, beta=beta)[0]

    contenders: Contenders = {"chunk": chunk, "transformers": transformers}
    package = importlib.util.find_spec("fla")
    if package is not None and package.submodule_search_locations:
        # From its file: importing the package needs Triton and a GPU.
        file = Path(package.submodule_search_locations[0], "ops", "gated_delta_rule", "naive.py")
        of_fla = runpy.run_path(str(file))["naive_recurrent_gated_delta_rule"]

        def fla_naive(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, beta: Tensor) -> Tensor:
            return of_fla(q, k, v, beta, log_gate)[0]

        contenders["fla_naive"] = fla_naive
    return contenders


def delta_rule_inputs(B: int, T: int, H: int, width: int) -> list[Tensor]:
    """Gates as a Qwen3-Next layer begins with them, betas around 1/2."""
    q, k = (l2_norm(torch.randn(B, T, H, width)) for _ in range(2))
    v, beta = torch.randn(B, T, H, width), torch.rand(B, T, H)
    log_gate = -torch.empty(H).uniform_(1, 16) * F.softplus(torch.randn(B, T, H) - 4)
    return [x.detach().requires_grad_() for x in (q, k, v, log_gate, beta)]


def scan_contenders() -> Contenders:
    """Each takes x, dt [B, T, D], A [D, N], B, C [B, T, N]."""
    theirs = _of_transformers("mamba.modeling_mamba", "mamba_selective_scan")

    def chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(x, dt, A, B, C, backend="chunk")[0]

    def transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x_BDT, dt_BDT, B_BNT, C_BNT = (each.transpose(1, 2) for each in (x, dt, B, C))
        return theirs(x_BDT, dt_BDT, A, B_BNT, C_BNT).transpose(1, 2)

    return {"chunk": chunk, "transformers": transformers}


def scan_inputs(B: int, T: int, D: int, N: int) -> list[Tensor]:
    """Steps and decays as a Mamba layer begins with them."""
    x, dt = torch.randn(B, T, D), torch.empty(B, T, D).uniform_(-6.9, -2.3).exp()
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    B_and_C = (torch.randn(B, T, N) for _ in range(2))
    return [each.requires_grad_() for each in (x, dt, A, *B_and_C)]


def check_agreement(contenders: Contenders, inputs: list[Tensor]) -> None:
    """Raises SystemExit where a contender computes something else."""
    with torch.no_grad():
        expected, *others = (function(*inputs) for function in contenders.values())
    for name, found in zip(list(contenders)[1:], others, strict=True):
        off = float((found - expected).abs().max() / expected.abs().max())
        if off > TOLERANCE:
            raise SystemExit(
                f"error: {name} is off by {off:.1e} of the largest output, more than {TOLERANCE:g}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clock(parser)
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    args = parser.parse_args()
    clock = clock_of(args)
    torch.manual_seed(0)
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    machine = next(models, ": an unnamed CPU").split(":")[1].strip()
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.clock} time, forward + backward, {machine}"
    )
    makers: dict[str, tuple[Contenders, Callable[[int], list[Tensor]], str]] = {
        "delta rule": (delta_rule_contenders(), lambda T: delta_rule_inputs(1, T, 8, 64), "H 8, K V 64"),
        "scan": (scan_contenders(), lambda T: scan_inputs(1, T, 1152, 16), "D 1152, N 16"),
    }
    within = True
    for op, bounds in BOUNDS.items():
        contenders, make, shape = makers[op]
        for T, bound in bounds.items():
            inputs = make(T)
            check_agreement(contenders, inputs)
            turns = {name: 1 if name == "fla_naive" else args.repeats for name in contenders}
            best = fastest(contenders, inputs, turns, clock)
            print_row(f"{op} B 1, T {T}, {shape}", best)
            within &= best["transformers"] >= bound * best["chunk"]
    print("within the bounds" if within else "NOT within the bounds", BOUNDS)


if __name__ == "__main__":
    main()
