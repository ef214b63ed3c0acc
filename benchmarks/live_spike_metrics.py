"""Claim: counting spikes while a run trains takes at most 2 % of a step.

A model whose projections all read spikes takes optimizer steps (forward, backward, AdamW) on random tokens,
and counts in each what a reported step counts: `logging.transform_statistics_tokens` tokens of each linear's
input, their histogram, and the metrics that follow. The counting is timed by itself, inside the step, because
its share is smaller than what two steps differ by; on a CPU in CPU time, which other work on the machine
moves less. Only a reported step pays this: with logging.log_interval=10 a run pays a tenth of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings  # noqa: E402

ignore_megatron_warnings()  # before megatron-core

from benchmarks.training_contenders import Ours, Setting  # noqa: E402
from benchmarks.training_step import named_model  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig  # noqa: E402
from spikingbrain_train.config.run import LoggingConfig, Precision  # noqa: E402
from spikingbrain_train.models.linears import spikes  # noqa: E402
from spikingbrain_train.models.linears.spike_statistics import SpikeStatistics  # noqa: E402
from spikingbrain_train.models.linears.whole_model import collect_statistics  # noqa: E402

BOUND = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2_135m_hybrid", help="of conf/model (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="take N layers (default: all)")
    parser.add_argument("--seq-length", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--tokens",
        type=int,
        default=LoggingConfig().transform_statistics_tokens,
        help="that are counted (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    with user_errors():
        sys.exit(measure(arguments))


@dataclass
class Clock:
    """Seconds that timed calls took."""

    device: torch.device
    seconds: float = 0.0

    def now(self) -> float:
        """CPU time of the process; wall time on a GPU, whose work is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which adds to the seconds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - started

        return call

    @contextmanager
    def of_counting(self) -> Iterator[None]:
        """Everything that happens in a step because it is counted."""
        with ExitStack() as stack:
            for owner, name in (
                (spikes.Spikes, "counted"),
                (spikes, "spike_counts"),
                (SpikeStatistics, "add"),
                (SpikeStatistics, "metrics"),
            ):
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name))))
            yield


def measure(arguments: argparse.Namespace) -> int:
    """Print the table; 0 where the claim holds."""
    model = named_model(arguments.model)
    if arguments.layers is not None:
        model = replace(model, num_layers=arguments.layers)  # patterns over layers repeat
    model = replace(model, spiking=SpikingConfig(projections=list(Projection)))
    setting = Setting(
        model,
        hf_folder=None,
        megatron_folder=None,
        weights=None,
        seq_length=arguments.seq_length,
        threads=1,
        device=arguments.device,
        precision=Precision.fp32 if arguments.device == "cpu" else Precision.bf16,
    )
    ours = Ours(setting)
    device = next(ours.model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def step() -> tuple[float, float]:
        tokens = torch.randint(model.vocab_size, (1, arguments.seq_length + 1), generator=generator)
        clock = Clock(device)
        started = clock.now()
        with clock.of_counting():
            with collect_statistics(ours.model, model, device, arguments.tokens) as found:
                ours.step(tokens.to(device))
            for layers in found.values():
                layers[0].counts.copy_(torch.stack([each.counts for each in layers]).sum(0))
                assert layers[0].metrics()["mean_spikes"] > 0, "nothing was counted"
        return clock.now() - started, clock.seconds

    step()  # memory is there, caches are warm
    print("| step | of it counting | share |\n| --- | --- | --- |")
    shares = []
    for _ in range(arguments.steps):
        whole, counting = step()
        shares.append(counting / (whole - counting))
        print(f"| {whole:.3f} s | {1000 * counting:.1f} ms | {shares[-1]:.2%} |", flush=True)
    median = statistics.median(shares)
    print(
        f"\n{arguments.model}, {model.num_layers} layers, {arguments.seq_length} tokens, {arguments.tokens} "
        f"counted: {median:.2%} of a reported step, bound {BOUND:.0%}"
    )
    return 0 if median <= BOUND else 1


if __name__ == "__main__":
    main()
