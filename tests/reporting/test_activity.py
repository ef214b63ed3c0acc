"""Whatever takes long says that it still runs: on a terminal in place, in a log with a line now and then."""

from __future__ import annotations

import io
import time

import pytest

from spikingbrain_train.reporting import activity as module
from spikingbrain_train.reporting.activity import StatusLine, activity


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticked(status: StatusLine, clock: Clock, seconds: float) -> None:
    """Let time pass as the watching thread does."""
    for _ in range(round(seconds * 2)):
        clock.seconds += 0.5
        status.tick()


def silences(stream: io.StringIO, status: StatusLine, clock: Clock, seconds: float) -> list[float]:
    """Times between lines while ``seconds`` pass."""
    written, times = stream.getvalue(), [clock.seconds]
    for _ in range(round(seconds * 2)):
        ticked(status, clock, 0.5)
        if stream.getvalue() != written:
            written = stream.getvalue()
            times.append(clock.seconds)
    return [after - before for before, after in zip(times, [*times[1:], clock.seconds], strict=True)]


def test_a_log_is_never_silent_for_more_than_five_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    status = StatusLine(stream, clock)
    status.show("evaluating 3 of 12 windows ...")
    assert max(silences(stream, status, clock, 60)) <= 5
    assert stream.getvalue().splitlines()[0] == "evaluating 3 of 12 windows ... 4s"


def test_a_log_of_weeks_gets_a_line_a_minute() -> None:
    stream, clock = io.StringIO(), Clock()
    status = StatusLine(stream, clock)
    status.show("iteration 7/100000 ...")
    ticked(status, clock, 20 * 60)
    later = silences(stream, status, clock, 600)
    assert 60 <= max(later) <= 65 and len(later) <= 12


def test_lines_that_come_anyway_keep_the_status_out_of_a_log() -> None:
    stream, clock = io.StringIO(), Clock()
    status = StatusLine(stream, clock)
    for iteration in range(20):
        status.show(f"iteration {iteration}/20 ...")
        ticked(status, clock, 3)
        status.message(f"iteration {iteration}/20 | loss 1.0")
    assert stream.getvalue().count("\n") == 20 and "..." not in stream.getvalue()


def test_a_terminal_shows_the_status_at_once_and_how_long_it_has_stood() -> None:
    terminal, clock = Terminal(), Clock()
    status = StatusLine(terminal, clock)
    status.show("saving ...")
    assert terminal.getvalue().endswith("saving ...") and "\n" not in terminal.getvalue()
    ticked(status, clock, 3)
    assert terminal.getvalue().endswith("saving ... 3s")


def test_one_long_call_is_reported_from_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.01)
    stream = io.StringIO()
    with StatusLine(stream).activity("loading the model"):
        deadline = time.monotonic() + 60
        while stream.getvalue().count("loading the model ...") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    said = stream.getvalue()
    assert said.count("loading the model ...") >= 2
    time.sleep(0.1)
    assert stream.getvalue() == said, "it goes on after the end"


def test_an_activity_counts_and_gives_the_line_back() -> None:
    stream, clock = io.StringIO(), Clock()
    status = StatusLine(stream, clock)
    status.show("iteration 5/9 ...")
    with status.activity("evaluating", 3, "windows") as current:
        assert list(current.over("ab")) == ["a", "b"]
        ticked(status, clock, 4)
    ticked(status, clock, 4)
    assert stream.getvalue().splitlines() == ["evaluating 2 of 3 windows ... 4s", "iteration 5/9 ... 8s"]


def test_what_is_counted_says_since_when_and_how_long_it_will_take() -> None:
    log, terminal, clock = io.StringIO(), Terminal(), Clock()
    for stream in (log, terminal):
        clock.seconds = 100.0
        status = StatusLine(stream, clock)
        with status.activity("evaluating", 15, "windows") as current:
            for _ in current.over("abcde"):
                ticked(status, clock, 2)
            ticked(status, clock, 2)
    assert log.getvalue().splitlines()[-1] == "evaluating 5 of 15 windows ... 12s, about 18s left"
    assert "[#######.............] evaluating 5 of 15 windows ... 12s, about 18s left" in terminal.getvalue()


def test_bytes_are_shown_as_megabytes() -> None:
    stream, clock = io.StringIO(), Clock()
    status = StatusLine(stream, clock)
    with status.activity("importing", 269_000_000, "B") as current:
        current.advance(27_000_000)
        ticked(status, clock, 4)
    assert stream.getvalue() == "importing 27 of 269 MB ... 4s\n"


def test_what_is_quick_or_not_shown_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with activity("opening", 2, "files") as current:
        current.advance()
    with activity("opening", shown=False) as current:
        current.advance()
    assert capsys.readouterr() == ("", "")


def test_short_activities_in_a_row_are_no_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.3)
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.01)
    begin = time.monotonic()
    while time.monotonic() - begin < 1.5:
        with activity("loading one of many"):
            time.sleep(0.1)
    assert "loading one of many ..." in capsys.readouterr().err
