"""Tokens that Transformer Engine sorts by their experts, held to megatron-core's own operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import (
    KernelConfig,
    ParallelConfig,
    Recompute,
    TokenPermutationBackend,
)
from tests.distributed.gradients import CASES, Case, Shard, assemble, loss_and_gradients
from tests.distributed.pool import RankPool
from tests.models.moe import permutations

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE = 1e-6
"""Of a tensor's largest gradient: of two experts a token the order of a sum is another one."""

CASE = CASES["76B-like, packed documents"]


def with_moe(**settings: object) -> Case:
    moe = replace(MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1), **settings)
    return replace(CASE, model=replace(CASE.model, moe=moe))


ONE = ParallelConfig()
PLACES: dict[str, tuple[Case, ParallelConfig]] = {
    "one rank": (CASE, ONE),
    "one rank, two experts a token": (with_moe(), ONE),
    "tokens above a capacity": (with_moe(capacity_factor=0.8), ONE),
    "padded to a capacity": (with_moe(capacity_factor=1.2, pad_to_capacity=True), ONE),
    "all computed again": (with_moe(), ParallelConfig(recompute=Recompute.full)),
    "busy experts computed again": (with_moe(), ParallelConfig(recompute_expert_tokens=20)),
    "TP 2 + sequence parallel": (
        with_moe(),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "EP 2": (with_moe(), ParallelConfig(expert_model_parallel_size=2)),
}


def by_transformer_engine(
    groups: ProcessGroups, case: Case, parallel: ParallelConfig
) -> tuple[float, list[Shard], Counter[str]]:
    from spikingbrain_train.models import kernels

    plain = kernels.resolve_kernels(KernelConfig(), groups.accelerator)
    te = replace(plain, token_permutation=TokenPermutationBackend.transformer_engine)
    with (
        permutations.installed() as calls,
        mock.patch.object(kernels, "resolve_kernels", lambda *_, **__: te),
    ):
        return *loss_and_gradients(groups, case, parallel), Counter(calls)


@pytest.mark.parametrize("name", PLACES)
def test_loss_and_gradients_are_those_of_megatron_core(name: str, ranks: RankPool) -> None:
    case, parallel = PLACES[name]
    size = max(parallel.model_parallel_size, parallel.expert_model_parallel_size)
    plain = ranks.run(loss_and_gradients, case, parallel, world_size=size, parallel=parallel)
    fused = ranks.run(by_transformer_engine, case, parallel, world_size=size, parallel=parallel)
    expected, found = assemble([shards for _, shards in plain]), assemble([each[1] for each in fused])
    for (loss, _), (ours, *_) in zip(plain, fused, strict=True):
        assert ours == pytest.approx(loss, rel=TOLERANCE)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= TOLERANCE * expected[key].abs().max(), key
    for *_, calls in fused:
        assert calls["moe_permute_with_probs"] == calls["moe_unpermute"] > 0 == calls["moe_permute"]
        assert (calls["moe_sort_chunks_by_index"] > 0) == (not case.model.moe.pad_to_capacity)
