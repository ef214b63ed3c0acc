"""Distillation from a cache of the teacher's logits against the online teacher: loss curve, cost of a step.

    python benchmarks/teacher_cache.py --experiment smollm2_cpt --set checkpoint.load=... stage.teacher=... \\
        'data.train=[...]' --steps 12 --top-k 64 --tail-samples 64

Short runs from the same weights over the same tokens: next-token loss (the student alone), pure KL from the
online teacher, pure KL from each cache. Time is CPU time of the process, so that other load on the machine
does not count (on a GPU it is wall time, and steps wait for the device); of each run the best step counts,
because a processor that is shared is slower for all of them, but not always.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.parallel.agreed_precision import agree_on_precision
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.planning.teacher_cache_request import request_cache
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.teacher_cache import write_cache_on
from spikingbrain_train.training.trainer import Trainer

CURVES = ("train/loss", "train/cross_entropy", "train/kl_divergence")


class Clock(Callback):
    """Seconds of every step."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        self.seconds: list[float] = []

    def _now(self) -> float:
        if not self._groups.accelerator.is_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step_begin(self) -> None:
        self._begin = self._now()

    def step_end(self) -> None:
        self.seconds.append(self._now() - self._begin)


def train(groups: ProcessGroups, config: RunConfig, folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds and losses of every step; what the run wrote is removed."""
    clock = Clock(groups)
    Trainer(replace(config, output_dir=str(folder)), groups, [clock]).train()
    points = [{name: point.get(name) for name in CURVES} for point in read_metrics(folder)]
    shutil.rmtree(folder)
    return clock.seconds, points


@user_errors()
def main() -> None:
    """Measure, and print the table as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="smollm2_cpt")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the run")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--top-k", type=int, nargs="+", default=[64])
    parser.add_argument("--tail-samples", type=int, nargs="+", default=[64], help="one for each --top-k")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    parsed = parser.parse_args()
    named = [f"experiment={parsed.experiment}", *parsed.set, f"stage.train_iters={parsed.steps}"]
    always = [
        "output_dir=unused",
        "stage.distillation.weight=null",
        "logging.log_interval=1",
        "data.valid=[]",
    ]
    config = to_run_config(compose_run([*named, *always, "logging.tensorboard=false"]))
    groups = initialize(config.parallel, detect(config.cluster.accelerator), seed=config.seed)
    folder = Path(tempfile.mkdtemp(prefix="teacher_cache_"))
    try:
        config = replace(config, precision=agree_on_precision(config, groups).precision)
        found = measure(groups, config, folder, list(zip(parsed.top_k, parsed.tail_samples, strict=True)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        destroy()
    found["tokens_per_step"] = config.stage.global_batch_size * config.stage.seq_length
    print(json.dumps(found, indent=2))
    if parsed.output is not None:
        parsed.output.write_text(json.dumps(found, indent=2) + "\n")


def measure(
    groups: ProcessGroups, config: RunConfig, folder: Path, kept: list[tuple[int, int]]
) -> dict[str, Any]:
    """The runs, one after the other."""
    alone = replace(config, stage=replace(config.stage, kind="cpt"))
    seconds_alone, _ = train(groups, alone, folder / "alone")
    seconds_online, online = train(groups, config, folder / "online")
    found: dict[str, Any] = {"online": online, "caches": []}
    found["step"] = {"student alone": min(seconds_alone), "online": min(seconds_online)}
    for top, drawn in kept:
        cache = folder / f"cache_{top}_{drawn}"
        request = request_cache(config, cache, top=top, drawn=drawn, world_size=groups.world_size)
        write_cache_on(groups, request)
        distillation = DistillationConfig(cache=str(cache))
        stage = replace(config.stage, teacher=None, distillation=distillation)
        seconds, points = train(groups, replace(config, stage=stage), folder / "cached")
        differences = {
            name: [ours[name] - theirs[name] for ours, theirs in zip(points, online, strict=True)]
            for name in CURVES
        }
        found["caches"].append(
            {
                "top": top,
                "drawn": drawn,
                "bytes_per_token": request.layout.token_bytes,
                "step": min(seconds),
                "against_student_alone": min(seconds) / min(seconds_alone),
                "mean_difference": {name: mean(values) for name, values in differences.items()},
                "largest_difference": {name: max(map(abs, each)) for name, each in differences.items()},
                "curve": points,
            }
        )
        shutil.rmtree(cache)
    return found


if __name__ == "__main__":
    main()
