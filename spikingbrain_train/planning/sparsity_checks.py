"""The schedule of an L1 loss inside feed-forwards, against the network and the stage that has it."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.shown import shown
from spikingbrain_train.config.stage import StageConfig


def check_sparsity(stage: StageConfig, model: ModelConfig) -> None:
    """It ends within the stage, and something can become zero. Raises ConfigurationError."""
    factors, ends = stage.sparsity.l1_factors, stage.sparsity.l1_end_steps
    if not factors:
        return
    require(
        ends[-1] <= stage.train_iters,
        f"stage.sparsity.l1_end_steps={shown(ends)} ends behind stage.train_iters={stage.train_iters}; let "
        f"the last stage of the schedule end there or before, or train for {ends[-1]} steps",
    )
    require(
        any("activation_func" in kind.settings(model) for kind in feed_forwards_of(model)),
        f"stage.sparsity.l1_factors={shown(factors)} is for dense feed-forwards and experts, of which "
        f"model.feed_forwards={shown(model.feed_forwards)} has none; set it to []",
    )
    require(
        model.activation_func is not ActivationFunc.silu,
        f"stage.sparsity.l1_factors={shown(factors)} pulls what is inside feed-forwards to zero, where only "
        f"relu, fatrelu and relu2 get, but model.activation_func={model.activation_func.value}; convert the "
        f"source with activation_func=relu, or set stage.sparsity.l1_factors=[] "
        f"stage.sparsity.l1_end_steps=[]",
    )
