"""How fast this machine takes the demo's steps: a few of the real ones, on random tokens.

What is measured is the stages' own forward pass, backward pass and optimizer, with the weights' true shapes,
in the precision that a run would take here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.pipelines.demo.budget import Speed
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings
from spikingbrain_train.storage.durable_files import write_text_durably

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

_TOKENS = 512
_WARM_UP_TOKENS = 128
_SECONDS = 2.0
"""A step is repeated for so long."""

_DESCRIPTION = """\
Measure how fast this machine trains and evaluates: some steps of both stages on random tokens, without
writing anything but the result. The demo fits its token counts to it.
"""


def measure_speed_command_line(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-measure-speed."""
    started = time.monotonic()
    parsed = measure_speed_parser().parse_args(arguments)
    with user_errors():
        align, cpt = (to_run_config(compose_run(settings)) for settings in (parsed.align, parsed.cpt))
        speed = measure_speed(align, cpt, started)
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_durably(parsed.output, json.dumps(asdict(speed), indent=2) + "\n")
        print(speed.describe())


def measure_speed_parser() -> argparse.ArgumentParser:
    """The flags of ``spikingbrain-measure-speed``."""
    parser = argparse.ArgumentParser(prog=called_as(), description=_DESCRIPTION)
    for stage in ("align", "cpt"):
        parser.add_argument(
            f"--{stage}",
            nargs="+",
            required=True,
            metavar="NAME=VALUE",
            help=f"settings of the {stage} stage, as spikingbrain-train takes them",
        )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    return parser


def measure_speed(align: RunConfig, cpt: RunConfig, started: float) -> Speed:
    """Take some steps of both stages.

    Args:
        align: the align stage.
        cpt: the stage on all parameters; measured on next-token loss.
        started: ``time.monotonic()`` at the start of the process.

    Raises:
        SpikingBrainError: as spikingbrain-train.
    """
    ignore_megatron_warnings()
    with activity("importing torch and megatron-core"):
        from spikingbrain_train.parallel.process_groups import destroy, initialize
        from spikingbrain_train.planning.precision import PrecisionChoice
        from spikingbrain_train.runtime.accelerator import detect
        from spikingbrain_train.runtime.bf16 import choose_precision

    accelerator = detect(align.cluster.accelerator)
    choice = choose_precision(accelerator)
    if align.precision is not Precision.auto:
        choice = PrecisionChoice(align.precision, "because the config names it")
    align, cpt = (replace(run, precision=choice.precision) for run in (align, cpt))
    cpt.stage = replace(cpt.stage, kind="cpt", distillation=DistillationConfig())
    groups = initialize(align.parallel, accelerator, seed=align.seed)
    try:
        with activity("measuring the speed of the align stage"):
            align_seconds, window_seconds, start_seconds = _measure(align, groups, started)
        with activity("measuring the speed of the cpt stage"):
            cpt_seconds, _, _ = _measure(cpt, groups, started)
    finally:
        destroy()
    return Speed(
        precision=choice.precision.value,
        reason=choice.reason,
        align=align_seconds,
        cpt=cpt_seconds,
        evaluation=window_seconds,
        start=start_seconds,
    )


def _measure(run: RunConfig, groups: ProcessGroups, started: float) -> tuple[float, float, float]:
    """Seconds per token of a step, seconds per token of an evaluation, seconds until the first step."""
    import torch

    from spikingbrain_train.architecture.sequence_layout import SequenceLayout
    from spikingbrain_train.data.loader import MicroBatch
    from spikingbrain_train.evaluation.held_out import held_out_cross_entropy
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.planning.stages.registry import kind_of
    from spikingbrain_train.training.build import build_student, build_teacher, wrap_data_parallel
    from spikingbrain_train.training.optimizer import build_optimizer
    from spikingbrain_train.training.stages.build import stage_class

    kernels = resolve_kernels(
        run.cluster.kernels, groups.accelerator, model=run.model, precision=run.precision
    )
    student = build_student(run, kernels, groups)
    length = min(_TOKENS, run.stage.seq_length)

    def batch(tokens: int) -> MicroBatch:
        ids = torch.randint(run.model.vocab_size, (1, tokens + 1), device=groups.device)
        mask = torch.ones(1, tokens, device=groups.device)
        return MicroBatch(ids[:, :-1], ids[:, 1:], mask, SequenceLayout(tokens))

    stages = {size: replace(run.stage, seq_length=size) for size in (_WARM_UP_TOKENS, length)}
    needs_teacher = kind_of(run.stage).needs_teacher(run.stage)
    teacher = build_teacher(run, kernels, groups) if needs_teacher else None
    steps = {size: stage_class(stage)(stage, groups, teacher) for size, stage in stages.items()}
    steps[length].freeze(student)
    model = wrap_data_parallel(student, run.parallel)
    optimizer = build_optimizer(run.optimizer, run.parallel, run.precision, model)

    def train(tokens: int) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        steps[tokens].forward_backward(model, iter([batch(tokens)]), 1)
        optimizer.step()
        groups.accelerator.synchronize()

    def evaluate() -> None:
        held_out_cross_entropy(
            student, iter([batch(length)]), 1, seq_length=length, micro_batch_size=1, groups=groups
        )

    start = time.monotonic() - started
    train(_WARM_UP_TOKENS)
    return _mean_seconds(lambda: train(length)) / length, _mean_seconds(evaluate) / length, start


def _mean_seconds(act: Callable[[], None]) -> float:
    """Mean wall time of a call, over some seconds and at least one: other load counts, as it will later."""
    begin, calls = time.monotonic(), 0
    while True:
        act()
        calls += 1
        seconds = time.monotonic() - begin
        if seconds >= _SECONDS:
            return seconds / calls
