"""Steps that begin small: their sizes, their sum, their learning rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from spikingbrain_train.config.batch_size import BatchSizeLR, BatchSizeRampConfig, BatchSizes

ramps = st.builds(
    lambda start, increment, sizes, samples: (start, increment, start + sizes * increment, samples),
    *(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 5000)),
)


def sizes_of(start: int, increment: int, last: int, samples: int) -> BatchSizes:
    return BatchSizes.of(BatchSizeRampConfig(start, increment, samples), last)


def test_without_a_ramp_every_step_is_whole() -> None:
    sizes = BatchSizes.of(BatchSizeRampConfig(), 8)
    assert [sizes.at(samples) for samples in (0, 8, 800)] == [8, 8, 8]
    assert sizes.read_by(7) == 56 and sizes.read_by(7, 3) == 59 and sizes.lr_factor(0) == 1.0
    assert sizes.describe() is None


@given(ramp=ramps, steps=st.integers(0, 300), begin=st.integers(0, 6000))
def test_what_steps_read_is_the_sum_of_their_sizes(
    ramp: tuple[int, int, int, int], steps: int, begin: int
) -> None:
    sizes, samples = sizes_of(*ramp), begin
    for _ in range(steps):
        size = sizes.at(samples)
        assert ramp[0] <= size <= ramp[2]
        samples += size
    assert sizes.read_by(steps, begin) == samples


@given(ramp=ramps)
def test_sizes_are_megatron_cores(ramp: tuple[int, int, int, int]) -> None:
    # Its shares of the samples are floats, and one more or less may count at their ends.
    start, increment, last, samples = ramp
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        rank=1,
        global_batch_size=last,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        start_global_batch_size=start,
        batch_size_increment=increment,
        ramup_samples=samples,
    )
    ours, count = sizes_of(*ramp), (last - start) // increment
    for read in range(0, samples + last, max(1, samples // 50)):
        if (read * count) % samples == 0 and 0 < read < samples:
            continue
        theirs.update(read, consistency_check=False, verbose=False)
        # It keeps to the ramp through the sample that ends it.
        assert ours.at(read) == (theirs.get_current_global_batch_size() if read != samples else last)


@pytest.mark.parametrize(
    ("lr", "factors"),
    [
        (BatchSizeLR.none, [1, 1, 1]),
        (BatchSizeLR.sqrt, [0.5, 0.75**0.5, 1]),
        (BatchSizeLR.linear, [0.25, 0.75, 1]),
    ],
)
def test_learning_rates_follow_the_share_of_a_whole_step(lr: BatchSizeLR, factors: list[float]) -> None:
    sizes = BatchSizes.of(BatchSizeRampConfig(start=2, increment=4, samples=16, lr=lr), 8)
    assert BatchSizes.of(BatchSizeRampConfig(start=2, samples=18), 8).increment == 2
    assert [sizes.at(samples) for samples in (0, 8, 16)] == [2, 2, 8]
    sizes = BatchSizes.of(BatchSizeRampConfig(start=2, increment=2, samples=18, lr=lr), 8)
    assert [sizes.at(samples) for samples in (0, 12, 18)] == [2, 6, 8]
    assert [sizes.lr_factor(samples) for samples in (0, 12, 18)] == pytest.approx(factors)
