"""Claim: on a GPU our ops are at least as fast as the library kernels that one could have called instead.

Forward and backward in bfloat16 at the shape of the 7B (28 heads in 4 groups of width 128), 8k to 128k
tokens, the contenders in turns in one process, best of the repeats, timed by CUDA events:

- gated linear attention: our op with backend auto, against fla.ops.gla.chunk_gla with keys, values and gates
  already repeated to heads
- a window of 4096 and full attention: our op with backend auto, against flash_attn_func where flash-attn is
  installed, and torch's SDPA over the whole sequence
- the feed-forward's second product: the linear that a model here is built of, against cuBLAS by F.linear

Before that, outputs and gradients of every kernel that our ops can choose here are held to the naive forms in
float64: windows, sinks, packed documents, initial states. fla tunes its kernels for minutes when it meets a
shape for the first time.

Needs a GPU; nothing here runs on CPU (see gated_linear_attention.py and softmax_attention.py there).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_contenders import SEED, Setting  # noqa: E402
from benchmarks.training_step import named_model  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe  # noqa: E402
from spikingbrain_train.config.parallel import ParallelConfig  # noqa: E402
from spikingbrain_train.config.run import Precision  # noqa: E402
from spikingbrain_train.errors import PlatformError  # noqa: E402
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention  # noqa: E402
from spikingbrain_train.ops.softmax_attention import softmax_attention  # noqa: E402
from spikingbrain_train.parallel.process_groups import ProcessGroups, initialize  # noqa: E402
from spikingbrain_train.runtime.accelerator import detect  # noqa: E402
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


@cache
def _groups(device: str) -> ProcessGroups:
    return initialize(ParallelConfig(), detect(device), seed=SEED)


@cache
def built_layer(model: str, device: str, recipe: Fp8Recipe | None = None) -> torch.nn.Module:
    """The first layer of a model as the trainer builds it for this machine, in training.

    Args:
        model: a name of conf/model.
        device: ``cuda`` or ``cpu``.
        recipe: its linears multiply in FP8 with it; None has them in bf16.
    """
    from spikingbrain_train.training.build import build_student, kernels_of

    config = Setting(
        model=replace(named_model(model), num_layers=1, vocab_size=1024),
        hf_folder=None,
        megatron_folder=None,
        weights=None,
        seq_length=1024,
        threads=1,
        device=device,
        precision=Precision.bf16,
        fp8=Fp8Config() if recipe is None else Fp8Config(Fp8Format.hybrid, recipe),
    ).run_config
    groups = _groups(device)
    student = build_student(config, kernels_of(config, groups.accelerator), groups)
    return student.get_submodule("decoder.layers.0").train()


def feed_forward_product(T: int, model: str = "spikingbrain_7b", device: str = "cuda") -> Contenders:
    """The linear behind a feed-forward's activation, and cuBLAS on the same numbers.

    Args:
        T: tokens.
        model: a name of conf/model.
        device: ``cuda``; ``cpu`` compares with what torch multiplies by there.
    """
    linear = built_layer(model, device).get_submodule("mlp.linear_fc2")
    weight = linear.get_parameter("weight")
    x = torch.randn(T, 1, weight.shape[1], device=device, dtype=weight.dtype)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(linear, {"weight": weight}, (x,))[0]

    return {OURS: (ours, [x, weight]), "cuBLAS, F.linear": (F.linear, [x, weight])}


CASES: dict[str, Callable[[int], Contenders]] = {
    "gated linear attention": linear_attention,
    f"window {WINDOW}": partial(softmax_attention_contenders, window=WINDOW),
    "full attention": partial(softmax_attention_contenders, window=None),
    "feed-forward product": feed_forward_product,
}
"""What is timed, with what could have been called instead."""


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


def errors_against_naive() -> Iterator[dict[str, str]]:
    """The error of every kernel in bfloat16 on 2048 tokens; rounding the output alone is 2e-3.

    Returns:
        ``kernel``, ``case`` and ``error``, the largest relative one of output and gradients.
    """
    torch.manual_seed(0)
    heads, groups, T, bounds = 12, 2, 2048, [0, 700, 701, 2048]
    q, k, v = leaf(1, T, heads, D), leaf(1, T, groups, D), leaf(1, T, groups, D)

    def row(
        case: str, op: Callable[..., Tensor], inputs: list[Tensor], backend: str, **options: Any
    ) -> dict[str, str]:
        run, naive = (partial(op, backend=name, **options) for name in (backend, "naive"))
        try:
            error = f"{relative_error(run, naive, inputs):.1e}"
        except (ValueError, PlatformError) as refusal:
            error = f"refused: {str(refusal)[:70]}"
        return {"kernel": backend, "case": case, "error": error}

    documents = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    for window, sinks, packed in itertools.product((None, WINDOW // 8), (0, 128), (False, True)):
        keys = [torch.cat([leaf(1, sinks, groups, D), x], dim=1) for x in (k, v)]
        case = f"window {window}, {sinks} sinks" + (", documents" if packed else "")
        for backend in ("flash_attn", "flex", "sdpa", "blocked"):
            options = {"window": window, "num_sink_tokens": sinks, **(documents if packed else {})}
            yield row(case, softmax_attention, [q, *keys], backend, **options)

    def linear(*inputs: Tensor, backend: str, **options: Any) -> Tensor:
        state = inputs[4] if len(inputs) > 4 else None
        return gated_linear_attention(*inputs[:4], initial_state=state, backend=backend, **options)[0]

    log_gate = F.logsigmoid(torch.randn(1, T, groups, D, device="cuda")) / 4
    states = torch.randn(len(bounds) - 1, groups, D, D, device="cuda")
    for backend in ("chunk", "fla"):
        yield row("gated linear attention", linear, [q, k, v, log_gate], backend)
    for backend in ("chunk", "fla"):
        yield row(
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


def compare(
    op: str, T: int, repeats: int, cases: dict[str, Callable[[int], Contenders]] | None = None
) -> list[dict[str, Any]]:
    """A row a contender of one of ``cases``, by default :data:`CASES`.

    Returns:
        ``op``, ``tokens``, ``contender``, ``ms`` of the best turn (None where memory did not suffice) and
        ``against_ours``, how many times as long as ours it took.
    """
    contenders = (cases or CASES)[op](T)
    best = dict.fromkeys(contenders, float("inf"))
    failed = set()
    for turn in range(repeats + 2):
        for name, (function, inputs) in contenders.items():
            if name in failed:
                continue
            try:
                time = milliseconds(function, inputs)
            except torch.OutOfMemoryError:
                failed.add(name)
                continue
            if turn > 1:  # kernels are compiled and tuned first
                best[name] = min(best[name], time)
    times = {name: None if name in failed else time for name, time in best.items()}
    ours = times[OURS]
    return [
        {
            "op": op,
            "tokens": T,
            "contender": name,
            "ms": time,
            "against_ours": None if time is None or ours is None else time / ours,
        }
        for name, time in times.items()
    ]


def require_gpu_and_fla() -> None:
    """Raises :class:`PlatformError` where these kernels cannot run."""
    if not torch.cuda.is_available():
        raise PlatformError("this benchmark compares GPU kernels, but torch sees no GPU here")
    if not has_package("fla"):
        raise PlatformError("the comparison needs flash-linear-attention: pip install flash-linear-attention")


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
        require_gpu_and_fla()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print("| kernel | case | largest relative error of output and gradients |\n|---|---|---|")
        for row in errors_against_naive():
            print("| {kernel} | {case} | {error} |".format(**row), flush=True)
        if args.check_only:
            return
        print("\nForward and backward in bfloat16")
        print("| op | tokens | contender | time | time against ours |\n|---|---|---|---|---|")
        for T, op in itertools.product(args.seq_lengths, CASES):
            for row in compare(op, T, args.repeats):
                print(timing_row(row), flush=True)


def timing_row(row: dict[str, Any]) -> str:
    """A row of :func:`compare` in a Markdown table."""
    time = "out of memory" if row["ms"] is None else f"{row['ms']:.2f} ms"
    ratio = "" if row["against_ours"] is None else f"{row['against_ours']:.2f} x"
    return f"| {row['op']} | {row['tokens']} | {row['contender']} | {time} | {ratio} |"


if __name__ == "__main__":
    main()
