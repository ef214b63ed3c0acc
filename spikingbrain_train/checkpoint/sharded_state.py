"""What of a run is in a checkpoint, as megatron-core's sharded tensors.

That is weights, optimizer, schedule, random generators and position in the data. It is read at any topology;
generators only at the one that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from spikingbrain_train.architecture.linear_transforms import may_begin_anew
from spikingbrain_train.checkpoint.expert_state import weights_with_state
from spikingbrain_train.checkpoint.optimizer_pieces import optimizer_state_to_save, own_parameters_to_fill
from spikingbrain_train.checkpoint.optimizer_state import load_state, state_to_load
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.checkpoint_metadata import ONE_KEY_PER_LAYER


class PipelineStage(Protocol):
    """What is asked of a model: megatron-core's MegatronModule has all but its config."""

    @property
    def model_config(self) -> ModelConfig:
        """Of the whole model."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's weights."""
        ...

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Name -> its share of a tensor of the checkpoint."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's weights and stored buffers by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Fill it; returns the names that are missing, and those that are unexpected."""
        ...


class HasState(Protocol):
    """Whatever else a checkpoint keeps: plain values and whole tensors, those of the main process."""

    def state_dict(self) -> dict[str, Any]:
        """What to write; nothing is written where it is empty."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was written."""
        ...


class RunState(Protocol):
    """What changes while a run trains."""

    scheduler: OptimizerParamScheduler
    iteration: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences read from the training data so far."""

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Or what looks like one; see checkpoint/optimizer_state.py."""
        ...

    @property
    def callbacks(self) -> HasState:
        """What hangs on the run's hooks."""
        ...

    @property
    def model(self) -> PipelineStage:
        """This rank's part of the model."""
        ...

    def gather_updated_weights(self) -> None:
        """Bring every weight on every rank up to the last optimizer step; a collective."""
        ...

    def learnt_to_save(self) -> dict[str, Any]:
        """``model`` and ``optimizer`` as sharded tensors, from where they lie; nothing is copied."""
        ...

    def learnt_to_fill(self) -> dict[str, Any]:
        """What to read of both for :meth:`fill_learnt`."""
        ...

    def fill_learnt(self, loaded: dict[str, Any]) -> None:
        """Take up what was read; all else stays as it is."""
        ...


def _sharding() -> dict[str, Any]:
    """How tensors are named and split.

    One key per layer, because layers differ, and optimizer state as whole parameters, so that any topology
    can read it. A new dict each time: megatron-core puts this run's process groups into it.
    """
    return {
        **ONE_KEY_PER_LAYER,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def state_to_save(state: RunState, groups: ProcessGroups) -> dict[str, Any]:
    """All of a run, from where it lies: nothing is copied."""
    sharded = {**state.learnt_to_save(), **_the_rest(state), "generators": _generators(groups)}
    if of_callbacks := state.callbacks.state_dict():
        sharded["callbacks"] = of_callbacks
    return sharded


def state_to_fill(state: RunState, groups: ProcessGroups, *, same_topology: bool) -> dict[str, Any]:
    """What to read of a run, whatever its settings were.

    Args:
        state: of this run, which :func:`fill_state` fills.
        groups: process groups.
        same_topology: whether this rank takes the place of one that wrote it, and can have its generators.
    """
    sharded = {**state.learnt_to_fill(), **_the_rest(state)}
    if same_topology:
        sharded["generators"] = _generators(groups)
    return sharded


def megatron_state_to_save(model: PipelineStage, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """A model and megatron-core's optimizer of it, from where they lie."""
    weights = sharded_weights(model)
    places = weights_with_state(weights, model.model_config)
    return {"model": weights, "optimizer": optimizer_state_to_save(optimizer, places, _sharding())}


def megatron_state_to_fill(model: PipelineStage, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What to read of both, for :func:`fill_megatron_state`."""
    weights = sharded_weights(model)
    places = weights_with_state(weights, model.model_config)
    with own_parameters_to_fill(optimizer):
        return {"model": weights, "optimizer": state_to_load(optimizer, places, _sharding())}


def fill_megatron_state(model: PipelineStage, optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Give both what was read."""
    fill_weights(model, loaded["model"])
    load_state(optimizer, loaded["optimizer"])


def _the_rest(state: RunState) -> dict[str, Any]:
    return {
        "scheduler": state.scheduler.state_dict(),
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
    }


def fill_state(state: RunState, loaded: dict[str, Any], groups: ProcessGroups) -> None:
    """Give a run what was read for :func:`state_to_fill`."""
    state.fill_learnt(loaded)
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]
    state.callbacks.load_state_dict(loaded.get("callbacks", {}))
    if "generators" in loaded:
        restore_generators({name: row.squeeze(0) for name, row in loaded["generators"].items()}, groups)


def sharded_weights(model: PipelineStage) -> dict[str, Any]:
    """The weights, which in a checkpoint are tensors only.

    Transformer Engine's ``_extra_state`` is left out: it is what FP8 with delayed scales carries from step to
    step, and none of our recipes has any (``config/fp8.py``).
    """
    sharded = model.sharded_state_dict(metadata=_sharding())
    return {name: value for name, value in sharded.items() if not name.endswith("_extra_state")}


def fill_weights(model: PipelineStage, weights: dict[str, torch.Tensor]) -> None:
    """Give a model what was read for :func:`sharded_weights`; adapters that were not stay as they are."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state") and not may_begin_anew(name)]
    assert not missing and not unexpected, f"weights do not fit the model: {missing} {unexpected}"


def generator_states(groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """This rank's random generators by name: bytes, on the host."""
    states = {f"torch_{name}": value for name, value in groups.accelerator.get_rng_state().items()}
    states |= {f"tracker_{name}": value for name, value in get_cuda_rng_tracker().get_states().items()}
    return {name: value.cpu() for name, value in states.items()}


def restore_generators(states: dict[str, torch.Tensor], groups: ProcessGroups) -> None:
    """Have this rank draw on from :func:`generator_states`."""
    groups.accelerator.set_rng_state(
        {name.removeprefix("torch_"): value for name, value in states.items() if name.startswith("torch_")}
    )
    get_cuda_rng_tracker().set_states(
        {
            name.removeprefix("tracker_"): value
            for name, value in states.items()
            if name.startswith("tracker_")
        }
    )


def _generators(groups: ProcessGroups) -> dict[str, ShardedTensor]:
    """Every rank's random generators as rows of one tensor each."""
    return {
        name: ShardedTensor.from_rank_offsets(
            f"generators.{name}", value[None], (0, groups.rank, groups.world_size)
        )
        for name, value in generator_states(groups).items()
    }
