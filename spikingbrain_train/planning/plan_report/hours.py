"""How long the run takes, and how that is known."""

from __future__ import annotations

from dataclasses import asdict

from spikingbrain_train.planning.duration import Duration, duration_of
from spikingbrain_train.planning.launch import expects_gpu
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.reporting.quantities import hours
from spikingbrain_train.reporting.tables import facts


def time_section(plan: Plan) -> Section:
    """Seconds of a step, hours of the stage, tokens per second.

    Raises:
        DataError: cluster.measured_in names a folder in which no run has measured its speed.
    """
    duration = duration_of(plan)
    values = None if duration is None else asdict(duration)
    return Section("time", values, lambda width: facts([("time", _describe(plan, duration))], width))


def _describe(plan: Plan, duration: Duration | None) -> str:
    cluster = plan.config.cluster
    if duration is None:
        if cluster.mfu is not None or expects_gpu(cluster):
            return "not known without a peak: cluster.peak_tflops=... gives hours"
        return (
            "not known, as no run in output_dir has measured it: cluster.measured_in=<output_dir of another "
            "run>, or cluster.peak_tflops and cluster.mfu, give hours"
        )
    speed, device = duration.speed, "GPU" if expects_gpu(cluster) else "rank"
    rate = f"{speed.tflops:.3g} model TFLOP/s"
    if speed.mfu is not None:
        rate = f"an MFU of {speed.mfu:.1%}, {rate}"
    tokens = _digits(duration.tokens_per_second_per_rank)
    text = (
        f"{_digits(duration.seconds_per_step)} s a step, {hours(duration.hours)} in all = "
        f"{_digits(duration.gpu_hours)} {device}-hours; {tokens} tokens a second and {device}, at {rate}, "
        f"{speed.source}. "
    )
    waits = "Pipeline bubble, recomputation" if len(plan.stages) > 1 else "Recomputation"
    text += f"{waits} and communication are in it, evaluations and checkpoints are not."
    if speed.kind == "assumed" and plan.config.fp8.format is not None:
        text += (
            " That was in bf16: what fp8.format saves is not in it (spikingbrain-plan-parallel reckons it)."
        )
    if speed.kind == "assumed":
        text += " Your own: cluster.mfu=..., or cluster.measured_in=<output_dir> of a run that measured it."
    return text


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
