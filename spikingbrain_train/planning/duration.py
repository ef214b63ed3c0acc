"""How long a run takes: its FLOPs over how many a rank gets done in a second. Pure Python: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.launch import expects_gpu
from spikingbrain_train.planning.planner import Plan, pipeline_bubble
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics

TFLOPS_METRIC = "train/tflops"

REPORTED_MFU = {AcceleratorKind.metax: (0.234, "MetaX C550"), AcceleratorKind.cuda: (0.258, "A800")}
"""MFU of SpikingBrain-7B at 8k by platform (arXiv 2509.05276, section 5.4)."""
_REPORTED_BUBBLE = pipeline_bubble(stages=4, micro_batches=512 // (8 * 2))
"""Of that run: DP 8 x PP 4, micro-batches of 2, 512 sequences a step."""


@dataclass(frozen=True)
class Speed:
    """What one rank gets done."""

    tflops: float
    """Model TFLOP/s, over the whole time of a step: bubble, recomputation and communication are in it."""
    mfu: float | None
    """The same as a share of cluster.peak_tflops; None where no peak is stated."""
    kind: str
    """``stated``, ``measured`` or ``assumed``."""
    source: str
    """Where it is from, in words behind it."""


@dataclass(frozen=True)
class Duration:
    """How long the stage takes, without evaluations, checkpoints and failures."""

    speed: Speed
    seconds_per_step: float
    hours: float
    gpu_hours: float
    tokens_per_second_per_rank: float


def duration_of(plan: Plan) -> Duration | None:
    """How long a planned run takes; None where nothing says how fast a rank is.

    Raises:
        DataError: cluster.measured_in names a folder in which no run has measured its speed.
    """
    speed = speed_of(plan)
    if speed is None:
        return None
    per_rank = speed.tflops * 1e12 / plan.flops_per_token
    seconds = plan.tokens_per_step / (per_rank * plan.world_size)
    # Pipeline stages start one after the other.
    start = plan.start_flops / (speed.tflops * 1e12 * plan.world_size) * len(plan.stages)
    steps = plan.total_tokens / plan.tokens_per_step if plan.config.stage.train_iters else 0
    hours = (start + seconds * steps) / 3600
    return Duration(speed, seconds, hours, hours * plan.world_size, per_rank)


def speed_of(plan: Plan) -> Speed | None:
    """The speed of a rank: as stated, as measured by an earlier run, or as SpikingBrain's report has it.

    Raises:
        DataError: cluster.measured_in names a folder in which no run has measured its speed.
    """
    cluster = plan.config.cluster
    peak = cluster.peak_tflops
    if cluster.mfu is not None:
        stated = f"stated by cluster.mfu={cluster.mfu:g}"
        return None if peak is None else Speed(cluster.mfu * peak, cluster.mfu, "stated", stated)
    measured = _measured(plan)
    if measured is not None:
        folder, tflops = measured
        share = None if peak is None else tflops / peak
        return Speed(tflops, share, "measured", f"measured by the run in {folder}")
    if peak is None or not expects_gpu(cluster):
        return None
    reported, device = REPORTED_MFU.get(cluster.accelerator, REPORTED_MFU[AcceleratorKind.cuda])
    mfu = reported * (1 - plan.pipeline_bubble) / (1 - _REPORTED_BUBBLE)
    report = f"arXiv 2509.05276, section 5.4: {reported:.1%}"
    source = f"assumed, since SpikingBrain-7B reached it on {device} ({report})"
    if plan.pipeline_bubble != _REPORTED_BUBBLE:
        source += f" with a pipeline bubble of {_REPORTED_BUBBLE:.1%}; here it is {plan.pipeline_bubble:.1%}"
    return Speed(mfu * peak, mfu, "assumed", source)


def _measured(plan: Plan) -> tuple[str, float] | None:
    """An earlier run's folder, and the model TFLOP/s of one of its ranks."""
    named, own = plan.config.cluster.measured_in, plan.config.output_dir
    folder = named if named is not None else own
    if named is None and not (Path(own) / METRICS_FILE).is_file():
        return None
    try:
        points = read_metrics(folder)
    except DataError as error:
        if named is None:  # of use to a plan, but no part of what it is asked for
            return None
        raise DataError(f"cluster.measured_in={named} cannot be used: {error}") from error
    found = [point[TFLOPS_METRIC] for point in points if point.get(TFLOPS_METRIC)]
    if found:
        return folder, median(found[1:] or found)  # the first interval has compilation and warm-up in it
    if named is not None:
        raise DataError(
            f"cluster.measured_in={named} has no {TFLOPS_METRIC} in its {METRICS_FILE}; name a run that has "
            f"logged steps with this release"
        )
    return None
