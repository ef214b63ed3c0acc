"""The engine of a run."""

from __future__ import annotations

from spikingbrain_train.config.parallel import WEIGHTS_STAGE, EngineKind
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.engines.engine import Engine
from spikingbrain_train.training.engines.megatron import MegatronEngine


def build_engine(config: RunConfig, model: HybridGPTModel | ModelChunks, groups: ProcessGroups) -> Engine:
    """Hand this rank's part of the model to the engine that trains it.

    Args:
        config: the run.
        model: built and loaded, frozen where it is not to train.
        groups: process groups.
    """
    if config.parallel.engine is EngineKind.deepspeed:
        # It imports DeepSpeed's helpers, an optional package.
        from spikingbrain_train.training.engines.deepspeed import DeepSpeedEngine
        from spikingbrain_train.training.engines.zero_three import ZeroThreeEngine

        assert isinstance(model, HybridGPTModel)  # without a pipeline there are no virtual stages
        if config.parallel.zero.stage == WEIGHTS_STAGE:
            return ZeroThreeEngine(config, model, groups)
        return DeepSpeedEngine(config, model, groups)
    if config.parallel.engine is EngineKind.fsdp:
        # Its imports of torch take a second, and older releases lack some.
        from spikingbrain_train.training.engines.fsdp import FsdpEngine

        assert isinstance(model, HybridGPTModel)
        return FsdpEngine(config, model, groups)
    return MegatronEngine(config, model)
