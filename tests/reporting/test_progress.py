"""What the terminal and the log file show."""

from __future__ import annotations

import io

import pytest

from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.progress import ProgressPrinter, format_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as a person sees them: a carriage return writes over the line."""
        shown = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


def test_line_tells_everything_in_order() -> None:
    metrics = {
        "train/memory_gib": 3.24,
        "train/loss": 3.21456,
        "train/learning_rate": 5e-4,
        "train/grad_norm": 1.234,
        "train/tokens_per_second": 15320.4,
        "train/mfu": 0.2345,
    }
    assert format_progress(20, 1000, metrics, seconds_per_iteration=1.5) == (
        "iteration   20/1000 | loss 3.2146 | lr 5.00e-04 | grad norm 1.23 | 15,320 tokens/s | MFU 23.4%"
        " | 3.2 GiB | ETA 24m 30s"
    )


def test_unknown_values_are_left_out() -> None:
    assert (
        format_progress(100, 100, {"valid/cross_entropy": 2.25}, 1.0)
        == "iteration 100/100 | held-out CE 2.2500"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.6, "1h 00m"),
        (3661, "1h 01m"),
        (86399, "1d 00h"),
        (14 * 86400 + 7200, "14d 02h"),
    ],
)
def test_durations_carry_over(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_log_file_gets_whole_lines_only() -> None:
    stream = io.StringIO()
    printer = ProgressPrinter(3, stream=stream)
    for iteration in (1, 2, 3):
        printer.step(iteration)
    printer.report(3, {"train/loss": 1.0})
    assert stream.getvalue() == "iteration 3/3 | loss 1.0000\n"


def test_terminal_status_makes_room_for_the_line() -> None:
    terminal = Terminal()
    printer = ProgressPrinter(300, stream=terminal, clock=iter(range(100)).__next__)
    printer.step(123)
    assert terminal.screen() == ["iteration 123/300 ..."]
    printer.message("saved")
    printer.step(124)
    assert terminal.screen() == ["saved", "iteration 124/300 ..."]


def test_terminal_status_is_not_rewritten_for_every_step() -> None:
    terminal = Terminal()
    printer = ProgressPrinter(10_000, stream=terminal, clock=iter(x / 1000 for x in range(10_000)).__next__)
    for iteration in range(1, 1001):  # a second's worth
        printer.step(iteration)
    assert terminal.getvalue().count("\r") <= 5
