"""Context-parallel linear attention against the plain recurrence over whole sequences, in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikingbrain_train.architecture.sequence_layout import DocumentBounds, SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel, ParallelConfig
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention
from spikingbrain_train.parallel.context_parallel import linear_attention
from spikingbrain_train.parallel.context_parallel.linear_attention import context_parallel_linear_attention
from spikingbrain_train.parallel.context_parallel.ulysses import _evenly_grouped, to_whole_sequences
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool

METHODS = list(LinearAttentionContextParallel)
H, G, K, V = 4, 2, 6, 5
SCALE = 0.3
# The project's bound. Rounding of float64 over a few dozen tokens stays orders of magnitude below it.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """Sequences of one micro-batch."""

    text_length: int
    num_sink_tokens: int = 0
    cu_seqlens: tuple[DocumentBounds, ...] | None = None
    num_rows: int = 1
    sinks_are_padding: bool = False
    gate: str = "mild"
    num_heads: int = H
    num_groups: int = G

    def layout(self, rank: int = 0, size: int = 1) -> SequenceLayout:
        return SequenceLayout(
            self.text_length, self.num_sink_tokens, rank, size, self.cu_seqlens, self.sinks_are_padding
        )

    def inputs(self) -> list[Tensor]:
        """q, k, v, log_gate over the whole sequence and the weights of the outputs in the loss."""
        torch.manual_seed(self.text_length)
        shape = (self.num_rows, self.num_sink_tokens + self.text_length)
        q, k, v, o_weight = (
            torch.randn(*shape, heads, dim, dtype=torch.float64)
            for heads, dim in (
                (self.num_heads, K),
                (self.num_groups, K),
                (self.num_groups, V),
                (self.num_heads, V),
            )
        )
        x = torch.rand(*shape, self.num_groups, K, dtype=torch.float64)
        log_gate = {
            "weak": -0.01 * x,
            "mild": -x,
            "strong": -50 * x,
            "some infinite": torch.where(x < 0.1, -torch.inf, -x),
        }
        return [q, k, v, log_gate[self.gate], o_weight]


def random_documents(text_length: int, rng: random.Random) -> DocumentBounds:
    ends = rng.sample(range(1, text_length), rng.randint(0, min(6, text_length - 1)))
    return (0, *sorted(ends), text_length)


def random_cases(size: int, seed: int) -> list[Case]:
    """Sequences that ``size`` ranks can split, with and without sinks, documents and several rows."""
    rng = random.Random(seed)
    cases = []
    for num_sink_tokens in (0, 0, 3, 3, 4):
        slice_length = rng.randint(num_sink_tokens + 2, 9)
        text_length = size * slice_length - num_sink_tokens
        num_rows = rng.randint(1, 2)
        rows = tuple(random_documents(text_length, rng) for _ in range(num_rows))
        for cu_seqlens in (None, rows):
            padding = num_sink_tokens > 0 and rng.random() < 0.4
            gate = rng.choice(["mild", "strong", "some infinite"])
            cases.append(Case(text_length, num_sink_tokens, cu_seqlens, num_rows, padding, gate))
    return cases


def _recurrence(inputs: list[Tensor], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    o, state = gated_linear_attention(
        *inputs, scale=SCALE, initial_state=initial_state, output_final_state=True, backend="naive"
    )
    assert state is not None
    return o, state


def whole_sequence(case: Case) -> list[Tensor]:
    """Output and gradients of q, k, v and the log gate: the recurrence row by row, document by document, as
    the rules of visibility say.
    """
    *inputs, o_weight = case.inputs()
    leaves = [x.requires_grad_() for x in inputs]
    rows = []
    for row in range(case.num_rows):
        tokens = [x[row : row + 1] for x in leaves]
        sinks = case.num_sink_tokens
        outputs, state = [], None
        if sinks:
            o, state = _recurrence([x[:, :sinks] for x in tokens], None)
            if case.sinks_are_padding:
                o, state = torch.zeros_like(o), None
            outputs.append(o)
        bounds = (0, case.text_length) if case.cu_seqlens is None else case.cu_seqlens[row]
        for start, end in zip(bounds, bounds[1:], strict=False):
            outputs.append(_recurrence([x[:, sinks + start : sinks + end] for x in tokens], state)[0])
        rows.append(torch.cat(outputs, dim=1))
    o = torch.cat(rows)
    return [o.detach(), *torch.autograd.grad((o * o_weight).sum(), leaves)]


def _slices(groups: ProcessGroups, cases: list[Case], recompute: bool) -> dict[str, list[list[Tensor]]]:
    """Per method and case: output and gradients of this rank's slice."""
    cp_group = groups.collection.cp
    rank, size = cp_group.rank(), cp_group.size()
    results: dict[str, list[list[Tensor]]] = {method.value: [] for method in METHODS}
    for method in METHODS:
        for case in cases:
            layout = case.layout(rank, size)
            *inputs, o_weight = (x.chunk(size, dim=1)[rank] for x in case.inputs())
            leaves = [x.clone().requires_grad_() for x in inputs]
            mixer = partial(
                context_parallel_linear_attention,
                layout=layout,
                cp_group=cp_group,
                method=method,
                scale=SCALE,
                backend="chunk",
            )
            o = checkpoint(mixer, *leaves, use_reentrant=False) if recompute else mixer(*leaves)
            (o * o_weight).sum().backward()
            results[method.value].append([o.detach(), *(x.grad for x in leaves)])
    return results


def assert_equal_to_whole_sequence(
    ranks: RankPool, cases: list[Case], world_size: int, recompute: bool = False
) -> None:
    slices = ranks.run(
        _slices,
        cases,
        recompute,
        world_size=world_size,
        parallel=ParallelConfig(context_parallel_size=world_size),
    )
    for index, case in enumerate(cases):
        expected = whole_sequence(case)
        for method in METHODS:
            parts = [of_rank[method.value][index] for of_rank in slices]
            gathered = [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]
            for name, actual, exact in zip(("o", "q", "k", "v", "log_gate"), gathered, expected, strict=True):
                # Where no state survives, the exact gradient of the gates is zero.
                error = ((actual - exact).norm() / exact.norm().clamp_min(1e-3)).item()
                assert error <= TOLERANCE, (method.value, name, error, case)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_equal_the_recurrence_over_random_documents(ranks: RankPool, world_size: int) -> None:
    cases = [case for seed in range(4) for case in random_cases(world_size, seed)]
    assert_equal_to_whole_sequence(ranks, cases, world_size)


def test_boundaries_at_slice_edges_and_documents_over_three_ranks(ranks: RankPool) -> None:
    edge = Case(16, cu_seqlens=((0, 4, 8, 16),))
    cases = [
        edge,
        Case(16, cu_seqlens=((0, 3, 14, 16),)),  # ranks 0 to 3 share the second document
        Case(16, cu_seqlens=(tuple(range(17)),)),  # every document is one token
        Case(16, cu_seqlens=((0, 8, 16), (0, 1, 2, 16)), num_rows=2),
        Case(13, num_sink_tokens=3, cu_seqlens=((0, 1, 5, 9, 13),)),  # edges are at 1, 5 and 9
        Case(13, num_sink_tokens=3, cu_seqlens=((0, 4, 13), (0, 7, 13)), num_rows=2),
        Case(13, num_sink_tokens=3, sinks_are_padding=True),
        replace(edge, gate="strong"),
    ]
    assert_equal_to_whole_sequence(ranks, cases, 4)


def test_long_slices_go_through_chunks_and_segments(ranks: RankPool) -> None:
    cases = [
        Case(600, num_rows=2),
        Case(597, num_sink_tokens=3, cu_seqlens=((0, 250, 260, 597),)),
        Case(600, cu_seqlens=((0, 80, 600), (0, 500, 600)), num_rows=2, gate="strong"),
    ]
    assert_equal_to_whole_sequence(ranks, cases, 3)


@pytest.mark.parametrize(
    ("num_heads", "num_groups"), [(7, 1), (6, 2), (4, 4), (12, 3), (3, 3), (2, 1), (9, 3), (14, 2)]
)
def test_heads_and_groups_that_do_not_divide(ranks: RankPool, num_heads: int, num_groups: int) -> None:
    cases = [
        Case(45, num_sink_tokens=3, num_rows=2, num_heads=num_heads, num_groups=num_groups),
        Case(45, 3, ((0, 20, 45), (0, 9, 10, 45)), num_rows=2, num_heads=num_heads, num_groups=num_groups),
    ]
    assert_equal_to_whole_sequence(ranks, cases, 4)


def test_uneven_groups_are_repeated_without_waiting_for_the_device() -> None:
    """Tensors on the meta device have shapes only: whoever asks the device for the counts fails."""
    q_BShK, k_BSgK = torch.zeros(2, 5, 3, 4, device="meta"), torch.zeros(2, 5, 2, 4, device="meta")
    _, [repeated] = _evenly_grouped(q_BShK, [k_BSgK], (2, 1))
    assert repeated.shape == (2, 5, 3, 4) and repeated.is_meta
    k_BSgK = torch.randn(2, 5, 2, 4, requires_grad=True)
    _, [repeated] = _evenly_grouped(torch.zeros(2, 5, 3, 4), [k_BSgK], (2, 1))
    assert torch.equal(repeated, k_BSgK[:, :, [0, 0, 1]])
    repeated.sum().backward()
    assert k_BSgK.grad is not None and torch.equal(k_BSgK.grad[0, 0, :, 0], torch.tensor([2.0, 1.0]))


def _share_in_bfloat16(groups: ProcessGroups, case: Case) -> list[Tensor]:
    """This rank's share of the heads, and the gradients of its slice: the rank's number plus one."""
    cp_group = groups.collection.cp
    q, k, _, log_gate = (x.chunk(cp_group.size(), dim=1)[cp_group.rank()] for x in case.inputs()[:4])
    leaves = [q.bfloat16().requires_grad_(), k.bfloat16().requires_grad_(), log_gate.float().requires_grad_()]
    share_q, shared = to_whole_sequences(leaves[0], leaves[1:], cp_group)
    torch.autograd.backward(
        [share_q, *shared], [torch.full_like(x, cp_group.rank() + 1) for x in (share_q, *shared)]
    )
    return [share_q.detach(), *(x.detach() for x in shared), *(x.grad for x in leaves)]  # type: ignore[misc]


def test_gates_stay_float32_beside_bfloat16(ranks: RankPool) -> None:
    case = Case(57, num_sink_tokens=3, num_heads=7, num_groups=1)
    shares = ranks.run(
        _share_in_bfloat16, case, world_size=3, parallel=ParallelConfig(context_parallel_size=3)
    )
    q, k, _, log_gate, _ = case.inputs()
    heads = torch.tensor([1, 1, 2, 2, 3, 3, 3])  # plus one: the rank that gets each
    for _, share_k, share_gate, grad_q, grad_k, grad_gate in shares:
        assert torch.equal(share_k, k.bfloat16()) and torch.equal(share_gate, log_gate.float())
        assert torch.equal(grad_q, heads.to(grad_q).view(7, 1).expand_as(grad_q))
        assert (grad_k == 1 + 2 + 3).all() and (grad_gate == 1 + 2 + 3).all()
        assert grad_gate.dtype == torch.float32
    assert torch.equal(torch.cat([of_rank[0] for of_rank in shares], dim=2), q.bfloat16())


def test_activations_can_be_computed_again(ranks: RankPool) -> None:
    cases = [Case(21, num_sink_tokens=3, cu_seqlens=((0, 2, 19, 21),)), Case(21)]
    assert_equal_to_whole_sequence(ranks, cases, 3, recompute=True)


def _frozen_slice(groups: ProcessGroups) -> list[Tensor]:
    """Only the last rank's values have a gradient: the others must still take part in the backward pass."""
    cp_group = groups.collection.cp
    case = Case(13, num_sink_tokens=3, cu_seqlens=((0, 1, 10, 13),))
    *inputs, _ = (x.chunk(4, dim=1)[cp_group.rank()] for x in case.inputs())
    gradients = []
    for method in METHODS:
        q, k, v, log_gate = (x.clone() for x in inputs)
        v.requires_grad_(cp_group.rank() == 3)
        o = context_parallel_linear_attention(
            q,
            k,
            v,
            log_gate,
            layout=case.layout(cp_group.rank(), 4),
            cp_group=cp_group,
            method=method,
            scale=SCALE,
            backend="chunk",
        )
        o.sum().backward()
        gradients.append(torch.zeros(0) if v.grad is None else v.grad)
    return gradients


def test_ranks_without_gradients_of_their_own_do_not_make_others_wait(ranks: RankPool) -> None:
    gradients = ranks.run(
        _frozen_slice, world_size=4, parallel=ParallelConfig(context_parallel_size=4), timeout=30
    )
    allgather, *others = gradients[3]
    for other in others:
        torch.testing.assert_close(other, allgather)
    assert len(others) == len(METHODS) - 1 and allgather.norm() > 0.1


def local_mixer(layout: SequenceLayout | None, num_rows: int = 1, T: int = 8) -> Tensor:
    x = torch.ones(num_rows, T, G, K)
    return context_parallel_linear_attention(
        torch.ones(num_rows, T, H, K),
        x,
        x,
        -x,
        layout=layout,
        cp_group=None,
        method=LinearAttentionContextParallel.allscan,
        scale=SCALE,
        backend="chunk",
    )


def test_without_documents_and_ranks_it_is_the_plain_op(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = local_mixer(None)

    def no_end_state(*_: Tensor) -> None:
        raise AssertionError("the end state is for communication only")

    monkeypatch.setattr(linear_attention, "gated_linear_attention_end_state", no_end_state)
    assert torch.equal(local_mixer(SequenceLayout(8)), expected)
    assert torch.equal(local_mixer(SequenceLayout(6, num_sink_tokens=2)), expected)


@pytest.mark.parametrize(
    ("layout", "num_rows", "sentence"),
    [
        (SequenceLayout(16, context_parallel_size=2), 1, "rank 0 of 2, .* group has rank 0 of 1"),
        (SequenceLayout(9), 1, "q has 8 tokens, the layout's slices have 9"),
        (SequenceLayout(8, cu_seqlens=((0, 8),)), 2, "documents of 1 rows, q has 2"),
    ],
)
def test_layouts_of_another_batch_are_refused(layout: SequenceLayout, num_rows: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        local_mixer(layout, num_rows)
