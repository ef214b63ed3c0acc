"""What a person watching a training run reads: one line per report, and a status in between."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from spikingbrain_train.reporting.activity import StatusLine, format_duration

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


class ProgressPrinter:
    """Prints the progress of one training stage (see :mod:`~spikingbrain_train.reporting.activity`)."""

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
        self.status = StatusLine(sys.stdout if stream is None else stream, clock)

    def step(self, iteration: int) -> None:
        """Show that ``iteration`` is done."""
        self.status.show(f"iteration {iteration}/{self._total} ...")

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """While the body runs, say every few seconds that the current step still does."""
        return self.status.watched()

    def report(
        self, iteration: int, metrics: Mapping[str, float], *, seconds_per_iteration: float | None = None
    ) -> None:
        """Print one line for good.

        Args:
            iteration: optimizer steps done so far.
            metrics: of a report; those that the line does not show are left out.
            seconds_per_iteration: recent time of one step, which the ETA extrapolates; None leaves the ETA
                out.
        """
        self.message(format_progress(iteration, self._total, metrics, seconds_per_iteration))

    def message(self, text: str) -> None:
        """Print any other line (a checkpoint, a warning) without tearing the status."""
        self.status.message(text)


def format_progress(
    iteration: int,
    total_iterations: int,
    metrics: Mapping[str, float],
    seconds_per_iteration: float | None = None,
) -> str:
    """The progress line: ``iteration 20/100 | loss 3.2100 | lr 5.00e-04 | ... | ETA 1m 20s``.

    MFU is given as 0-1.
    """
    parts = [f"iteration {iteration:>{len(str(total_iterations))}}/{total_iterations}"]
    parts += [show(metrics[name]) for name, show in _FIELDS.items() if name in metrics]
    if seconds_per_iteration is not None and iteration < total_iterations:
        parts.append(f"ETA {format_duration((total_iterations - iteration) * seconds_per_iteration)}")
    return " | ".join(parts)
