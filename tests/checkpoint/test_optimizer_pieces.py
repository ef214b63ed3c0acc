"""A range of a tensor's elements is a few boxes of it."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.checkpoint.optimizer_pieces import boxes_of_range

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.data())
def test_boxes_hold_each_element_of_a_range_once_and_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = []
    for offset, size, at in boxes_of_range(shape, start, stop):
        box = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))]
        assert box.flatten().tolist() == list(range(at, at + prod(size)))
        found += box.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes_of_range(shape, start, stop))) <= max(1, 2 * len(shape) - 1)
