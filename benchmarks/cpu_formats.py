"""Claim: on a CPU `precision=auto` computes in the format in which the ops of a step are faster together:
bf16 where the CPU multiplies it, fp32 where it does not.

The CPU form of every op, forward and backward, in fp32 and in bf16, at shapes of the 135M model; with all
instructions of this CPU, and, in a process of its own, kept to AVX2 (torch, oneDNN and MKL each by their own
variable), which is what a CPU without AVX-512 has. Both formats in turns in one process, best of the repeats.

`--ops` takes some of them, `--no-avx2` leaves the second process out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_clock import add_clock, clock_of  # noqa: E402
from benchmarks.gated_linear_attention import make_inputs, make_tied_inputs, seconds  # noqa: E402
from benchmarks.recurrent_ops import delta_rule_inputs, scan_inputs  # noqa: E402
from spikingbrain_train.ops.causal_convolution import causal_convolution  # noqa: E402
from spikingbrain_train.ops.gated_activation import gated_relu  # noqa: E402
from spikingbrain_train.ops.gated_delta_rule import gated_delta_rule  # noqa: E402
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention  # noqa: E402
from spikingbrain_train.ops.int8_tokens import (  # noqa: E402
    codes_per_unit,
    int8_token_rounding,
    largest_magnitudes,
)
from spikingbrain_train.ops.l2_norm import l2_norm  # noqa: E402
from spikingbrain_train.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from spikingbrain_train.ops.rms_norm import rms_norm  # noqa: E402
from spikingbrain_train.ops.selective_scan import selective_scan  # noqa: E402
from spikingbrain_train.ops.softmax_attention import softmax_attention  # noqa: E402
from spikingbrain_train.ops.spike_encoding import spike_encoding  # noqa: E402
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_rounding, ternary_scales  # noqa: E402
from spikingbrain_train.reporting.tables import table  # noqa: E402
from spikingbrain_train.runtime.accelerator import detect  # noqa: E402
from spikingbrain_train.runtime.bf16 import choose_precision  # noqa: E402

T, HIDDEN, FFN, VOCABULARY = 1024, 576, 1536, 49152
H, G, D = 9, 3, 64
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEPT_TO_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class Op:
    """What is timed.

    Attributes:
        function: of its inputs.
        inputs: leaves in a format.
        shape: in words.
    """

    function: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], list[Tensor]]
    shape: str


def _normal(*shapes: Sequence[int]) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def _in(make: Callable[[], list[Tensor]]) -> Callable[[torch.dtype], list[Tensor]]:
    """Inputs of recurrences that are made in fp32: those of other formats are the same, rounded."""
    return lambda dtype: [x.detach().to(dtype).requires_grad_() for x in make()]


def _attention(window: int | None) -> Callable[..., Tensor]:
    return lambda q, k, v: softmax_attention(q, k, v, window=window)


def _loss(hidden: Tensor, weight: Tensor) -> Tensor:
    labels = torch.arange(len(hidden)) * 37 % len(weight)
    return linear_cross_entropy(hidden, weight, labels, torch.ones(len(hidden)))[0]


def _int8(x: Tensor) -> Tensor:
    return int8_token_rounding(x, codes_per_unit(largest_magnitudes(x)))


def _ternary(weight: Tensor) -> Tensor:
    return ternary_rounding(weight, ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype))


_HEADS = _normal((1, T, H, D), (1, T, G, D), (1, T, G, D))
_TOKENS = f"{T} x {HIDDEN}"
OPS = {
    "linear": Op(F.linear, _normal((T, HIDDEN), (2 * FFN, HIDDEN)), f"{_TOKENS} by {2 * FFN}"),
    "gated linear attention": Op(
        lambda *x: gated_linear_attention(*x)[0],
        lambda dtype: make_inputs(1, T, H, G, D, dtype),
        f"T {T}, H {H}, G {G}, K V {D}",
    ),
    "the same, tied gates": Op(
        lambda *x: gated_linear_attention(*x)[0],
        lambda dtype: make_tied_inputs(1, T, H, G, D, dtype),
        f"T {T}, H {H}, G {G}, K V {D}",
    ),
    "gated delta rule": Op(
        lambda *x: gated_delta_rule(*x)[0],
        _in(lambda: delta_rule_inputs(1, T, H, D)),
        f"T {T}, H {H}, K V {D}",
    ),
    "selective scan": Op(
        lambda *x: selective_scan(*x)[0],
        _in(lambda: scan_inputs(1, T, 2 * HIDDEN, 16)),
        f"T {T}, D {2 * HIDDEN}, N 16",
    ),
    "window of 512": Op(_attention(512), _HEADS, f"T {T}, H {H}, G {G}, K V {D}"),
    "full attention": Op(_attention(None), _HEADS, f"T {T}, H {H}, G {G}, K V {D}"),
    "output and loss": Op(
        _loss, _normal((256, HIDDEN), (VOCABULARY, HIDDEN)), f"256 x {HIDDEN} by {VOCABULARY}"
    ),
    "causal convolution": Op(
        lambda x, weight: causal_convolution(x, weight)[0],
        _normal((1, T, 2 * HIDDEN), (2 * HIDDEN, 4)),
        f"{T} x {2 * HIDDEN}, width 4",
    ),
    "RMSNorm": Op(lambda x, weight: rms_norm(x, weight, 1e-5), _normal((T, HIDDEN), (HIDDEN,)), _TOKENS),
    "L2 norm of heads": Op(l2_norm, _normal((T, H, D)), f"{T} x {H} x {D}"),
    "gated ReLU": Op(gated_relu, _normal((T, 2 * FFN)), f"{T} x {2 * FFN}"),
    "spike encoding": Op(lambda x: spike_encoding(x, 2.0), _normal((T, HIDDEN)), _TOKENS),
    "INT8 rounding of tokens": Op(_int8, _normal((T, HIDDEN)), _TOKENS),
    "ternary rounding of a weight": Op(_ternary, _normal((2 * FFN, HIDDEN)), f"{2 * FFN} x {HIDDEN}"),
}
STEP = ("linear", "gated linear attention", "window of 512", "RMSNorm", "output and loss")
"""Ops of the 135M hybrid's step, by the sum of whose times ``auto`` is judged."""


def measure(names: Sequence[str], repeats: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Seconds of a forward and backward pass: op -> format -> best."""
    found = {}
    for name in names:
        op, best = OPS[name], dict.fromkeys(FORMATS, float("inf"))
        inputs = {}
        for label, dtype in FORMATS.items():
            torch.manual_seed(0)
            inputs[label] = op.inputs(dtype)
        for _ in range(repeats):
            for label in FORMATS:
                best[label] = min(best[label], seconds(op.function, inputs[label], clock))
        found[name] = best
    return found


def _kept_to_avx2(arguments: argparse.Namespace) -> dict[str, Any]:
    """What this script says as JSON in a process that takes such a CPU's ways."""
    words = [
        sys.executable,
        __file__,
        "--json",
        "--threads",
        str(arguments.threads),
        "--clock",
        arguments.clock,
    ]
    words += ["--repeats", str(arguments.repeats), "--ops", *arguments.ops]
    done = subprocess.run(words, env=os.environ | KEPT_TO_AVX2, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows_of(columns: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Lines: an op each; of each set of instructions ms in both formats, and how many times bf16 is as fast.

    Args:
        columns: name of the instructions -> op -> format -> seconds.
    """
    lines = [["op", "shape"]]
    for instructions in columns:
        lines[0] += [f"{instructions}: fp32", "bf16", "fp32 : bf16"]
    for name in next(iter(columns.values())):
        row = [name, OPS[name].shape]
        for found in columns.values():
            fp32, bf16 = found[name]["fp32"], found[name]["bf16"]
            row += [f"{1e3 * fp32:.2f} ms", f"{1e3 * bf16:.2f} ms", f"{fp32 / bf16:.2f} x"]
        lines.append(row)
    return table(lines, left=2)


def verdict(chosen: str, found: dict[str, dict[str, float]]) -> str:
    """Whether the format that ``auto`` takes is the one in which the hybrid's ops are faster together."""
    sums = {label: sum(found[name][label] for name in STEP) for label in FORMATS}
    other = next(label for label in FORMATS if label != chosen)
    ratio = sums[other] / sums[chosen]
    holds = "as it should" if ratio >= 1 else "which it should NOT"
    return f"auto takes {chosen}, {holds}: {', '.join(STEP)} together {ratio:.2f} x as fast as in {other}"


def main() -> None:
    """Print the table, and what ``auto`` takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clock(parser)
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument(
        "--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS)
    )
    parser.add_argument("--no-avx2", action="store_true", help="all instructions of this CPU alone")
    parser.add_argument("--json", action="store_true", help="seconds of all instructions alone, as JSON")
    arguments = parser.parse_args()
    clock = clock_of(arguments)
    accelerator = detect("cpu")
    chosen = choose_precision(accelerator).precision.value
    mine: dict[str, Any] = {"chosen": chosen, "seconds": measure(arguments.ops, arguments.repeats, clock)}
    if arguments.json:
        print(json.dumps(mine))
        return
    print(
        f"torch {torch.__version__}, {accelerator.device_name}, {arguments.threads} threads, "
        f"{arguments.clock} time, forward + backward"
    )
    results: dict[str, dict[str, Any]] = {torch.backends.cpu.get_cpu_capability(): mine}
    if not arguments.no_avx2:
        results["kept to AVX2"] = _kept_to_avx2(arguments)
    print("\n".join(rows_of({name: result["seconds"] for name, result in results.items()})))
    if set(STEP) <= set(arguments.ops):
        for name, result in results.items():
            print(f"{name}: {verdict(result['chosen'], result['seconds'])}")


if __name__ == "__main__":
    main()
