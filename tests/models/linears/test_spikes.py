"""Spiking parallel linears against plain torch on whole weights, under tensor and sequence parallelism.

The encoding rounds x / Vth to whole spikes, so two computations of x that differ in their last bit can differ
by a whole spike where x / Vth lies half-way between two counts. That is a property of the network, not of its
split: a matrix product that is cut differently rounds differently. The linears themselves add nothing to it
(sums of |x| are taken in float64), so on inputs that keep `MARGIN` away from such boundaries, which the tests
make sure of, outputs and gradients agree like those of plain linears: to 1e-5 of their largest value in
float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from spikingbrain_train.config.linear_transforms import GateEncoding, Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig, ParallelLinearBackend
from spikingbrain_train.config.run import Precision
from spikingbrain_train.ops.spike_encoding import naive_spike_encoding
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

T, B, HIDDEN, FFN, K = 12, 2, 24, 64, 3.0
MARGIN = 1e-4
TOLERANCE = 1e-5

SPLITS = {
    "one rank": (1, ParallelConfig()),
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "TP 4 + sequence parallel": (4, ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)),
}

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=256,  # padded to the same size, so that initial weights are the same, for one and two ranks
    max_position_embeddings=64,
    mixers=["gla", "swa", "gla", "full"],
    sliding_window=5,
    norm_epsilon=1e-3,
    init_method_std=0.2,  # layers that say as much as the residual stream
    spiking=SpikingConfig(projections=list(Projection), k=K),
)


def mlp_tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [FFN, HIDDEN] and [HIDDEN, FFN], input and output gradient [T, B, HIDDEN]."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((FFN, HIDDEN), (HIDDEN, FFN), (T, B, HIDDEN), (T, B, HIDDEN))
    fc1, fc2, x, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return fc1 * HIDDEN**-0.5, fc2 * FFN**-0.5, x, grad


def distance_to_a_rounding_boundary(x: Tensor) -> float:
    quotient = x / (x.abs().mean(-1, keepdim=True) / K)
    return (quotient - quotient.floor() - 0.5).abs().min().item()


def expected_mlp() -> tuple[Tensor, ...]:
    """Output and gradients of fc1, fc2 and x, on whole weights in float64."""
    fc1, fc2, x, grad = (tensor.double() for tensor in mlp_tensors())
    leaves = [tensor.requires_grad_() for tensor in (fc1, fc2, x)]
    hidden = silu(linear(naive_spike_encoding(x, K), fc1))
    output = linear(naive_spike_encoding(hidden, K), fc2)
    for encoded in (x, hidden):
        assert distance_to_a_rounding_boundary(encoded) > MARGIN, "choose another seed"
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


def spiking_linears(groups: ProcessGroups, parallel: ParallelConfig, **kwargs: Any) -> tuple[Any, Any]:
    """A column- and a row-parallel linear with this rank's part of the weights."""
    from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(MODEL, parallel, Precision.fp32, on_cpu=True)
    linears = ParallelLinears(ParallelLinearBackend.megatron, MODEL)
    kwargs = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False, **kwargs}
    column = linears.column(Projection.mlp_fc1)(HIDDEN, FFN, gather_output=False, **kwargs)
    kwargs.setdefault("skip_bias_add", False)
    row = linears.row(Projection.mlp_fc2)(FFN, HIDDEN, input_is_parallel=True, **kwargs)
    fc1, fc2, *_ = mlp_tensors()
    group = row.tp_group
    with torch.no_grad():
        column.weight.copy_(fc1.chunk(group.size(), dim=0)[group.rank()])
        row.weight.copy_(fc2.chunk(group.size(), dim=1)[group.rank()])
    return column, row


def run_mlp(groups: ProcessGroups, parallel: ParallelConfig) -> tuple[Tensor, ...]:
    """This rank's output and gradients of its weights and input."""
    column, row = spiking_linears(groups, parallel)
    _, _, x, grad = mlp_tensors()
    tp = groups.collection.tp
    if parallel.sequence_parallel:
        x, grad = (tensor.chunk(tp.size())[tp.rank()] for tensor in (x, grad))
    x = x.clone().requires_grad_()
    hidden, _ = column(x)
    output, _ = row(silu(hidden))
    leaves = (column.weight, row.weight, x)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


@pytest.mark.parametrize("name", SPLITS)
def test_a_spiking_mlp_gives_the_numbers_of_whole_weights(name: str, ranks: RankPool) -> None:
    world_size, parallel = SPLITS[name]
    results = ranks.run(run_mlp, parallel, world_size=world_size, parallel=parallel)
    outputs, fc1_grads, fc2_grads, x_grads = zip(*results, strict=True)
    joined = [torch.cat(fc1_grads, dim=0), torch.cat(fc2_grads, dim=1)]
    if parallel.sequence_parallel:
        joined = [torch.cat(outputs), *joined, torch.cat(x_grads)]
    else:
        for per_rank in (outputs, x_grads):
            assert all(torch.equal(tensor, per_rank[0]) for tensor in per_rank)
        joined = [outputs[0], *joined, x_grads[0]]
    for ours, expected in zip(joined, expected_mlp(), strict=True):
        assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


def run_row(groups: ProcessGroups, parallel: ParallelConfig, x: Tensor) -> tuple[Tensor, list[tuple]]:
    """What a row-parallel linear multiplies its weights by, and the all-reduces on the way."""
    _, row = spiking_linears(groups, parallel)
    row.to(x.dtype)
    tp = groups.collection.tp
    multiplied: list[Tensor] = []
    reduced: list[tuple] = []
    forward_impl, all_reduce = row._forward_impl, torch.distributed.all_reduce

    def remember_input(input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        multiplied.append(input)
        return forward_impl(input=input, weight=weight, **kwargs)

    def remember_reduction(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append((tuple(tensor.shape), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    row._forward_impl = remember_input
    torch.distributed.all_reduce = remember_reduction
    try:
        row(x.chunk(tp.size(), dim=-1)[tp.rank()])
    finally:
        torch.distributed.all_reduce = all_reduce
    return multiplied[0], reduced


@pytest.mark.parametrize(
    ("dtype", "sum_dtype"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str
)
def test_a_split_input_reduces_one_number_a_token_and_is_encoded_as_the_whole(
    dtype: torch.dtype, sum_dtype: torch.dtype, ranks: RankPool
) -> None:
    x = torch.randn(T, B, FFN, generator=torch.Generator().manual_seed(1)).to(dtype)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    results = ranks.run(run_row, parallel, x, world_size=2, parallel=parallel)
    encoded = torch.cat([part for part, _ in results], dim=-1)
    assert torch.equal(encoded, naive_spike_encoding(x, K))
    for _, reduced in results:
        output = ((T, B, HIDDEN), dtype)  # what the plain linear reduces
        assert reduced == [((T, B, 1), sum_dtype), output]


def run_expert(groups: ProcessGroups, parallel: ParallelConfig, tokens: int) -> Tensor:
    """The sum over ranks of what an expert's two linears return for `tokens` tokens."""
    column, row = spiking_linears(groups, parallel, is_expert=True, skip_bias_add=True)
    x = mlp_tensors()[2].flatten(0, 1)[:tokens]
    hidden, _ = column(x)
    output, _ = row(silu(hidden))
    group = groups.collection.expt_tp
    assert row.tp_group is group or group.size() == row.tp_group.size()
    torch.distributed.all_reduce(output, group=group)  # the token dispatcher's work
    return output.detach()


@pytest.mark.parametrize("tokens", [T * B, 1, 0])
def test_experts_reduce_over_their_own_tensor_parallel_group(tokens: int, ranks: RankPool) -> None:
    # Two tensor-parallel ranks, experts split over both; and experts that are whole on each rank.
    expected = expected_mlp()[0].flatten(0, 1)[:tokens]
    for expert_size in (2, 1):
        parallel = ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=expert_size
        )
        for output in ranks.run(run_expert, parallel, tokens, world_size=2, parallel=parallel):
            assert output.shape == (tokens, HIDDEN)
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE * 4)


def run_grouped(groups: ProcessGroups, parallel: ParallelConfig) -> tuple[Tensor, list[int]]:
    """A row-parallel linear in the shape of Transformer Engine's grouped one, on this rank's channels."""
    from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
    from spikingbrain_train.models.transformer_config import transformer_config

    class GroupedLinear(torch.nn.Module):
        """Takes splits beside the input, hides its group for experts, and keeps the real one."""

        def __init__(self, num_gemms: int, *, config: Any, is_expert: bool) -> None:
            super().__init__()
            self.tp_group, self._tp_group = None, groups.collection.expt_tp

        def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
            return x, m_splits

    config = transformer_config(MODEL, parallel, Precision.fp32, on_cpu=True)
    linears = ParallelLinears(ParallelLinearBackend.megatron, MODEL)
    spiking = linears.transformed(Projection.mlp_fc2, GroupedLinear, row_parallel=True, weight_split_axis=1)
    grouped = spiking(2, config=config, is_expert=True)
    tp = groups.collection.expt_tp
    x = mlp_tensors()[2].flatten(0, 1).chunk(tp.size(), dim=-1)[tp.rank()]
    return grouped(x, [20, 4])


def test_grouped_experts_are_encoded_over_their_group_and_keep_their_splits(ranks: RankPool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    results = ranks.run(run_grouped, parallel, world_size=2, parallel=parallel)
    encoded = torch.cat([part for part, _ in results], dim=-1)
    assert torch.equal(encoded, naive_spike_encoding(mlp_tensors()[2].flatten(0, 1), K))
    assert [splits for _, splits in results] == [[20, 4], [20, 4]]


def build(groups: ProcessGroups, model: ModelConfig, parallel: ParallelConfig) -> Any:
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    return build_model(model, config, kernels, groups.device).eval()


def some_tokens() -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


def logits_at(groups: ProcessGroups, ks: list[float]) -> tuple[Tensor, list[Tensor], int]:
    """Logits without spikes and for every k, of the same weights; and how many linears read spikes."""
    from spikingbrain_train.models.linears.whole_model import set_attributes, transforms_in

    plain = build(groups, replace(MODEL, spiking=SpikingConfig()), ParallelConfig())
    spiking = build(groups, MODEL, ParallelConfig())
    spiking.load_state_dict(plain.state_dict(), strict=True)  # same names, same shapes
    assert not transforms_in(plain, "spiking")
    results = []
    with torch.no_grad():
        for k in ks:
            set_attributes(spiking, "spiking", {"k": k})
            results.append(spiking(some_tokens()))
        return plain(some_tokens()), results, len(transforms_in(spiking, "spiking"))


def test_a_model_that_spikes_everywhere_approaches_the_plain_one_as_k_grows(ranks: RankPool) -> None:
    ((plain, spiking, linears),) = ranks.run(
        logits_at, [3.0, 30.0, 300.0, 1e4], world_size=1, parallel=ParallelConfig()
    )
    assert linears == 4 * 4 + 2  # qkv, output, fc1 and fc2 of four layers; the gate of two
    errors = [((logits - plain).norm() / plain.norm()).item() for logits in spiking]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2, "three spikes an average channel are coarse"
    # Every input is off by Vth / sqrt(12) of rounding noise: 1e-4 / sqrt(12) of its mean magnitude.
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("projection", list(Projection))
def test_only_the_projections_that_are_listed_read_spikes(projection: Projection, ranks: RankPool) -> None:
    expected = {
        Projection.qkv: {"linear_qkv": 4},
        Projection.gate: {"linear_gate_down_proj": 2},
        Projection.attention_output: {"linear_proj": 4},
        Projection.mlp_fc1: {"linear_fc1": 4},
        Projection.mlp_fc2: {"linear_fc2": 4},
    }[projection]
    spiking = SpikingConfig([projection], k=2.5)
    assert ranks.run(spiking_names, spiking, world_size=1, parallel=ParallelConfig()) == [expected]


def test_a_gate_can_read_spikes_in_front_of_each_of_its_matrices(ranks: RankPool) -> None:
    spiking = SpikingConfig([Projection.gate], GateEncoding.each_matrix, k=2.5)
    expected = {"linear_gate_down_proj": 2, "linear_gate_up_proj": 2}
    assert ranks.run(spiking_names, spiking, world_size=1, parallel=ParallelConfig()) == [expected]


def spiking_names(groups: ProcessGroups, spiking: SpikingConfig) -> dict[str, int]:
    from spikingbrain_train.models.linears.transformed_linear import TransformedLinear

    model = build(groups, replace(MODEL, spiking=spiking), ParallelConfig())
    names: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, TransformedLinear):
            assert module.transforms["spiking"].k == 2.5
            last = name.rsplit(".", 1)[-1]
            names[last] = names.get(last, 0) + 1
    return names


def gate_and_published_gate(groups: ProcessGroups, encoding: GateEncoding) -> tuple[Tensor, Tensor]:
    """The log gate of a layer with spikes, and what the published code computes of the same weights."""
    spiking = SpikingConfig([Projection.gate], encoding, k=K)
    layer = build(groups, replace(MODEL, spiking=spiking), ParallelConfig()).decoder.layers[0].self_attention
    hidden = torch.randn(T, B, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gate = layer.log_gate(hidden, torch.empty(0)).flatten(2)
        down, up = layer.linear_gate_down_proj.weight, layer.linear_gate_up_proj
        logits = linear(naive_spike_encoding(hidden, K), up.weight @ down, up.bias)
        return gate, torch.nn.functional.logsigmoid(logits) / MODEL.gla.gate_logit_normalizer


def test_a_gate_encoded_once_is_the_published_merged_projection(ranks: RankPool) -> None:
    def run(encoding: GateEncoding) -> tuple[Tensor, Tensor]:
        (result,) = ranks.run(gate_and_published_gate, encoding, world_size=1, parallel=ParallelConfig())
        return result

    assert SpikingConfig().gate_encoding is GateEncoding.once
    torch.testing.assert_close(*run(GateEncoding.once), rtol=1e-5, atol=1e-7)
    twice, published = run(GateEncoding.each_matrix)
    assert (twice - published).abs().max() > 1e-4 * published.abs().max()


def histogram(groups: ProcessGroups, parallel: ParallelConfig) -> Tensor:
    """Spike counts of one forward pass, summed over ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from spikingbrain_train.models.linears.whole_model import collect_statistics, transforms_in

    everywhere = replace(MODEL.spiking, gate_encoding=GateEncoding.each_matrix)
    config = replace(MODEL, spiking=everywhere)
    model = build(groups, config, parallel)
    with collect_statistics(model, config, groups.device) as statistics, torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=lambda _, stage: (stage(some_tokens()), lambda logits: (logits.sum(), {})),
            data_iterator=iter([]),
            model=[model],
            num_microbatches=1,
            seq_length=16,
            micro_batch_size=2,
            forward_only=True,
        )
    assert all(transform.statistics is None for transform in transforms_in(model, "spiking"))
    assert len(statistics["spiking"]) == config.num_layers
    counts = torch.stack([layer.counts for layer in statistics["spiking"]]).sum(0)
    torch.distributed.all_reduce(counts)
    return counts


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ParallelConfig(tensor_model_parallel_size=2)),
        (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, ParallelConfig(pipeline_model_parallel_size=2)),
    ],
    ids=["TP 2", "TP 2 + sequence parallel", "PP 2"],
)
def test_every_spike_is_counted_once_however_the_model_is_split(
    world_size: int, parallel: ParallelConfig, ranks: RankPool
) -> None:
    (one_rank,) = ranks.run(histogram, ParallelConfig(), world_size=1, parallel=ParallelConfig())
    widths = 4 * (HIDDEN + 32 + HIDDEN + FFN) + 2 * (HIDDEN + MODEL.gla.gate_low_rank_dim)
    assert one_rank.sum() == 2 * 16 * widths
    for split in ranks.run(histogram, parallel, world_size=world_size, parallel=parallel):
        assert split.sum() == one_rank.sum()
        if parallel.pipeline_model_parallel_size == 1:  # stages draw other initial weights
            # A count on a rounding boundary moves to the next bin, and shifts what comes after it a little.
            assert (split - one_rank).abs().sum() <= 1e-3 * one_rank.sum()
