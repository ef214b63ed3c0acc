"""How fast a run is: tokens per second without pauses, and model FLOP/s utilisation (MFU) against a peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_SMALLEST_PRODUCT = 512
_TRIES = 10
_LONGEST_SEARCH = 3.0
_LOWEST_PEAK = 1e-3
"""TFLOP/s below which a peak is none: one core of a ten years old processor does thirty times that."""
_peaks: dict[Hashable, float] = {}
"""What this process has measured, by device, dtype and torch's settings."""


@dataclass(frozen=True)
class Throughput:
    """Speed over one interval between reports."""

    iterations: int
    """Optimizer steps in the interval."""
    tokens: int
    """Tokens of those steps, over all ranks."""
    seconds: float
    """Time spent on them; evaluation, checkpoints and other pauses excluded."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of one optimizer step."""
        return self.seconds / self.iterations if self.iterations else 0.0


class ThroughputTimer:
    """Counts steps and tokens against a clock that can be paused.

    GPU work is queued, so :meth:`interval` is exact only after something waited for the device; reading the
    loss of the last step, which every report does, is that wait.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start counting now. ``clock`` returns seconds."""
        self._clock = clock
        self._begin = clock()
        self._paused = 0.0
        self._pause_depth = 0
        self._iterations = 0
        self._tokens = 0

    def step(self, tokens: int) -> None:
        """Count one optimizer step over ``tokens`` tokens (all ranks together)."""
        self._iterations += 1
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of this block out: evaluation, saving, logging. May be nested."""
        begin = self._clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused += self._clock() - begin

    def interval(self) -> Throughput:
        """Speed since the last call (or the start), and begin the next interval."""
        now = self._clock()
        result = Throughput(self._iterations, self._tokens, now - self._begin - self._paused)
        self._begin, self._paused, self._iterations, self._tokens = now, 0.0, 0, 0
        return result


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, peak_tflops: float, world_size: int
) -> float:
    """Share of the peak that goes into the model's own arithmetic (PaLM, arXiv 2204.02311, appendix B).

    Args:
        tokens_per_second: over all ranks.
        flops_per_token: forward and backward FLOPs of one token without recomputation.
        peak_tflops: peak TFLOP/s of one rank.
        world_size: number of ranks.

    Returns:
        MFU, 1.0 being the peak.
    """
    return tokens_per_second * flops_per_token / (peak_tflops * 1e12 * world_size)


def measure_peak_tflops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a large square matrix product: the practical peak of a run in ``dtype`` on ``device``.

    The product uses the threads (CPU) and the matmul precision (TF32 or not) that torch is set to. It grows
    until one takes long enough to time or is 8192 wide, and the best of many counts, spread over a second
    and more of them where they still get better, because anything else on the machine only makes a product
    slower. A process measures once: the peak is the machine's and not a run's.

    Returns:
        None where the result cannot be a peak (below a GFLOP/s): the machine is too busy to tell.
    """
    device = torch.device(device)
    what = (device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())
    peak = _peaks.get(what) or _measured_peak_tflops(device, dtype)
    if peak < _LOWEST_PEAK:
        return None
    return _peaks.setdefault(what, peak)


def _measured_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    size = _SMALLEST_PRODUCT
    with torch.no_grad():
        while True:
            a = torch.randn(size, size, device=device).to(dtype)
            b = torch.randn(size, size, device=device).to(dtype)
            torch.mm(a, b)  # warm-up: library loading, kernel selection, clocks
            seconds = _seconds_of_product(a, b)
            if seconds > 0.02 or size == 8192:
                break
            size *= 2
        fastest = _fastest(lambda: _seconds_of_product(a, b))
    return 2 * size**3 / fastest / 1e12


def _fastest(timed: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of many timings in at least a second; up to three while the best is still beaten clearly.

    Other load comes in slices of some milliseconds to some tenths of a second: a second meets gaps in it.
    """
    begin = improved = clock()
    fastest = timed()
    tries = 1
    while True:
        now = clock()
        settled = tries >= _TRIES and now - begin >= 1.0 and now - improved >= 0.5
        if settled or now - begin >= _LONGEST_SEARCH:
            return fastest
        seconds = timed()
        tries += 1
        if seconds < 0.95 * fastest:
            improved = clock()
        fastest = min(fastest, seconds)


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type != "cuda":
        begin = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - begin
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    torch.mm(a, b)
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3
