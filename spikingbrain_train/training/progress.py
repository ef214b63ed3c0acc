"""What a person watching a run reads: one line per report, and on a terminal a status that is updated in
place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

# Metric name -> how it is shown, in this order.
_FIELDS: dict[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {value:.4f}",
    "train/learning_rate": lambda value: f"lr {value:.2e}",
    "train/grad_norm": lambda value: f"grad norm {value:.3g}",
    "train/tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "train/mfu": lambda value: f"MFU {100 * value:.1f}%",
    "train/memory_gib": lambda value: f"{value:.1f} GiB",
    "spiking/k": lambda value: f"k {value:.3g}",
    "valid/cross_entropy": lambda value: f"held-out CE {value:.4f}",
}
_REFRESH_SECONDS = 0.2


class ProgressPrinter:
    """Prints the progress of one training stage.

    Into a file (a Slurm log, a pipe) only whole lines go. On a terminal the current iteration is also shown
    below them, rewritten in place.
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
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._status_width = 0
        self._last_refresh = float("-inf")

    def step(self, iteration: int) -> None:
        """Show on a terminal that ``iteration`` is done; at most five times a second."""
        now = self._clock()
        if self._is_terminal and now - self._last_refresh >= _REFRESH_SECONDS:
            self._last_refresh = now
            status = f"iteration {iteration}/{self._total} ..."
            self._stream.write("\r" + status.ljust(self._status_width))
            self._stream.flush()
            self._status_width = len(status)

    def report(
        self, iteration: int, metrics: Mapping[str, float], *, seconds_per_iteration: float | None = None
    ) -> None:
        """Print one line for good.

        Args:
            iteration: optimizer steps done so far.
            metrics: the point that :meth:`MetricsLogger.log` takes; names without a place in the line are
                left out.
            seconds_per_iteration: recent time of one step, which the ETA extrapolates; None leaves the ETA
                out.
        """
        self.message(format_progress(iteration, self._total, metrics, seconds_per_iteration))

    def message(self, text: str) -> None:
        """Print any other line (a checkpoint, a warning) without tearing the status."""
        if self._status_width:
            self._stream.write("\r" + " " * self._status_width + "\r")
            self._status_width = 0
        self._stream.write(text + "\n")
        self._stream.flush()


def format_progress(
    iteration: int,
    total_iterations: int,
    metrics: Mapping[str, float],
    seconds_per_iteration: float | None = None,
) -> str:
    """The progress line: ``iteration 20/100 | loss 3.2100 | lr 5.00e-04 | ... | ETA 1m 20s``. MFU is given
    as 0-1."""
    parts = [f"iteration {iteration:>{len(str(total_iterations))}}/{total_iterations}"]
    parts += [show(metrics[name]) for name, show in _FIELDS.items() if name in metrics]
    if seconds_per_iteration is not None and iteration < total_iterations:
        parts.append(f"ETA {format_duration((total_iterations - iteration) * seconds_per_iteration)}")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """``45s``, ``3m 05s``, ``2h 07m`` or ``3d 04h``: the two largest units, rounded to the smaller of
    them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"
