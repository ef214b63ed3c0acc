"""Claim: with as many tokens a rank, what linear attention and a halo cost a rank does not grow with the
number of ranks. Ulysses over windows and over everything, whose work grows with the sequence, is printed too.

Every rank holds a slice of ``--slice-length`` tokens, so n ranks work on a sequence n times as long. Measured
are the forward pass and a training step (forward and backward) of what lies between a mixer's projections,
communication included (gloo).

What keeps it fair on a machine with fewer cores than ranks: every rank computes with one thread and is pinned
to one core (rank r to core r modulo the cores), on one rank too. The first number is the CPU time of the
busiest rank, all of its threads (gloo's too): it does not depend on who else uses the core, but leaves out
waiting. The second is wall time divided by the ranks that share a core: it contains waiting, but is only as
quiet as the machine. Both are the best of the repeats; ratios are to one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.architecture.sequence_layout import SequenceLayout  # noqa: E402
from spikingbrain_train.config.parallel import (  # noqa: E402
    LinearAttentionContextParallel,
    SlidingWindowContextParallel,
)
from spikingbrain_train.parallel.context_parallel.linear_attention import (  # noqa: E402
    context_parallel_linear_attention,
)
from spikingbrain_train.parallel.context_parallel.softmax_attention import (  # noqa: E402
    context_parallel_softmax_attention,
)

H, G, K = 8, 2, 64


def mixers(window: int) -> dict[str, Callable[..., Tensor]]:
    """What is compared, each called with q, k, v, the log gate and the layout and group."""

    def softmax(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gate: Tensor,
        *,
        window: int | None,
        method: SlidingWindowContextParallel | None,
        **slices: object,
    ) -> Tensor:
        return context_parallel_softmax_attention(
            q,
            k,
            v,
            window=window,
            method=method,
            scale=K**-0.5,
            backend="auto",
            **slices,  # type: ignore[arg-type]
        )

    linear = partial(context_parallel_linear_attention, scale=K**-0.5, backend="auto")
    return {
        "GLA allgather": partial(linear, method=LinearAttentionContextParallel.allgather),
        "GLA allscan": partial(linear, method=LinearAttentionContextParallel.allscan),
        f"SWA {window} halo": partial(softmax, window=window, method=SlidingWindowContextParallel.halo),
        f"SWA {window} ulysses": partial(softmax, window=window, method=SlidingWindowContextParallel.ulysses),
        "full ulysses": partial(softmax, window=None, method=None),
    }


def cpu_and_wall(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best CPU and wall time of a step that all ranks begin together."""
    step()
    best_cpu = best_wall = float("inf")
    for _ in range(repeats):
        torch.distributed.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        best_cpu = min(best_cpu, time.process_time() - cpu)
        best_wall = min(best_wall, time.perf_counter() - wall)
    return best_cpu, best_wall


def measure(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    """One rank: writes [name, pass, CPU time, wall time] of every measurement to a file."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    slices = {
        "layout": SequenceLayout(args.slice_length * ranks, 0, rank, ranks),
        "cp_group": torch.distributed.group.WORLD,
    }
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, args.slice_length, heads, K).requires_grad_() for heads in (H, G, G))
    log_gate = torch.nn.functional.logsigmoid(torch.randn(k.shape) + 3.0).requires_grad_()
    grad = torch.randn(q.shape)
    results = []
    for name, mixer in mixers(args.window).items():

        def forward(mixer: Callable[..., Tensor] = mixer) -> None:
            with torch.no_grad():
                mixer(q, k, v, log_gate, **slices)

        def training_step(mixer: Callable[..., Tensor] = mixer) -> None:
            mixer(q, k, v, log_gate, **slices).backward(grad)

        for what, step in (("forward", forward), ("training step", training_step)):
            results.append([name, what, *cpu_and_wall(step, args.repeats)])
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(ranks: int, args: argparse.Namespace) -> dict[tuple[str, str], tuple[float, float]]:
    """Times of the slowest rank by mixer and pass; wall time by ranks that share a core."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (ranks, args, folder), nprocs=ranks)
        of_ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    sharing = -(-ranks // len(os.sched_getaffinity(0)))
    return {
        (name, what): (max(r[i][2] for r in of_ranks), max(r[i][3] for r in of_ranks) / sharing)
        for i, (name, what, _, _) in enumerate(of_ranks[0])
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first is the reference")
    parser.add_argument("--slice-length", type=int, default=2048, help="tokens of every rank (default 2048)")
    parser.add_argument("--window", type=int, default=256, help="window of sliding attention (default 256)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of every measurement (default 5)")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, 1 thread a rank, float32, "
        f"{args.slice_length} tokens a rank, B 1, H {H}, G {G}, K V {K}"
    )
    reference: dict[tuple[str, str], tuple[float, float]] = {}
    for ranks in args.ranks:
        for key, times in run(ranks, args).items():
            base = reference.setdefault(key, times)
            columns = "  ".join(
                f"{clock} {now * 1e3:8.1f} ms ({now / then:5.2f} x)"
                for clock, now, then in zip(("CPU", "wall"), times, base, strict=True)
            )
            print(f"{ranks} rank(s)  {key[0]:16s} {key[1]:14s} {columns}", flush=True)


if __name__ == "__main__":
    main()
