"""Which parameters the optimizer treats how."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import GatedDeltaRuleConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig, Precision
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B

if TYPE_CHECKING:
    from spikingbrain_train.config.model import ModelConfig
    from spikingbrain_train.parallel.process_groups import ProcessGroups


def _decay_and_dimensions(groups: ProcessGroups, model: ModelConfig) -> dict[str, tuple[float, int]]:
    """wd_mult and number of dimensions of every parameter."""
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config
    from spikingbrain_train.training.build import wrap_data_parallel
    from spikingbrain_train.training.optimizer import build_optimizer

    parallel = ParallelConfig()
    config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
    built = build_model(model, config, resolve_kernels(KernelConfig(), groups.accelerator), groups.device)
    wrapped = wrap_data_parallel(built, parallel)
    optimizer = build_optimizer(OptimizerConfig(), parallel, Precision.fp32, wrapped)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    return {
        names[id(parameter)]: (group["wd_mult"], parameter.dim())
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_matrices_decay_and_nothing_else(ranks: RankPool) -> None:
    for model in (MODEL, MODEL_76B):
        (found,) = ranks.run(_decay_and_dimensions, model, world_size=1, parallel=ParallelConfig())
        assert found
        wrong = {name: each for name, each in found.items() if each[0] != (1.0 if each[1] > 1 else 0.0)}
        assert not wrong


@pytest.mark.parametrize(
    "settings, matrices, others",
    [
        pytest.param(
            {"mixers": ["mamba"], "mamba": MambaConfig(use_bias=True)},
            {"in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"},
            {"A_log", "D", "dt_proj.bias", "in_proj.bias", "out_proj.bias"},
            id="selective scan",
        ),
        pytest.param(
            {"mixers": ["gdn"], "gdn": GatedDeltaRuleConfig(short_convolution=4, output_gate=True)},
            {
                *("linear_qkv", "conv1d", "linear_decay", "linear_beta"),
                *("linear_output_gate", "linear_proj"),
            },
            {"A_log", "dt_bias", "linear_output_gate.bias", "out_norm.weight"},
            id="delta rule",
        ),
    ],
)
def test_what_says_how_states_decay_has_no_weight_decay(
    settings: dict[str, Any], matrices: set[str], others: set[str], ranks: RankPool
) -> None:
    """As Mamba and Gated DeltaNet are trained: A_log is no matrix that is multiplied by."""
    model = replace(MODEL, **settings)
    (found,) = ranks.run(_decay_and_dimensions, model, world_size=1, parallel=ParallelConfig())
    of_mixer = {
        name.partition("layers.0.self_attention.")[2]: decay
        for name, (decay, _) in found.items()
        if "layers.0.self_attention." in name
    }
    assert {name for name, decay in of_mixer.items() if decay} == {f"{name}.weight" for name in matrices}
    assert others <= of_mixer.keys()
