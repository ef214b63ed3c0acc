"""What a person watching a training run reads: one line per report, and a status in between."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from spikingbrain_train.reporting.activity import StatusLine, format_duration


@dataclass(frozen=True)
class Shown:
    """How the progress line shows a metric; who reports the metric says so, and most are not shown."""

    label: str
    """In front of the number, as short as can be: ``loss``; empty where the format says enough."""
    format: str = "{:.4g}"
    """Of the number, with its unit: ``{:,.0f} tokens/s``."""

    def cell(self, value: float, width: int = 0) -> str:
        """``loss 3.2146``, the number filled up with blanks to ``width``."""
        number = f"{self.format.format(value):>{width}}"
        return f"{self.label} {number}" if self.label else number


class ProgressPrinter:
    """Prints the progress of one training stage (see :mod:`~spikingbrain_train.reporting.activity`).

    A number is as wide as the widest that its metric has had, so that lines stand one below the other.
    """

    def __init__(
        self,
        total_iterations: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to print.

        Args:
            total_iterations: optimizer steps of the stage.
            stream: where to; standard output by default.
            clock: returns seconds.
        """
        self._total = total_iterations
        self._widths: dict[str, int] = {}
        self.status = StatusLine(sys.stdout if stream is None else stream, clock)

    def first_step(self, iteration: int, *, builds_kernels: bool) -> None:
        """Show that ``iteration``, the first of this process, runs.

        Args:
            iteration: counted from 1.
            builds_kernels: whether it builds and tunes kernels: on GPUs, for minutes where none are cached.
        """
        why = ": building and tuning kernels, which can take minutes" if builds_kernels else ""
        self.status.show(f"iteration {iteration}/{self._total}, the first of this start{why} ...")

    def step(self, iteration: int) -> None:
        """Show that ``iteration`` is done."""
        self.status.show(f"iteration {iteration}/{self._total} ...")

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """While the body runs, say every few seconds that the current step still does."""
        return self.status.watched()

    def report(
        self,
        iteration: int,
        metrics: Mapping[str, float],
        shown: Mapping[str, Shown],
        *,
        seconds_per_iteration: float | None = None,
    ) -> None:
        """Print one line for good: ``iteration 20/100 | loss 3.2100 | lr 5.00e-04 | ... | ETA 1m 20s``.

        Args:
            iteration: optimizer steps done so far.
            metrics: of a report.
            shown: those of them that the line shows, in this order, and how.
            seconds_per_iteration: recent time of one step, which the ETA extrapolates; None leaves the ETA
                out.
        """
        parts = [f"iteration {iteration:>{len(str(self._total))}}/{self._total}"]
        for name, how in shown.items():
            if name in metrics:
                width = max(self._widths.get(name, 0), len(how.format.format(metrics[name])))
                self._widths[name] = width
                parts.append(how.cell(metrics[name], width))
        if seconds_per_iteration is not None and iteration < self._total:
            parts.append(f"ETA {format_duration((self._total - iteration) * seconds_per_iteration)}")
        self.message(" | ".join(parts))

    def message(self, text: str) -> None:
        """Print any other line (a checkpoint, a warning) without tearing the status."""
        self.status.message(text)
