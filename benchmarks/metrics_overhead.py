"""Claim: with every metric on, what a run does to report takes at most 2 % of its steps.

The trainer itself takes steps of a model whose projections all read spikes and whose every second layer has
experts, on Python's documentation. Timed is everything that a run without reports would not do: whole reports
(reduced losses, norms, spikes, experts, speed, times of ranks, the metrics file, TensorBoard, the console),
the hooks of what reports in all other steps, and the counting of spikes within the pass. In CPU time, which
other work on the machine moves less than wall time. Evaluations and checkpoints are no metrics of steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings  # noqa: E402

ignore_megatron_warnings()  # before megatron-core

from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig  # noqa: E402
from spikingbrain_train.config.parallel import ClusterConfig  # noqa: E402
from spikingbrain_train.config.run import LoggingConfig, RunConfig  # noqa: E402
from spikingbrain_train.config.stage import StageConfig  # noqa: E402
from spikingbrain_train.models.linears import spikes  # noqa: E402
from spikingbrain_train.models.linears.spike_statistics import SpikeStatistics  # noqa: E402
from spikingbrain_train.parallel.process_groups import destroy, initialize  # noqa: E402
from spikingbrain_train.runtime.accelerator import detect  # noqa: E402
from spikingbrain_train.training.callbacks.expert_load import ExpertLoadReport  # noqa: E402
from spikingbrain_train.training.callbacks.linear_transforms import LinearTransformStatistics  # noqa: E402
from spikingbrain_train.training.callbacks.progress_lines import ProgressLines  # noqa: E402
from spikingbrain_train.training.callbacks.slow_ranks import SlowRanks  # noqa: E402
from spikingbrain_train.training.callbacks.speed import Speed  # noqa: E402
from spikingbrain_train.training.callbacks.start_up import StartUp  # noqa: E402
from spikingbrain_train.training.trainer import Trainer  # noqa: E402
from tests.distributed.small_runs import MODEL_76B, run_config, write_text  # noqa: E402

BOUND = 0.02
WARM_UP = 10
REPORTING = (LinearTransformStatistics, ExpertLoadReport, ProgressLines, SlowRanks, Speed, StartUp)
HOOKS = ("step_begin", "vote", "agreed", "step_end")
COUNTING = (
    (spikes.Spikes, "counted"),
    (spikes, "spike_counts"),
    (SpikeStatistics, "add"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seq-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--log-interval", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="behind the warm-up (default: %(default)s)")
    arguments = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        sys.exit(measure(arguments, Path(folder)))


class Clock:
    """CPU seconds of the outermost of timed calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which adds to the seconds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.process_time() - started

        return call


def configured(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """Every second layer with experts, spikes in front of all projections."""
    size = arguments.hidden_size
    model = replace(
        MODEL_76B,
        num_layers=arguments.layers,
        hidden_size=size,
        ffn_hidden_size=3 * size,
        num_attention_heads=size // 32,
        num_query_groups=size // 64,
        kv_channels=32,
        sliding_window=128,
        max_position_embeddings=arguments.seq_length + 128,
        spiking=SpikingConfig(projections=list(Projection)),
    )
    config = run_config(folder / "run", write_text(folder), model=model)
    config.cluster = ClusterConfig(peak_tflops=0.1)
    config.stage = StageConfig(
        train_iters=WARM_UP + arguments.steps + 1,
        seq_length=arguments.seq_length,
        global_batch_size=1,
        micro_batch_size=1,
    )
    config.logging = LoggingConfig(log_interval=arguments.log_interval, tensorboard=True)
    return config


def measure(arguments: argparse.Namespace, folder: Path) -> int:
    """Print the table; 0 where the claim holds."""
    config = configured(arguments, folder)
    groups = initialize(config.parallel, detect("cpu"), seed=1234)
    torch.set_num_threads(1)
    clock = Clock()
    steps: list[tuple[float, float]] = []
    try:
        with ExitStack() as patched:
            for owner, name in ((Trainer, "_report_step"), *COUNTING):
                patched.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name))))
            for kind in REPORTING:
                for name in set(HOOKS) & set(vars(kind)):
                    patched.enter_context(patch.object(kind, name, clock.timed(getattr(kind, name))))
            trainer = Trainer(config, groups)
            step = trainer._step

            def timed_step(batches: Any) -> None:
                before, started = clock.seconds, time.process_time()
                step(batches)
                steps.append((time.process_time() - started, clock.seconds - before))

            trainer._step = timed_step  # type: ignore[method-assign]
            trainer.train()
    finally:
        destroy()
    counted = steps[WARM_UP:-1]  # the last step also saves
    whole, reporting = sum(each for each, _ in counted), sum(each for _, each in counted)
    share = reporting / (whole - reporting)
    reported = max(part for _, part in counted)
    print(
        f"\n| steps | CPU time of a step | of a step for metrics | most of one step | share |\n"
        f"| --- | --- | --- | --- | --- |\n"
        f"| {len(counted)}, every {arguments.log_interval}. reported | {whole / len(counted):.3f} s | "
        f"{1000 * reporting / len(counted):.1f} ms | {1000 * reported:.1f} ms | {share:.2%} |\n\n"
        f"bound {BOUND:.0%}"
    )
    return 0 if share <= BOUND else 1


if __name__ == "__main__":
    main()
