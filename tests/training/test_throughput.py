"""Tokens per second, MFU and the measured peak."""

from __future__ import annotations

import timeit

import pytest
import torch

from spikingbrain_train.training import throughput
from spikingbrain_train.training.throughput import (
    Throughput,
    ThroughputTimer,
    _fastest,
    measure_peak_tflops,
    model_flops_utilization,
)


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_pauses_are_left_out_even_when_nested() -> None:
    clock = FakeClock()
    timer = ThroughputTimer(clock)
    clock.seconds += 4
    timer.step(tokens=1000)
    with timer.pause():
        clock.seconds += 50
        with timer.pause():
            clock.seconds += 7
    clock.seconds += 1
    timer.step(tokens=1000)
    interval = timer.interval()
    assert interval == Throughput(iterations=2, tokens=2000, seconds=5)
    assert interval.tokens_per_second == 400
    assert interval.seconds_per_iteration == 2.5


def test_an_interval_begins_where_the_last_one_ended() -> None:
    clock = FakeClock()
    timer = ThroughputTimer(clock)
    clock.seconds += 3
    timer.step(tokens=30)
    timer.interval()
    clock.seconds += 2
    timer.step(tokens=10)
    assert timer.interval() == Throughput(iterations=1, tokens=10, seconds=2)


def test_pause_ends_when_its_block_raises() -> None:
    clock = FakeClock()
    timer = ThroughputTimer(clock)
    with pytest.raises(OSError), timer.pause():
        clock.seconds += 9
        raise OSError
    clock.seconds += 1
    assert timer.interval().seconds == 1


def test_speed_of_nothing_is_zero() -> None:
    empty = Throughput(iterations=0, tokens=0, seconds=0.0)
    assert empty.tokens_per_second == 0 and empty.seconds_per_iteration == 0


def test_mfu_reproduces_the_published_figure() -> None:
    # SpikingBrain section 5.4: 1558 tokens/s per GPU is an MFU of 23.4 %; neither formula nor peak is stated.
    # With 6 x 7.6e9 FLOPs a token (attention left out) that is a peak of 304 TFLOP/s per GPU.
    mfu = model_flops_utilization(32 * 1558, 6 * 7.6e9, peak_tflops=303.6, world_size=32)
    assert mfu == pytest.approx(0.234, rel=1e-3)


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked for the peak yet."""
    monkeypatch.setattr(throughput, "_peaks", {})


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_peak_agrees_with_a_product_timed_by_hand(dtype: torch.dtype) -> None:
    size = 1024 if dtype is torch.float32 else 256  # some CPUs take seconds for a large product in bf16
    a = torch.randn(size, size).to(dtype)
    by_hand = 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5)) / 1e12
    measured = measure_peak_tflops("cpu", dtype)
    # A wrong unit is off by 1000. Sizes differ, and whatever else runs here takes its share of either.
    assert measured is not None
    assert by_hand / 30 < measured < by_hand * 30


class BusyMachine:
    """Products that take ``seconds``, and tens of times that while something else has the cores."""

    def __init__(self, seconds: float, *, busy_until: float) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.busy_until = busy_until
        self.tries = 0

    def clock(self) -> float:
        return self.now

    def product(self) -> float:
        self.tries += 1
        taken = self.seconds * (40 if self.now < self.busy_until else 1)
        self.now += taken
        return taken


@pytest.mark.parametrize("busy_until", [0.0, 0.4, 0.9])
def test_peak_survives_a_machine_that_is_busy_for_most_of_a_second(busy_until: float) -> None:
    machine = BusyMachine(0.003, busy_until=busy_until)
    assert _fastest(machine.product, machine.clock) == 0.003
    assert machine.now < 3.5


def test_slow_products_are_not_tried_for_long() -> None:
    machine = BusyMachine(2.0, busy_until=0.0)
    _fastest(machine.product, machine.clock)
    assert machine.now <= 6


@pytest.mark.usefixtures("nothing_measured")
def test_a_peak_that_cannot_be_one_is_not_known_and_the_next_call_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "_fastest", lambda timed: timed())
    monkeypatch.setattr(throughput, "_seconds_of_product", lambda a, b: 10.0)
    assert measure_peak_tflops("cpu", torch.float32) is None
    monkeypatch.setattr(throughput, "_seconds_of_product", lambda a, b: 0.1)
    assert measure_peak_tflops("cpu", torch.float32) == pytest.approx(2 * 512**3 / 0.1 / 1e12)


@pytest.mark.usefixtures("nothing_measured")
def test_a_process_measures_a_dtype_once_for_its_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(throughput, "_measured_peak_tflops", lambda device, dtype: next(peaks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [measure_peak_tflops("cpu", torch.float32) for _ in range(2)] == [1.0, 1.0]
    assert measure_peak_tflops("cpu", torch.bfloat16) == 2.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert measure_peak_tflops("cpu", torch.float32) == 3.0
