"""The schedules of what is done to a model's linears, and what is counted of it on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from spikingbrain_train.architecture.linear_transforms import LinearTransformKind, transforms_of
from spikingbrain_train.models.linears.linear_transform import TransformStatistics
from spikingbrain_train.models.linears.whole_model import collect_statistics, set_attributes, transform_class
from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate
from spikingbrain_train.training.callbacks.schedule import Schedule
from spikingbrain_train.training.report import Report


class LinearTransformSchedules(Schedule):
    """What each kind's schedule says: ``spiking/k``."""

    def __init__(self) -> None:
        self._values: dict[str, Mapping[str, float]] = {}

    def _set(self) -> None:
        config, state = self.run.config, self.run.state
        for kind in transforms_of(config.model):
            values = kind.schedule(config.model, config.stage, state.iteration)
            set_attributes(state.model, kind.name, values)
            self._values[kind.name] = values

    def _add_to(self, report: Report) -> None:
        for kind in transforms_of(self.run.config.model):
            _add(report, kind, self._values[kind.name])


class LinearTransformStatistics(Callback):
    """Counts what each kind does in every evaluation, and reports it: ``spiking/sparsity`` and the like.

    Of each layer, too: that of the first is ``spiking/sparsity/layer_0``. In the steps between, those that
    are reported, a few tokens are counted: ``spiking/train_sparsity``.
    """

    def __init__(self) -> None:
        self._counting = ExitStack()

    def step_begin(self) -> None:
        config, step = self.run.config, self.run.state.iteration + 1
        is_reported = step >= config.stage.train_iters or step % config.logging.log_interval == 0
        if is_reported and config.logging.transform_statistics_tokens > 0:
            self._count(config.logging.transform_statistics_tokens)

    def update_skipped(self, skipped: SkipUpdate) -> None:
        self._counting.close()  # nothing is reported of the step

    def report_due(self, report: Report) -> None:
        if self.run.config.logging.transform_statistics_tokens == 0:
            return
        self._counting.close()
        for kind in transforms_of(self.run.config.model):
            if (layers := self._statistics.get(kind.name)) is not None:
                counts = torch.stack([each.counts for each in layers]).sum(0)
                torch.distributed.all_reduce(counts)
                if counts.any():  # else the stage runs none of the transformed linears
                    metrics = _with_counts(kind, counts).metrics()
                    _add(report, kind, {f"train_{name}": value for name, value in metrics.items()})

    def before_evaluation(self) -> None:
        self._count(None)

    def _count(self, tokens: int | None) -> None:
        run = self.run
        collecting = collect_statistics(run.state.model, run.config.model, run.groups.device, tokens)
        self._statistics = self._counting.enter_context(collecting)

    def after_evaluation(self, report: Report) -> None:
        self._counting.close()
        for kind in transforms_of(self.run.config.model):
            if (layers := self._statistics.get(kind.name)) is not None:
                counts = torch.stack([each.counts for each in layers])
                torch.distributed.all_reduce(counts)
                whole = _with_counts(kind, counts.sum(0))
                _add(report, kind, whole.metrics())
                for number, counted in enumerate(counts):
                    if counted.any():  # else nothing in this layer is transformed
                        of_layer = _with_counts(kind, counted).metrics()
                        _add(report, kind, {f"{name}/layer_{number}": of_layer[name] for name in of_layer})

    def end(self, error: BaseException | None) -> None:
        self._counting.close()


def _with_counts(kind: LinearTransformKind, counts: torch.Tensor) -> TransformStatistics:
    statistics = transform_class(kind).new_statistics(counts.device)
    assert statistics is not None, f"{kind.name} counted something"
    statistics.counts.add_(counts)
    return statistics


def _add(report: Report, kind: LinearTransformKind, metrics: Mapping[str, float]) -> None:
    shown = transform_class(kind).shown
    for name, value in metrics.items():
        report.add(f"{kind.name}/{name}", value, shown.get(name))
