"""Claim: generation takes the same memory and the same time per token behind 130k tokens of text as behind
1k, and reading a prompt of 256k tokens in pieces needs no more memory than one of 4k, for models of Mamba
layers and of gated linear attention.

Models of random weights read random tokens as spikingbrain-generate reads a prompt, each in a process of its
own. Memory is what Linux counts for that process (VmRSS behind the text, VmHWM for the highest point); time
is CPU time, of two contexts in turn, so that what else runs on the machine weighs on both. Full attention
stands beside them, at shorter lengths: its work grows with their square.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.config.model import ModelConfig  # noqa: E402
from spikingbrain_train.config.parallel import AcceleratorKind, KernelConfig, ParallelConfig  # noqa: E402
from spikingbrain_train.config.run import Precision  # noqa: E402

if TYPE_CHECKING:
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

MEMORY_BOUND, TIME_BOUND, PEAK_BOUND = 1.05, 1.15, 1.1
CONSTANT = ("mamba", "gla")
"""Mixers whose memory shall not grow."""


def small_model(mixer: str, layers: int, width: int, longest: int) -> ModelConfig:
    """Of one mixer in every layer."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=width // 64,
        num_query_groups=width // 64,
        kv_channels=64,
        vocab_size=8192,
        max_position_embeddings=longest,
        mixers=[mixer],
        feed_forwards=["no_mlp"] if mixer == "mamba" else ["dense"],
    )


@dataclass(frozen=True)
class Read:
    """What a process says when it has read its text."""

    cpu_seconds: float
    before: float
    """MiB of the process with its model, before the text."""
    peak: float
    """MiB at the highest point so far."""
    behind: float
    """MiB behind the text."""
    cache: float
    """KiB that the model keeps of the text."""


class Reader:
    """A process that reads a text of ``tokens``, and then as many single tokens as it is asked for."""

    def __init__(self, model: ModelConfig, tokens: int, piece: int) -> None:
        self.tokens = tokens
        spawn = multiprocessing.get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(there, model, tokens, piece), daemon=True)
        self._process.start()
        self.read: Read = self._here.recv()

    def seconds_per_token(self, tokens: int) -> float:
        """CPU seconds, of so many more tokens, one after the other."""
        self._here.send(tokens)
        found: float = self._here.recv()
        return found

    def end(self) -> None:
        """Let the process end."""
        self._here.send(0)
        self._process.join()


def _serve(parent: Connection, model: ModelConfig, tokens: int, piece: int) -> None:
    import torch

    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    ignore_megatron_warnings()
    torch.set_num_threads(1)
    decoder = _decoder(model)
    ids = torch.randint(0, model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    decoder.read(ids[:, : min(64, piece)])  # what is made on first use is there
    decoder.begin()
    gc.collect()
    before, start = resident("VmRSS"), time.process_time()
    logits = decoder.read(ids, piece)
    seconds = time.process_time() - start
    size = decoder.cache_size()
    cache = (size.recurrent + size.windowed + size.unbounded) / 1024
    parent.send(Read(seconds, before, resident("VmHWM"), resident("VmRSS"), cache))
    assert logits is not None
    while steps := parent.recv():
        start = time.process_time()
        for _ in range(steps):
            logits = decoder.read(logits.argmax(-1, keepdim=True))
        parent.send((time.process_time() - start) / steps)


def _decoder(model: ModelConfig) -> IncrementalDecoder:
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config
    from spikingbrain_train.parallel.process_groups import initialize
    from spikingbrain_train.runtime.accelerator import detect

    groups = initialize(ParallelConfig(), detect(AcceleratorKind.cpu), seed=1)
    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator, model=model, precision=Precision.fp32)
    return IncrementalDecoder(build_model(model, config, kernels, groups.device).requires_grad_(False))


def resident(name: str) -> float:
    """MiB of this process, as Linux counts them: VmRSS now, VmHWM at the highest point."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def measure_tokens(mixer: str, contexts: tuple[int, int], args: argparse.Namespace) -> bool:
    """A row for each context; whether they are within the bounds."""
    model = small_model(mixer, args.layers, args.width, max(contexts) + 4096)
    # In pieces of the shorter text, so that both have room for as much as the other had.
    readers = [Reader(model, tokens, min(args.piece, *contexts)) for tokens in contexts]
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for reader, found in zip(readers, times, strict=True):
            found.append(reader.seconds_per_token(args.steps))
    per_token = [statistics.median(found) for found in times]
    memory, time_ratio = readers[1].read.behind / readers[0].read.behind, per_token[1] / per_token[0]
    for reader, seconds in zip(readers, per_token, strict=True):
        read = reader.read
        print(
            f"| {mixer} | {reader.tokens} | {read.behind:.0f} MiB | {read.cache:.0f} KiB | "
            f"{1e3 * seconds:.2f} ms |",
            flush=True,
        )
        reader.end()
    print(f"| | ratio | {memory:.3f} x | | {time_ratio:.3f} x |", flush=True)
    return memory <= MEMORY_BOUND and time_ratio <= TIME_BOUND


def measure_prefill(mixer: str, lengths: tuple[int, int], args: argparse.Namespace) -> bool:
    """A row for each length; whether the peaks are within the bound."""
    model = small_model(mixer, args.layers, args.width, max(lengths) + 4096)
    peaks = []
    for tokens in lengths:
        reader = Reader(model, tokens, args.piece)
        read = reader.read
        reader.end()
        peaks.append(read.peak)
        print(
            f"| {mixer} | {tokens} | {read.peak:.0f} MiB | {read.before:.0f} MiB | {read.cache:.0f} KiB | "
            f"{1e6 * read.cpu_seconds / tokens:.0f} us |",
            flush=True,
        )
    print(f"| | ratio | {peaks[1] / peaks[0]:.3f} x | | | |", flush=True)
    return peaks[1] <= PEAK_BOUND * peaks[0]


def main() -> None:
    from spikingbrain_train.evaluation.sampling import AUTOMATIC_PIECE

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="depth (default 4)")
    parser.add_argument("--piece", type=int, default=AUTOMATIC_PIECE, help="tokens read at a time")
    parser.add_argument("--contexts", type=int, nargs=2, default=(1024, 131072), metavar="T")
    parser.add_argument("--prompts", type=int, nargs=2, default=(4096, 262144), metavar="T")
    parser.add_argument(
        "--mixers", nargs="*", choices=CONSTANT, default=CONSTANT, help="that shall be constant (default all)"
    )
    parser.add_argument("--only", choices=("tokens", "prefill"), help="one of the two tables")
    parser.add_argument(
        "--full",
        type=int,
        nargs="*",
        default=(4096, 16384),
        metavar="T",
        help="of full attention; none: no rows",
    )
    parser.add_argument("--steps", type=int, default=50, help="tokens a round (default 50)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, in turn (default 7)")
    args = parser.parse_args()
    held = []
    if args.only != "prefill":
        print(
            "| mixer | tokens of context | process | of which cache | time per token |\n|---|---|---|---|---|"
        )
        for mixer in args.mixers:
            held.append(measure_tokens(mixer, tuple(args.contexts), args))
        if args.full:
            measure_tokens("full", tuple(args.full), args)
    if args.only != "tokens":
        print("\n| mixer | tokens of prompt | peak | before the text | cache | time per token |")
        print("|---|---|---|---|---|---|")
        for mixer in args.mixers:
            held.append(measure_prefill(mixer, tuple(args.prompts), args))
        if args.full:
            measure_prefill("full", tuple(args.full), args)
    if not held:
        return
    print(f"\n{'within' if all(held) else 'NOT within'} the bounds: memory {MEMORY_BOUND} x, time per token")
    print(f"{TIME_BOUND} x, peak {PEAK_BOUND} x, for {' and '.join(args.mixers)}")


if __name__ == "__main__":
    main()
