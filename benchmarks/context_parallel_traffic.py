"""Claim: under context parallelism, linear attention sends the same bytes at every sequence length, with the
all-scan also at every number of ranks, and every mixer sends what its formula says.

Every mixer runs forward and backward on slices of sequences of 4k to 64k tokens, on 1 to 8 gloo processes
(full attention at 4k only: Ulysses sends the same with and without a window). The payload of
torch.distributed's functions is counted as it leaves a rank; the rank that sends most is reported.
The heads are few and narrow: bytes scale with them, and the point is what else they scale with.

The kernel's own count of the loopback device, in a network of its own, as a check of the counting:
  unshare -rn sh -c 'ip link set lo up; GLOO_SOCKET_IFNAME=lo python benchmarks/context_parallel_traffic.py \\
    --loopback --head-dim 128 --lengths 4096'
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

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

FLOAT32_BYTES = 4
LENGTHS = (1 << 12, 1 << 14, 1 << 16)
WINDOW = 512  # the shortest slice, so that the window reaches one rank
SINKS = 128


@dataclass(frozen=True)
class Setting:
    """One measurement: a sequence of ``tokens`` (sinks included) on ``num_ranks`` ranks, in float32."""

    tokens: int
    num_ranks: int
    num_sink_tokens: int = 0
    has_documents: bool = False
    num_heads: int = 8
    num_groups: int = 2
    head_dim: int = 16

    @property
    def state_bytes(self) -> int:
        """A state of linear attention, G K V."""
        return self.num_groups * self.head_dim**2 * FLOAT32_BYTES

    @property
    def decay_bytes(self) -> int:
        """The decay of a state, G K."""
        return self.num_groups * self.head_dim * FLOAT32_BYTES

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token, G 2 K."""
        return self.num_groups * 2 * self.head_dim * FLOAT32_BYTES

    def share_bytes(self, per_group: int = 2) -> int:
        """What Ulysses sends in a pass: queries and ``per_group`` tensors of the groups (keys and values; in
        linear attention gates, too) of its T / n tokens to n - 1 other ranks, H / n heads and max(G, n) / n
        groups each, and outputs of its own heads for their tokens."""
        heads = 2 * self.num_heads + per_group * max(self.num_groups, self.num_ranks)
        tokens = (self.num_ranks - 1) * self.tokens // self.num_ranks
        return tokens * heads // self.num_ranks * self.head_dim * FLOAT32_BYTES

    def layout(self, rank: int) -> SequenceLayout:
        """Slices of this setting; the documents are uneven and reach over edges of slices."""
        text = self.tokens - self.num_sink_tokens
        bounds = ((0, text // 3, text // 2 + 1, text),) if self.has_documents else None
        return SequenceLayout(text, self.num_sink_tokens, rank, self.num_ranks, bounds)


Forward = Callable[[Setting, dist.ProcessGroup], tuple[Tensor, list[Tensor]]]
"""Runs a mixer over this rank's slice: its output and the inputs that get gradients."""


@dataclass(frozen=True)
class Row:
    """A mixer with a method of communication, and what its busiest of n >= 2 ranks should send."""

    name: str
    forward: Forward
    formula: str
    forward_bytes: Callable[[Setting], int]
    backward_bytes: Callable[[Setting], int]
    num_sink_tokens: int = 0
    has_documents: bool = False
    longest: int | None = None
    """Longer sequences would take too long."""


def slice_inputs(setting: Setting) -> list[Tensor]:
    """Random q, k, v of one slice."""
    tokens = setting.tokens // setting.num_ranks
    heads = (setting.num_heads, setting.num_groups, setting.num_groups)
    return [torch.randn(1, tokens, n, setting.head_dim, requires_grad=True) for n in heads]


def linear_attention(
    method: LinearAttentionContextParallel, setting: Setting, group: dist.ProcessGroup
) -> tuple[Tensor, list[Tensor]]:
    q, k, v = slice_inputs(setting)
    log_gate = (-torch.rand(k.shape) / 8).requires_grad_()
    o = context_parallel_linear_attention(
        q,
        k,
        v,
        log_gate,
        layout=setting.layout(group.rank()),
        cp_group=group,
        method=method,
        scale=setting.head_dim**-0.5,
        backend="chunk",
    )
    return o, [q, k, v, log_gate]


def softmax_attention(
    window: int | None,
    method: SlidingWindowContextParallel | None,
    setting: Setting,
    group: dist.ProcessGroup,
) -> tuple[Tensor, list[Tensor]]:
    q, k, v = slice_inputs(setting)
    o = context_parallel_softmax_attention(
        q,
        k,
        v,
        window=window,
        layout=setting.layout(group.rank()),
        cp_group=group,
        method=method,
        scale=setting.head_dim**-0.5,
        backend="auto",
    )
    return o, [q, k, v]


allgather = partial(linear_attention, LinearAttentionContextParallel.allgather)
allscan = partial(linear_attention, LinearAttentionContextParallel.allscan)
halo = partial(softmax_attention, WINDOW, SlidingWindowContextParallel.halo)
ulysses = partial(softmax_attention, WINDOW, SlidingWindowContextParallel.ulysses)
full = partial(softmax_attention, None, None)
linear_ulysses = partial(linear_attention, LinearAttentionContextParallel.ulysses)
ULYSSES_FORMULA = "(n - 1) / n T 2 (H + max(G, n)) K / n, twice"

ROWS = [
    Row(
        "linear, allgather",
        allgather,
        "(n - 1) (state + decay) + (n - 1) state",
        lambda s: (s.num_ranks - 1) * (s.state_bytes + s.decay_bytes),
        lambda s: (s.num_ranks - 1) * s.state_bytes,
    ),
    Row("linear, allscan", allscan, "state + state", lambda s: s.state_bytes, lambda s: s.state_bytes),
    Row(
        f"linear, allscan, {SINKS} sinks, documents",
        allscan,
        "2 state + 2 state",
        lambda s: 2 * s.state_bytes,
        lambda s: 2 * s.state_bytes,
        num_sink_tokens=SINKS,
        has_documents=True,
    ),
    Row(
        "linear, ulysses",
        linear_ulysses,
        "(n - 1) / n T (2 H + 3 max(G, n)) K / n, twice",
        lambda s: s.share_bytes(per_group=3),
        lambda s: s.share_bytes(per_group=3),
    ),
    Row(
        f"window {WINDOW}, halo",
        halo,
        "(w - 1) 2 G K, twice",
        lambda s: (WINDOW - 1) * s.token_bytes,
        lambda s: (WINDOW - 1) * s.token_bytes,
    ),
    Row(
        f"window {WINDOW}, halo, {SINKS} sinks",
        halo,
        "(w - 1 + sinks) 2 G K, twice",
        lambda s: (WINDOW - 1 + SINKS) * s.token_bytes,
        lambda s: (WINDOW - 1 + SINKS) * s.token_bytes,
        num_sink_tokens=SINKS,
    ),
    Row(
        f"window {WINDOW}, ulysses",
        ulysses,
        ULYSSES_FORMULA,
        lambda s: s.share_bytes(),
        lambda s: s.share_bytes(),
    ),
    Row(
        f"full, ulysses, {SINKS} sinks",
        full,
        ULYSSES_FORMULA,
        lambda s: s.share_bytes(),
        lambda s: s.share_bytes(),
        num_sink_tokens=SINKS,
        longest=1 << 12,
    ),
]


class SentBytes:
    """Counts the payload that this process sends through torch.distributed.

    What goes to each of the other ranks (all-gather, all-to-all, point to point) counts for each of them. A
    broadcast or a reduction counts once on every rank: that is what a rank passes on in a ring.
    """

    COUNTED = ("send", "isend", "broadcast", "reduce", "all_gather_into_tensor", "all_to_all_single")
    UNKNOWN = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter_tensor", "batch_isend_irecv")

    def __init__(self) -> None:
        self._total = 0
        self._lock = threading.Lock()  # the all-scan sends from a thread of its own

    def take(self) -> int:
        """Bytes since the last call."""
        with self._lock:
            total, self._total = self._total, 0
        return total

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        originals = {name: getattr(dist, name) for name in (*self.COUNTED, *self.UNKNOWN)}
        for name, original in originals.items():
            setattr(dist, name, partial(self._call, name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        num_bytes = self._payload(name, arguments)
        with self._lock:
            self._total += num_bytes
        return original(*args, **kwargs)

    def _payload(self, name: str, arguments: dict[str, Any]) -> int:
        group = arguments.get("group")
        others = dist.get_world_size(group) - 1
        if name in ("send", "isend", "broadcast", "reduce"):
            return arguments["tensor"].nbytes
        if name == "all_gather_into_tensor":
            return others * arguments["input_tensor"].nbytes
        if name == "all_to_all_single":
            x, splits = arguments["input"], arguments.get("input_split_sizes")
            if not splits:
                return x.nbytes * others // (others + 1)
            own = splits[dist.get_rank(group)]
            return (sum(splits) - own) * x[:1].nbytes
        raise NotImplementedError(f"this benchmark does not know what torch.distributed.{name} sends")


def measure(row: Row, setting: Setting, group: dist.ProcessGroup, sent: SentBytes) -> tuple[int, int]:
    """Bytes that this rank sends in the forward and in the backward pass."""
    with sent.counting():
        o, inputs = row.forward(setting, group)
        forward = sent.take()
        torch.autograd.backward(o.sum(), inputs=inputs)
        return forward, sent.take()


def settings(row: Row, args: argparse.Namespace) -> list[Setting]:
    return [
        Setting(tokens, n, row.num_sink_tokens, row.has_documents, head_dim=args.head_dim)
        for n in args.ranks
        for tokens in args.lengths
        if row.longest is None or tokens <= row.longest
    ]


def received_by_loopback() -> int:
    """Bytes that the kernel has counted on the loopback device."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("error: no loopback device in /proc/net/dev")


def serve(rank: int, port: int, args: argparse.Namespace, connection: Connection) -> None:
    """One rank: run every setting that needs it and report (forward, backward) bytes; None if idle."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated")
    world_size = max(args.ranks)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    groups = {n: dist.new_group(range(n)) for n in args.ranks}
    sent = SentBytes()
    for row in ROWS:
        for setting in settings(row, args):
            result, group = None, groups[setting.num_ranks]
            if rank < setting.num_ranks:
                if args.loopback:  # connections and their handshakes are made by the first run
                    measure(row, setting, group, sent)
                    dist.barrier(group)
                    time.sleep(0.2)
                before = received_by_loopback()
                result = measure(row, setting, group, sent)
                if args.loopback:
                    time.sleep(0.2)  # so that nothing is under way, and no barrier is counted
                result = (*result, received_by_loopback() - before)
                dist.barrier(group)
            connection.send(result)
    dist.destroy_process_group()


def report(row: Row, setting: Setting, results: list[tuple[int, int, int]], loopback: bool) -> str:
    """A line of the table. Exits where the count is not what the formula says."""
    forward, backward = (max(result[i] for result in results) for i in (0, 1))
    expected = (0, 0)
    if setting.num_ranks > 1:
        expected = row.forward_bytes(setting), row.backward_bytes(setting)
    if (forward, backward) != expected:
        raise SystemExit(f"error: {row.name}, {setting}: sent {(forward, backward)}, formula {expected}")
    line = f"| {row.name} | {setting.num_ranks} | {setting.tokens} | {forward} | {backward} | {row.formula} |"
    if loopback:
        line += f" {sum(a + b for a, b, _ in results)} | {results[0][2]} |"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="T")
    parser.add_argument("--head-dim", type=int, default=16, help="K = V (default 16)")
    parser.add_argument("--loopback", action="store_true", help="compare with the kernel's count")
    args = parser.parse_args()

    # Forked: eight imports of torch would take longer than the measurements.
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(max(args.ranks)):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, store.port, args, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    columns = "| mixer | ranks | tokens | forward bytes | backward bytes | formula |"
    if args.loopback:
        columns += " sum over ranks | loopback device |"
    print(f"{columns}\n{'|---' * (columns.count('|') - 1)}|")
    for row in ROWS:
        for setting in settings(row, args):
            answers = [pipe.recv() for pipe in pipes]
            results = [answer for answer in answers if answer is not None]
            print(report(row, setting, results, args.loopback), flush=True)
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
