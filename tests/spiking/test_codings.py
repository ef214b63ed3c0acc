"""Spike trains against the integers that they carry, and products over them against integer products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.spiking.codings import CODINGS, Coding, coding_of
from spikingbrain_train.spiking.event_driven import event_driven_product

ALL = pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))


@st.composite
def counts_of(draw: st.DrawFn, coding: Coding, largest: int = 300) -> torch.Tensor:
    """[N, D] whole numbers that the coding holds."""
    shape = draw(st.tuples(st.integers(0, 4), st.integers(1, 7)))
    low = -largest if coding.has_negative else 0
    numbers = st.lists(st.integers(low, largest), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    return torch.tensor(draw(numbers), dtype=torch.int64).view(shape)


@ALL
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_train_decodes_to_its_counts_and_its_product_is_that_of_the_integers(
    coding: Coding, data: st.DataObject
) -> None:
    counts = data.draw(counts_of(coding))
    more = data.draw(st.integers(0, 2))
    needed = len(coding.encode(counts).step_weights)
    train = coding.encode(counts.float() if data.draw(st.booleans()) else counts, steps=needed + more)
    assert train.spikes.dtype == torch.int8 and train.spikes.shape == (needed + more, *counts.shape)
    least = -1 if coding.name in ("ternary", "bitwise_bidirectional") else 0
    assert set(train.spikes.unique().tolist()) <= set(range(least, 2))
    assert torch.equal(train.decode(), counts)
    outputs = data.draw(st.integers(1, 5))
    weight = torch.randint(
        -128, 128, (outputs, counts.shape[1]), generator=torch.Generator().manual_seed(outputs)
    )
    product = event_driven_product(train, weight.to(torch.int8))
    assert torch.equal(product, counts @ weight.t())


@ALL
def test_every_count_in_range_is_held_and_the_next_ones_are_refused(coding: Coding) -> None:
    for steps in (1, 2, 3, 5):
        low, high = coding.holds(steps)
        inside = torch.arange(low, high + 1)
        assert torch.equal(coding.encode(inside, steps).decode(), inside)
        assert coding.steps_for(low, high) == steps
        with pytest.raises(
            ConfigurationError, match=f"the count {high + 1} does not fit {coding.name} of {steps} "
        ):
            coding.encode(torch.tensor([0, high + 1]), steps)
        with pytest.raises(ConfigurationError, match=f"the count {low - 1} "):
            coding.encode(torch.tensor([low - 1]), steps)


@ALL
def test_spikes_of_a_window_are_those_of_the_train(coding: Coding) -> None:
    counts = torch.arange(-20 if coding.has_negative else 0, 21)
    train = coding.encode(counts)
    for steps in range(1, len(train.step_weights) + 1):
        assert torch.equal(coding.spikes_in(counts, steps), train.spikes[:steps].abs().long().sum(0))


def test_the_paper_s_example_of_minus_five() -> None:
    def spikes(name: str) -> list[int]:
        return CODINGS[name].encode(torch.tensor([-5])).spikes.flatten().tolist()

    assert spikes("ternary") == [-1] * 5
    assert spikes("bitwise_bidirectional") == [-1, 0, -1]
    assert spikes("bitwise_twos_complement") == [1, 1, 0, 1]  # -5 = 1 + 2 - 8


def test_floating_weights_are_added_up_in_their_own_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(-9, 10, (2, 3, 8), generator=generator)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    for name in ("ternary", "bitwise_bidirectional", "bitwise_twos_complement"):
        product = event_driven_product(CODINGS[name].encode(counts), weight)
        assert product.shape == (2, 3, 5) and product.dtype == torch.float64
        torch.testing.assert_close(product, counts.double() @ weight.t(), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (torch.tensor([0.5]), "not whole"),
        (torch.tensor([float("nan")]), "not whole"),
        (torch.tensor([float("inf")]), "not whole"),
    ],
)
def test_what_is_no_count_is_refused(counts: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        CODINGS["ternary"].encode(counts)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    train = CODINGS["bitwise_bidirectional"].encode(torch.full((1, 4), 2**40))
    with pytest.raises(ConfigurationError, match="could pass int64"):
        event_driven_product(train, torch.full((2, 4), 2**30))
    with pytest.raises(ConfigurationError, match="do not fit a weight"):
        event_driven_product(train, torch.ones(2, 5))
    with pytest.raises(ConfigurationError, match="take 63 steps"):
        CODINGS["bitwise_unsigned"].encode(torch.tensor([2**62]))
    with pytest.raises(ConfigurationError, match="there is no coding morse; take one of binary, "):
        coding_of("morse")
