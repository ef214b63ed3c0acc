"""A mixer and a feed-forward from outside compute what they say, on one rank as on several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    ContextParallelConfig,
    KernelConfig,
    LinearAttentionContextParallel,
    ParallelConfig,
)
from spikingbrain_train.config.run import Precision
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.gradients import Case
from tests.distributed.pool import RankPool
from tests.distributed.test_gradients import assert_equal, result
from tests.distributed.test_incremental_decoding import assert_same_logits
from tests.planning import test_activations

pytestmark = pytest.mark.usefixtures("plugins")


def model(**changes: Any) -> ModelConfig:
    """Four layers with both kinds, the mixer also as a branch beside a window."""
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 130,
        "max_position_embeddings": 128,
        "mixers": ["fixed_decay", ["fixed_decay", "swa"]],
        "feed_forwards": ["relu_squared", "dense"],
        "sliding_window": 21,
        "norm_epsilon": 1e-2,
    }
    return with_sections(ModelConfig)(**sizes | changes)


def cases() -> dict[str, Case]:
    spikes = SpikingConfig(projections=[each for each in Projection if each.name != "gate"])
    return {
        "packed documents behind sinks": Case(
            model(num_layers=2, num_sink_tokens=6, add_qkv_bias=True), packed=True
        ),
        # The norm behind the mixer divides the scale of q out but for its epsilon: with a small one the
        # gradient of q's norm is a small rest of large sums, and their rounding shows (1.5e-5 on AVX2).
        "q/k norms": Case(model(qk_layernorm=True, norm_epsilon=1e-1)),
        "spikes in front of every projection": Case(model(spiking=spikes)),
    }


TOPOLOGIES = {
    "TP 2": ParallelConfig(tensor_model_parallel_size=2),
    "TP 2 + sequence parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP 2": ParallelConfig(pipeline_model_parallel_size=2),
    **{
        f"CP 2, {method.value}": ParallelConfig(
            context_parallel_size=2, context_parallel=ContextParallelConfig(gated_linear_attention=method)
        )
        for method in LinearAttentionContextParallel
    },
}


@pytest.mark.parametrize("case", ["packed documents behind sinks", "q/k norms"])
def test_loss_and_every_gradient_equal_those_of_one_rank(case: str, ranks: RankPool) -> None:
    expected = result(ranks, cases()[case], ParallelConfig())
    for parallel in TOPOLOGIES.values():
        assert_equal(result(ranks, cases()[case], parallel), expected)


def test_a_mixer_without_a_decoding_step_reads_its_input_again(ranks: RankPool) -> None:
    """Alone, and as a branch beside one that has a step."""
    one = ParallelConfig()
    assert ranks.run(_mixers_without_step, model(), world_size=1, parallel=one) == [["fixed_decay"]]
    for parallel in (one, TOPOLOGIES["TP 2"], TOPOLOGIES["PP 2"]):
        topologies = {"": (parallel.model_parallel_size, parallel)}
        assert_same_logits(ranks, model(num_sink_tokens=6), topologies, prompt=7)


def _mixers_without_step(groups: ProcessGroups, network: ModelConfig) -> list[str]:
    from spikingbrain_train.models.incremental_decoding import mixers_without_step
    from spikingbrain_train.models.kernels import resolve_kernels

    return mixers_without_step(network, resolve_kernels(KernelConfig(), groups.accelerator))


def test_ranks_do_not_share_a_prompt_where_a_mixer_has_whole_texts_alone(ranks: RankPool) -> None:
    (sentence,) = ranks.run(_refusal_of_slices, model(), world_size=1, parallel=ParallelConfig())
    assert sentence.startswith(
        "parallel.context_parallel_size=2 splits a prompt into slices, but fixed_decay "
    )


def _refusal_of_slices(groups: ProcessGroups, network: ModelConfig) -> str:
    from spikingbrain_train.evaluation.checkpoint_generation import CheckpointGenerator
    from spikingbrain_train.models.kernels import resolve_kernels

    request = SimpleNamespace(model=network, parallel=ParallelConfig(context_parallel_size=2))
    opened: Any = SimpleNamespace(
        request=request, kernels=resolve_kernels(KernelConfig(), groups.accelerator)
    )
    nothing: Any = None
    with pytest.raises(ConfigurationError) as error:
        CheckpointGenerator(opened, nothing)
    return str(error.value)


def test_spikes_in_front_of_its_projections_are_those_of_one_rank(ranks: RankPool) -> None:
    case = cases()["spikes in front of every projection"]
    expected = result(ranks, case, ParallelConfig())
    plain = result(ranks, cases()["q/k norms"], ParallelConfig())
    assert expected[0] != plain[0]
    for topology in ("TP 2 + sequence parallel", "PP 2"):
        assert_equal(result(ranks, case, TOPOLOGIES[topology]), expected)


def _layers(groups: ProcessGroups, network: ModelConfig) -> Any:
    from spikingbrain_train.config.parallel import KernelConfig
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(network, ParallelConfig(), Precision.fp32, on_cpu=True)
    torch.manual_seed(0)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    return build_model(network, config, kernels, groups.device).decoder.layers


def _layer_outputs(groups: ProcessGroups, network: ModelConfig, hidden: Tensor) -> tuple[Any, ...]:
    """Of the first layer: q, k, v, norm and normed heads; weights and output of the feed-forward."""
    layer = _layers(groups, network)[0]
    with torch.no_grad():
        layer.self_attention.out_norm.weight.normal_()
        heads = layer.self_attention.normed_heads(hidden, SequenceLayout(hidden.shape[0]))
        q_k_v = layer.self_attention.get_query_key_value_tensors(hidden)
        output, bias = layer.mlp(hidden)
    assert bias is None
    weights = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
    return q_k_v, layer.self_attention.out_norm.weight.detach(), heads, [w.detach() for w in weights], output


def test_the_mixer_is_the_recurrence_written_as_a_loop(ranks: RankPool) -> None:
    network, hidden = model(), torch.randn(37, 2, 32)
    ((q_k_v, norm, heads, _, _),) = ranks.run(
        _layer_outputs, network, hidden, world_size=1, parallel=ParallelConfig()
    )
    q_TBHK, k_TBGK, v_TBGV = (x.double() for x in q_k_v)
    for group, slope in enumerate(network.fixed_decay.slopes(2)):  # type: ignore[attr-defined]
        for row in range(2):
            state_KV = torch.zeros(8, 8, dtype=torch.float64)
            for t in range(37):
                decay = torch.exp(torch.tensor(-slope, dtype=torch.float64))
                state_KV = decay * state_KV + torch.outer(k_TBGK[t, row, group], v_TBGV[t, row, group])
                for head in (2 * group, 2 * group + 1):
                    o_V = q_TBHK[t, row, head] @ state_KV * 8**-0.5
                    normed_V = norm.double() * o_V / (o_V.square().mean() + network.norm_epsilon).sqrt()
                    found_V = heads[t, row].view(4, 8)[head].double()
                    torch.testing.assert_close(found_V, normed_V, rtol=1e-4, atol=1e-5)  # float32 sums


def test_the_feed_forward_squares_what_its_relu_lets_through(ranks: RankPool) -> None:
    network, hidden = model(), torch.randn(5, 2, 32)
    network.relu_squared.scale = 0.25  # type: ignore[attr-defined]
    ((_, _, _, (up, down), output),) = ranks.run(
        _layer_outputs, network, hidden, world_size=1, parallel=ParallelConfig()
    )
    assert up.shape == (48, 32)  # no gate
    expected = 0.25 * (hidden @ up.T).clamp_min(0).square() @ down.T
    torch.testing.assert_close(output, expected)


def _errors_of_a_fit(groups: ProcessGroups, network: ModelConfig) -> tuple[list[bool], float, float]:
    """Which mixers offer normed heads; the error of the first before and after its projection is fitted."""
    from spikingbrain_train.models.mixers.alignable import HasNormedHeads
    from spikingbrain_train.training.stages.calibration import ProjectionFit

    mixers = [layer.self_attention for layer in _layers(groups, network)]
    hidden, target = torch.randn(64, 2, 32), torch.randn(64, 2, 32)
    with torch.no_grad():
        before = (mixers[0](hidden)[0] - target).square().sum().item()
        fit = ProjectionFit(mixers[0].linear_proj, groups, sequence_parallel=False)
        fit.add(mixers[0].normed_heads(hidden), target)
        fit.solve(1e-3, "ridge")
        after = (mixers[0](hidden)[0] - target).square().sum().item()
    return [isinstance(mixer, HasNormedHeads) for mixer in mixers], before, after


def test_an_align_stage_fits_its_output_projection(ranks: RankPool) -> None:
    network = model(num_layers=3, mixers=["fixed_decay", ["fixed_decay", "swa"], "swa"])
    ((offered, before, after),) = ranks.run(
        _errors_of_a_fit, network, world_size=1, parallel=ParallelConfig()
    )
    assert offered == [True, False, False]
    assert after < before


def test_its_layers_keep_what_is_planned(ranks: RankPool) -> None:
    base = test_activations.DENSE
    for precision in Precision.fp32, Precision.bf16:
        mixer: dict[str, Any] = {"mixers": ["fixed_decay"]}
        for changes in (mixer, mixer | {"qk_layernorm": True}, {"feed_forwards": ["relu_squared"]}):
            network = with_sections(ModelConfig)(**vars(base) | changes)
            case = test_activations.Case(network, precision)
            ((kept,),) = ranks.run(
                test_activations._kept_by_layers, [case], world_size=1, parallel=ParallelConfig()
            )
            test_activations._assert_close(kept, test_activations._planned(case, 1))


def test_a_section_travels_to_other_processes_and_back(ranks: RankPool) -> None:
    network = replace(model(), mixers=["fixed_decay"])
    network.fixed_decay.max_slope = 0.25  # type: ignore[attr-defined]
    (echoed,) = ranks.run(_echo, network, world_size=1, parallel=ParallelConfig())
    assert echoed == network and echoed.fixed_decay.max_slope == 0.25


def _echo(_: ProcessGroups, network: ModelConfig) -> ModelConfig:
    return network
