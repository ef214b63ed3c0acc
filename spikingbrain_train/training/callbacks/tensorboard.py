"""A run's curves for TensorBoard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikingbrain_train.config.yaml_files import yaml_of
from spikingbrain_train.training.beginning import Beginning
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class TensorBoard(Callback):
    """Writes events to ``<output_dir>/tensorboard`` where ``logging.tensorboard`` asks for them.

    A run that goes on from iteration N hides the points that an earlier attempt wrote beyond N. Under "text"
    stand its config and, where it went on, what has changed.
    """

    _writer: Any = None

    def start(self) -> None:
        config, iteration = self.run.config, self.run.state.iteration
        if config.logging.tensorboard and self.run.groups.is_main_process:
            # Imported here because it costs a second or two, on one rank only.
            from torch.utils.tensorboard import SummaryWriter

            first = iteration + 1 if iteration else 0
            self._writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=first)
            if self.run.beginning.is_start or not self.run.is_last_step:
                self._note(self.run.beginning)

    def log(self, report: Report) -> None:
        if self._writer is None:
            return
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.iteration)
        for name, table in report.heat_maps.items():
            self._writer.add_figure(name, table.draw(), report.iteration)

    def _note(self, beginning: Beginning) -> None:
        # Markdown: two blanks and a line break end a line, four blanks in front keep text as it is.
        lines = "  \n".join(f"{name}: {text}" for name, text in beginning.rows)
        self._writer.add_text(f"run/{beginning.name}", lines, beginning.iteration)
        config = yaml_of(asdict(self.run.config)).replace("\n", "\n    ")
        self._writer.add_text("run/config", f"    {config}", beginning.iteration)

    def end(self, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
