"""What the terminal and the log file show."""

from __future__ import annotations

import io
import math

import pytest

from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.progress import ProgressPrinter, Shown

LOSS = Shown("loss", "{:.4f}")
RATE = Shown("lr", "{:.2e}")
SPEED = Shown("", "{:,.0f} tokens/s")


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


def test_line_has_what_is_shown_in_its_order_and_nothing_else() -> None:
    stream = io.StringIO()
    metrics = {"speed": 15320.4, "loss": 3.21456, "hidden": 1.0, "rate": 5e-4, "mfu": 0.2345}
    shown = {"loss": LOSS, "rate": RATE, "not there": LOSS, "speed": SPEED, "mfu": Shown("MFU", "{:.1%}")}
    ProgressPrinter(1000, stream=stream).report(20, metrics, shown, seconds_per_iteration=1.5)
    assert stream.getvalue() == (
        "iteration   20/1000 | loss 3.2146 | lr 5.00e-04 | 15,320 tokens/s | MFU 23.4% | ETA 24m 30s\n"
    )


def test_numbers_of_lines_stand_below_each_other() -> None:
    stream = io.StringIO()
    printer = ProgressPrinter(100, stream=stream)
    for iteration, (loss, speed) in enumerate([(11.25, 980.0), (9.5, 1020.0), (math.nan, 995.0)], start=98):
        printer.report(iteration, {"loss": loss, "speed": speed}, {"loss": LOSS, "speed": SPEED})
    assert stream.getvalue().splitlines() == [
        "iteration  98/100 | loss 11.2500 | 980 tokens/s",
        "iteration  99/100 | loss  9.5000 | 1,020 tokens/s",
        "iteration 100/100 | loss     nan |   995 tokens/s",
    ]


def test_the_last_step_has_no_time_left() -> None:
    stream = io.StringIO()
    ProgressPrinter(100, stream=stream).report(100, {"loss": 2.25}, {"loss": LOSS}, seconds_per_iteration=1.0)
    assert stream.getvalue() == "iteration 100/100 | loss 2.2500\n"


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
    printer.report(3, {"loss": 1.0}, {"loss": LOSS})
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


def test_the_first_step_is_said_while_it_lasts_and_why_it_takes_long_on_a_gpu() -> None:
    for builds_kernels, why in ((True, ": building and tuning kernels, which can take minutes"), (False, "")):
        stream, now = io.StringIO(), [0.0]
        printer = ProgressPrinter(100, stream=stream, clock=lambda now=now: now[0])
        printer.first_step(41, builds_kernels=builds_kernels)
        now[0] = 190.0
        printer.status.tick()
        assert stream.getvalue() == f"iteration 41/100, the first of this start{why} ... 3m 10s\n"
