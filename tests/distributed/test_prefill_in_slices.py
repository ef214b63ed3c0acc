"""Context-parallel ranks read a prompt together: logits and the states behind it are those of one rank.

In float32, to 1e-5 of the largest: a slice adds what was before it in another order than one rank does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.models.mixers.decoding import decodes_by_step, decodes_in_slices
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.gradients import CASES, model_of_known_weights
from tests.distributed.pool import RankPool
from tests.distributed.test_incremental_decoding import text

TOLERANCE = 1e-5
PROMPT = 61  # the first token by itself, then pieces, and a rest that ranks cannot share
MODELS = {
    "gla, swa, full": replace(
        CASES["7B-like, packed documents"].model, mixers=["gla", "swa", "full"], num_layers=3
    ),
    "gdn, sinks": CASES["gated delta rule"].model,
    "mamba": replace(CASES["Mamba, norms and biases, sinks, packed documents"].model, mixers=["mamba"]),
    "branches, experts, sinks": CASES["76B-like"].model,
}


def _prefill(
    groups: ProcessGroups, model: ModelConfig, parallel: ParallelConfig, piece: int | None
) -> tuple[Tensor, Tensor, int, list[Tensor]]:
    """Logits behind the prompt and behind one more token, most tokens of a layer at once, and all states."""
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    built = model_of_known_weights(groups, model, parallel)
    decoder, lengths = IncrementalDecoder(built), []
    built.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    logits = decoder.read(text()[:, :PROMPT], piece)
    states = [state for layer in built.layers for state in _tensors(layer.self_attention.state)]
    states = [state.clone() for state in states]
    following = decoder.read(text()[:, PROMPT : PROMPT + 1])
    assert logits is not None and following is not None
    return logits, following, max(lengths), states


def _tensors(state: object) -> list[Tensor]:
    """What a mixer remembers; of keys and values what is held, which has room behind it."""
    held = getattr(state, "_held", None)
    if held is not None:
        return list(held())
    branches = getattr(state, "states", None)
    if branches is not None:
        return [tensor for branch in branches for tensor in _tensors(branch)]
    return [x for x in vars(state).values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_slices_leave_behind_what_one_rank_leaves(name: str, ranks: RankPool) -> None:
    model, one = MODELS[name], ParallelConfig()
    (expected,) = ranks.run(_prefill, model, one, None, world_size=1, parallel=one)
    # Slices of one token, of fewer than a convolution reaches, of more than a window, and the whole prompt.
    for size, piece in ((2, 1), (4, 2), (2, 23), (4, None)):
        parallel = ParallelConfig(context_parallel_size=size)
        found = ranks.run(_prefill, model, parallel, piece, world_size=size, parallel=parallel)
        for logits, following, longest, states in found:
            assert longest <= model.num_sink_tokens + max(size, piece or PROMPT // size)
            assert len(states) == len(expected[3]) > 0
            pairs = [(logits, expected[0]), (following, expected[1]), *zip(states, expected[3], strict=True)]
            for ours, theirs in pairs:
                assert ours.shape == theirs.shape
                off = (ours - theirs).abs().max() / theirs.abs().max()
                assert off <= TOLERANCE, f"CP {size}, slices of {piece}: off by {off:.1e}"


def test_a_mixer_says_whether_it_reads_slices() -> None:
    from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention

    class Same(GatedLinearAttention):
        pass

    class WithAStepOfItsOwn(GatedLinearAttention):
        def decode(self, hidden_states: Tensor, state: Any, *, rotary_pos_emb: Tensor | None) -> Tensor:
            return hidden_states

    assert decodes_in_slices(GatedLinearAttention) and decodes_in_slices(Same)
    assert decodes_by_step(WithAStepOfItsOwn) and not decodes_in_slices(WithAStepOfItsOwn)
    assert not decodes_in_slices(torch.nn.Linear)
