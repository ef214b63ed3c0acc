"""A range of a tensor's elements is a few boxes of it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.checkpoint.optimizer_pieces import boxes_of_range
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import run_config

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


_WEIGHT = "decoder.layers.0.mlp.linear_fc2.weight"
Boxes = list[tuple[str, tuple[int, ...], torch.Tensor]]


def _stored(groups: ProcessGroups, config: RunConfig) -> tuple[Boxes, Boxes]:
    """What this rank stores of a weight's states: as they lie, and where it is stored transposed."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    from spikingbrain_train.checkpoint.optimizer_pieces import optimizer_state_to_save
    from spikingbrain_train.checkpoint.sharded_state import _sharding, sharded_weights
    from spikingbrain_train.training.trainer import Trainer

    def transposed(key: str, data: torch.Tensor, replica: Any, _: Any) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data.t().contiguous(), replica_id=replica)

    def boxes(weights: dict[str, Any]) -> Boxes:
        saved = optimizer_state_to_save(trainer.state.optimizer, weights, _sharding())
        apply_factories(saved)
        own = [each for each in nested_values(saved) if isinstance(each, ShardedTensor)]
        own = [each for each in own if each.key.endswith(_WEIGHT)]
        assert all(each.replica_id[-1] == 0 for each in own)
        return [(each.key, each.global_offset, each.data.clone()) for each in own]

    trainer = Trainer(config, groups)
    trainer.train()
    weights = sharded_weights(trainer.state.model)
    as_they_lie = boxes(weights)
    plain = weights[_WEIGHT]
    turned = ShardedTensorFactory(plain.key, plain.data, transposed, id, plain.replica_id)
    return as_they_lie, boxes(weights | {_WEIGHT: turned})


def test_states_of_a_weight_that_is_stored_transposed_are_those_that_lie_in_parts(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """As of the experts of megatron-core 0.16's GroupedMLP, which needs a GPU."""
    parallel = ParallelConfig(use_distributed_optimizer=True)
    config = run_config(tmp_path, text, parallel=parallel)
    config.stage.train_iters = 2
    found = ranks.run(_stored, config, world_size=2, parallel=parallel)
    whole = {key: data for _, turned in found for key, _, data in turned}
    assert len(whole) == sum(len(turned) for _, turned in found) == 3
    parts = [part for as_they_lie, _ in found for part in as_they_lie]
    assert sum(part.numel() for _, _, part in parts) == sum(each.numel() for each in whole.values())
    for key, (row, column), part in parts:
        height, width = part.shape
        assert torch.equal(whole[key].t()[row : row + height, column : column + width], part), key
    assert all(each.any() for each in whole.values())
