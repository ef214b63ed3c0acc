"""Who holds which tokens of a sequence, against a list of tokens that is cut by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.errors import ConfigurationError


@st.composite
def layouts(draw: st.DrawFn) -> list[SequenceLayout]:
    """The layouts of all ranks for one sequence with random documents."""
    size = draw(st.integers(1, 4))
    slice_length = draw(st.integers(2, 9))
    sinks = draw(st.integers(0, slice_length - 1))
    text = size * slice_length - sinks
    inner = draw(st.sets(st.integers(1, text - 1), max_size=5)) if text > 1 else set()
    bounds = (0, *sorted(inner), text)
    return [SequenceLayout(text, sinks, rank, size, (bounds,)) for rank in range(size)]


@given(layouts())
def test_slices_are_the_sequence_cut_in_equal_parts(ranks: list[SequenceLayout]) -> None:
    first = ranks[0]
    sequence = [None] * first.num_sink_tokens + list(range(first.text_length))
    for layout in ranks:
        start = layout.context_parallel_rank * layout.slice_length
        mine = sequence[start : start + layout.slice_length]
        assert mine.count(None) == layout.local_sink_tokens
        assert list(layout.text_range()) == [token for token in mine if token is not None]


@given(layouts())
def test_local_documents_say_what_lies_before_them(ranks: list[SequenceLayout]) -> None:
    for layout in ranks:
        for document in layout.local_documents(0):
            starts = [bound for bound in layout.bounds(0) if bound <= document.start]
            assert document.before == document.start - max(starts)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"text_length": 10, "context_parallel_size": 4}, "does not divide the sequence: 0 sink tokens"),
        ({"text_length": 8, "num_sink_tokens": 4, "context_parallel_size": 3}, "leave no text in the first"),
    ],
)
def test_sequences_that_cannot_be_cut_are_refused(arguments: dict, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        SequenceLayout(**arguments)
