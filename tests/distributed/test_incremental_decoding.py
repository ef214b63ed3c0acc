"""A text read piece by piece or token by token gives, at every position, the logits of reading it at once.

All in float32, to 2e-5 of the largest logit: a recurrence adds its terms in another order than the chunked
form, a softmax over the keys of a window in another than the blocked one (at most 1e-6, measured), and the
norm behind a recurrence of ReLU features enlarges that where nearly all features are zero (1e-5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.models.mixers.decoding import CacheSize, decodes_by_step
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.gradients import CASES, model_of_known_weights
from tests.distributed.pool import RankPool

TOLERANCE = 2e-5
TEXT, PROMPT = 72, 7  # the windows of 21 tokens and the room for 64 keys are left behind
AT_ONCE = range(33, 60)
"""No reading ends here, but that of a prompt: windows are full, and the room is not yet too small."""

TOPOLOGIES: dict[str, tuple[int, ParallelConfig]] = {
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "EP 2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "TP 2 x PP 2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "PP 2 x CP 2": (4, ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2)),
}


def text() -> Tensor:
    """Two rows [2, TEXT] of random tokens."""
    return torch.randint(0, 130, (2, TEXT), generator=torch.Generator().manual_seed(3))


def _at_once(groups: ProcessGroups, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Logits [2, TEXT, vocabulary] of the whole text on one rank."""
    built = model_of_known_weights(groups, model, ParallelConfig(), dtype).eval()
    with torch.no_grad():
        logits = built(text())
    assert isinstance(logits, Tensor)
    return logits[..., : model.vocab_size]


def reading_ends(prompt: int) -> list[int]:
    """Where each call ends that reads the text: behind the prompt, then token by token but for AT_ONCE."""
    return [end for end in range(prompt, TEXT + 1) if end == prompt or end not in AT_ONCE]


def _token_by_token(
    groups: ProcessGroups,
    model: ModelConfig,
    parallel: ParallelConfig,
    prompt: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, list[CacheSize]]:
    """Logits [2, len(reading_ends(prompt)), vocabulary] at those places, and what was remembered there."""
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    decoder = IncrementalDecoder(model_of_known_weights(groups, model, parallel, dtype))
    decoder.begin()
    decoder.read(text()[:, :3])  # another text, which is forgotten
    decoder.begin()
    logits, sizes, begin = [], [], 0
    for end in reading_ends(prompt):
        logits.append(decoder.read(text()[:, begin:end]))
        sizes.append(decoder.cache_size())
        begin = end
    on_this_rank = [each for each in logits if each is not None]
    return (torch.stack(on_this_rank, dim=1) if on_this_rank else None), sizes


def assert_same_logits(
    ranks: RankPool,
    model: ModelConfig,
    topologies: dict[str, Any],
    prompt: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Of the model on one rank and of its incremental form on all of ``topologies``."""
    (expected,) = ranks.run(_at_once, model, dtype, world_size=1, parallel=ParallelConfig())
    for name, (size, parallel) in topologies.items():
        arguments = (model, parallel, prompt, dtype)
        results = ranks.run(_token_by_token, *arguments, world_size=size, parallel=parallel)
        found = [logits for logits, _ in results if logits is not None]
        assert len(found) == size // parallel.pipeline_model_parallel_size
        for logits in found:
            places = [end - 1 for end in reading_ends(prompt)]
            off = (logits - expected[:, places]).abs().max() / expected.abs().max()
            assert off < TOLERANCE, f"{name}: off by {off:.1e} of the largest logit"


@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if "packed" not in name and not case.l1_factor]
)
def test_every_position_has_the_logits_of_the_whole_text(case: str, ranks: RankPool) -> None:
    one = {"one rank": (1, ParallelConfig())}
    assert_same_logits(ranks, CASES[case].model, one, PROMPT, CASES[case].dtype)


def _in_pieces(
    groups: ProcessGroups,
    model: ModelConfig,
    parallel: ParallelConfig,
    lengths: list[int],
    dtype: torch.dtype,
) -> dict[int, Tensor]:
    """Logits [2, vocabulary] behind a beginning in pieces, more tokens at once, and single ones."""
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    decoder = IncrementalDecoder(model_of_known_weights(groups, model, parallel, dtype))
    found = {}
    for length in lengths:
        decoder.begin()
        for first, end in ((0, 62), (62, 69), (69, 70), (70, 71), (71, TEXT)):
            logits = decoder.read(text()[:, first:end], length)
            if logits is not None:
                found[length * 1000 + end] = logits
    return found


def assert_same_in_pieces(
    ranks: RankPool,
    model: ModelConfig,
    lengths: list[int],
    topology: tuple[int, ParallelConfig] = (1, ParallelConfig()),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Pieces of each of ``lengths`` give the logits of reading all at once."""
    (expected,) = ranks.run(_at_once, model, dtype, world_size=1, parallel=ParallelConfig())
    size, parallel = topology
    results = ranks.run(_in_pieces, model, parallel, lengths, dtype, world_size=size, parallel=parallel)
    found = [logits for logits in results if logits]
    assert len(found) == size // parallel.pipeline_model_parallel_size
    for of_rank in found:
        assert len(of_rank) == 5 * len(lengths)
        for key, logits in of_rank.items():
            off = (logits - expected[:, key % 1000 - 1]).abs().max() / expected.abs().max()
            assert off < TOLERANCE, f"pieces of {key // 1000}, token {key % 1000}: off by {off:.1e}"


@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if "packed" not in name and not case.l1_factor]
)
def test_a_prompt_is_read_in_pieces_as_it_is_at_once(case: str, ranks: RankPool) -> None:
    # Shorter and longer than windows of 21 and convolutions of 4 tokens, and rests of other lengths.
    assert_same_in_pieces(ranks, CASES[case].model, [3, 17, 50], dtype=CASES[case].dtype)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ranks_read_pieces_together(topology: str, ranks: RankPool) -> None:
    assert_same_in_pieces(ranks, CASES["76B-like"].model, [17], TOPOLOGIES[topology])


@pytest.mark.parametrize("rope_type", [RopeType.dynamic, RopeType.longrope])
def test_rotary_angles_of_pieces_are_those_of_the_whole_prompt(rope_type: RopeType, ranks: RankPool) -> None:
    """Where they depend on its length, which the first piece does not show."""
    scaling = RopeScalingConfig(rope_type=rope_type, factor=4.0, original_max_position_embeddings=16)
    if rope_type is RopeType.longrope:
        scaling = replace(scaling, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    model = replace(CASES["sliding window"].model, mixers=["swa", "full"], rope_scaling=scaling)
    (expected,) = ranks.run(_at_once, model, torch.float32, world_size=1, parallel=ParallelConfig())
    (found,) = ranks.run(_prompt_in_pieces, model, world_size=1, parallel=ParallelConfig())
    assert (found - expected[:, -1]).abs().max() / expected.abs().max() < TOLERANCE


def _prompt_in_pieces(groups: ProcessGroups, model: ModelConfig) -> Tensor:
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    decoder = IncrementalDecoder(model_of_known_weights(groups, model, ParallelConfig()))
    logits = decoder.read(text(), 13)
    assert logits is not None
    return logits


def test_a_prompt_may_be_one_token_or_longer_than_every_window(ranks: RankPool) -> None:
    one = {"one rank": (1, ParallelConfig())}
    for prompt in (1, 50):
        assert_same_logits(ranks, CASES["76B-like"].model, one, prompt)
    assert_same_logits(
        ranks, CASES["Mamba, one layer without a feed-forward"].model, one, 1
    )  # shorter than its convolution


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ranks_together_read_as_one_does(topology: str, ranks: RankPool) -> None:
    assert_same_logits(ranks, CASES["76B-like"].model, {topology: TOPOLOGIES[topology]}, PROMPT)
    if topology != "EP 2":
        model = replace(CASES["7B-like, packed documents"].model, mixers=["gla", "swa", "gla", "full"])
        assert_same_logits(ranks, model, {topology: TOPOLOGIES[topology]}, PROMPT)
        scan = replace(CASES["Mamba, norms and biases, sinks, packed documents"].model, mixers=["mamba"])
        assert_same_logits(ranks, scan, {topology: TOPOLOGIES[topology]}, PROMPT)


def test_memory_of_recurrences_and_windows_does_not_grow_with_the_text(ranks: RankPool) -> None:
    model = replace(CASES["sliding window"].model, mixers=["gla", "swa"], num_sink_tokens=6)
    parallel = ParallelConfig()
    ((_, sizes),) = ranks.run(_token_by_token, model, parallel, PROMPT, world_size=1, parallel=parallel)
    # Two rows of a state [2, 8, 8] and of keys and values [6 + 21, 2, 8], in float32.
    state, window = 2 * 2 * 8 * 8 * 4, 2 * 2 * 27 * 2 * 8 * 4
    assert set(sizes) == {CacheSize(recurrent=state, windowed=window, windowed_limit=window)}

    # Two layers of two rows: the last three inputs and a state of five, of 64 channels, in float32.
    scan = replace(CASES["Mamba, one layer without a feed-forward"].model, num_sink_tokens=6)
    ((_, sizes),) = ranks.run(_token_by_token, scan, parallel, PROMPT, world_size=1, parallel=parallel)
    assert set(sizes) == {CacheSize(recurrent=2 * 2 * (3 + 5) * 64 * 4)}

    full = replace(model, mixers=["full"])
    ((_, sizes),) = ranks.run(_token_by_token, full, parallel, PROMPT, world_size=1, parallel=parallel)
    assert sizes[0].unbounded < sizes[-1].unbounded and sizes[-1].recurrent == 0


def test_what_an_expert_has_room_for_is_left_out_of_decoding() -> None:
    model = CASES["MoE"].model
    crowded = replace(model, moe=replace(model.moe, capacity_factor=0.5, pad_to_capacity=True))
    for kind in FEED_FORWARDS:
        crowded = kind.without_dropping(crowded)
    assert crowded == model


def test_a_subclass_that_mixes_otherwise_does_not_inherit_the_step() -> None:
    from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention

    class Same(GatedLinearAttention):
        pass

    class Other(GatedLinearAttention):
        def normed_heads(self, hidden_states: Tensor, layout: Any = None) -> Tensor:
            return hidden_states

    assert decodes_by_step(GatedLinearAttention) and decodes_by_step(Same)
    assert not decodes_by_step(Other) and not decodes_by_step(torch.nn.Linear)
