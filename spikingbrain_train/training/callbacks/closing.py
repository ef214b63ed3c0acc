"""The last lines of a run: what came out, where it lies, and what to do with it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from spikingbrain_train.architecture.layers import feed_forwards_of, mixers_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.token_history import describe_end
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

_TOTAL = "valid/cross_entropy"


class Closing(Callback):
    """Says at the end of a finished run its losses, its speed, where its checkpoint lies, what is next."""

    def start(self) -> None:
        self._began = time.monotonic()
        self._first, self._samples = self.run.state.iteration, self.run.state.consumed_samples
        self._speeds: list[float] = []
        self._in_steps = 0.0
        self._reported = self._first
        self._checkpoints = 0
        self._checkpoint: Path | None = None

    def log(self, report: Report) -> None:
        if report.seconds_per_iteration:
            self._speeds.append(report.metrics["train/tokens_per_second"])
            self._in_steps += report.seconds_per_iteration * (report.iteration - self._reported)
            self._reported = report.iteration

    def after_save(self, folder: Path) -> None:
        self._checkpoint = folder
        self._checkpoints += 1

    def end(self, error: BaseException | None) -> None:
        run = self.run
        if error is None and self._checkpoint is not None and run.is_last_step and run.groups.is_main_process:
            run.console.rows([*self._results(), ("checkpoint", str(self._checkpoint))])
            run.console.rows([*self._next()], wrapped=False)

    def _results(self) -> Iterator[tuple[str, str]]:
        run = self.run
        steps = run.state.iteration - self._first
        tokens = (run.state.consumed_samples - self._samples) * run.config.stage.seq_length
        # The first step builds and tunes kernels, for minutes on a GPU: the median does not ask about it.
        speed = f", {median(self._speeds):,.0f} tokens/s (median of its reports)" if self._speeds else ""
        seconds = time.monotonic() - self._began
        yield "finished", f"{steps:,} steps, {quantity(tokens)} tokens in {format_duration(seconds)}{speed}"
        whole = run.console.start_times.until_now()
        count = self._checkpoints
        yield (
            "time",
            f"{self._in_steps / whole:.1%} of {format_duration(whole)} since the start went into steps, the "
            f"rest on starting, evaluating and {count} checkpoint{'' if count == 1 else 's'}",
        )
        if run.record.history is not None:
            own = run.state.consumed_samples * run.config.stage.seq_length
            yield "tokens", describe_end(run.record.history, own)
        points = read_metrics(run.config.output_dir)
        losses = [point["train/loss"] for point in points if point.get("train/loss") is not None]
        if losses:
            lowest = min(losses)
            best = "" if losses[-1] == lowest else f"; the lowest reported was {lowest:.4f}"
            yield "loss", f"{losses[-1]:.4f} in the last step{best}"
        evaluations = [point for point in points if point.get(_TOTAL) is not None]
        if evaluations:
            before, after = evaluations[0], evaluations[-1]
            text = f"cross entropy {_course(before, after, _TOTAL)}"
            prefix = f"{_TOTAL}/"
            parts = [name for name in after if name.startswith(prefix)]
            if len(parts) > 1:
                each = [f"{name.removeprefix(prefix)} {_course(before, after, name)}" for name in parts]
                text += f" ({', '.join(each)})"
            yield "held out", text

    def _next(self) -> Iterator[tuple[str, str]]:
        config, folder = self.run.config, Path(self.run.config.output_dir)
        checkpoints = str(folder / CHECKPOINT_FOLDER)
        following = kind_of(config.stage).next_stage
        commands = []
        if following is not None:
            load = shlex.quote(f"checkpoint.load={checkpoints}")
            commands.append(f"spikingbrain-train {following} {load} output_dir=... data.train=[...]")
        if config.data.valid:
            model, data = shlex.quote(checkpoints), shlex.join(config.data.valid)
            length = config.stage.seq_length
            commands.append(f"spikingbrain-evaluate --model {model} --data {data} --seq-length {length}")
        if following is None and _may_be_exported(config.model):
            export = shlex.join(["--checkpoint", checkpoints, "--output", str(folder / "export")])
            commands.append(f"spikingbrain-export {export}")
        for number, command in enumerate(commands):
            yield "" if number else "next", command


def _course(before: dict[str, float], after: dict[str, float], name: str) -> str:
    if before is after or before.get(name) is None:
        return f"{after[name]:.4f}"
    return f"{before[name]:.4f} -> {after[name]:.4f}"


def _may_be_exported(model: ModelConfig) -> bool:
    """Whether some Hugging Face format has a place for every kind of layer; the export knows the rest."""
    kinds = [*mixers_of(model), *feed_forwards_of(model)]
    return bool(set(kinds[0].hf_layers).intersection(*(kind.hf_layers for kind in kinds)))
