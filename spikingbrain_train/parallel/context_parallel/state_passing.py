"""How the states of recurrences travel along context-parallel ranks, forward and backward.

Every rank's slice maps the state before it to the state after it: ``S_out = A S_in + S_local``. The
transition A is diagonal where every channel fades by itself (gated linear attention), else a matrix (the
delta rule). From ``(S_local, A)`` of all ranks each rank gets its ``S_in``; from the gradients of all
``S_in`` each gets those of its own ``S_local`` and ``A``, by the same recurrence from the last rank to the
first::

    S_in[r + 1] = A[r] S_in[r] + S_local[r]
    grad S_local[r] = grad S_out[r] = A[r + 1]^T grad S_out[r + 1] + (own gradient of S_in[r + 1])

What travels does not depend on the length of the sequence, and with the all-scan not on the number of ranks.
A pass is started, and waited for later; local work goes on in between, in the backward pass too.

Shape legend: B batch, G key/value groups, K key dim, V value dim; n ranks. A transition is [B, G, K] where it
is diagonal, and [B, G, K, K] where it is a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikingbrain_train.config.parallel import LinearAttentionContextParallel

# The all-scan cuts a state into blocks of about this size: small enough that n ranks work at the same time,
# large enough to be worth a message.
_BLOCK_BYTES = 128 * 1024

Pending = Callable[[], Tensor]
"""Waits for a communication under way and returns what it brought."""


def advance(transition: Tensor, state_BGKV: Tensor, local_BGKV: Tensor) -> Tensor:
    """``A S + S_local``: the state behind a slice [B, G, K, V]."""
    if transition.dim() < state_BGKV.dim():
        return torch.addcmul(local_BGKV, transition.unsqueeze(-1), state_BGKV)
    return local_BGKV + transition @ state_BGKV


def _adjoint(transition: Tensor) -> Tensor:
    """A^T, with which gradients travel back; a diagonal is its own."""
    return transition if transition.dim() == 3 else transition.transpose(-1, -2)


class _Exchange(Protocol):
    """One method's communication for one pass and its backward pass."""

    def start_forward(self, state_BGKV: Tensor, transition: Tensor) -> Pending:
        """From S_local and A, S_in of this rank."""

    def start_backward(self, grad_BGKV: Tensor) -> Pending:
        """From the gradient of S_in, the gradient of S_out of this rank."""


class _AllGather:
    """Every rank gets every rank's pair and runs the recurrence over those before it (LASP-2)."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def start_forward(self, state_BGKV: Tensor, transition: Tensor) -> Pending:
        is_diagonal = transition.dim() == 3
        columns = transition.unsqueeze(-1) if is_diagonal else transition
        pending = self._gather(torch.cat((state_BGKV, columns), dim=-1))

        def wait() -> Tensor:
            widths = [state_BGKV.shape[-1], columns.shape[-1]]
            states_nBGKV, columns_nBGKX = pending().split(widths, dim=-1)
            of_ranks = columns_nBGKX.squeeze(-1) if is_diagonal else columns_nBGKX
            self._transitions = of_ranks.clone().unbind(0)
            return self._combine(states_nBGKV, self._transitions, range(self._group.rank()))

        return wait

    def start_backward(self, grad_BGKV: Tensor) -> Pending:
        pending = self._gather(grad_BGKV)
        ranks = range(self._group.size() - 1, self._group.rank(), -1)
        return lambda: self._combine(pending(), [_adjoint(each) for each in self._transitions], ranks)

    def _gather(self, x: Tensor) -> Pending:
        x = x.contiguous()
        gathered = x.new_empty(self._group.size(), *x.shape)
        work = torch.distributed.all_gather_into_tensor(
            gathered.flatten(0, 1), x, group=self._group, async_op=True
        )

        def wait() -> Tensor:
            work.wait()
            return gathered

        return wait

    @staticmethod
    def _combine(x_nBGKV: Tensor, transitions: Sequence[Tensor], ranks: range) -> Tensor:
        total = torch.zeros_like(x_nBGKV[0])
        for rank in ranks:
            total = advance(transitions[rank], total, x_nBGKV[rank])
        return total


class _AllScan:
    """The recurrence itself walks along the ranks, in blocks of V: many ranks work at once (ZeCO).

    A transition mixes the rows of a state and leaves its columns apart.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def start_forward(self, state_BGKV: Tensor, transition: Tensor) -> Pending:
        self._transition = transition
        return _in_background(lambda: self._scan(state_BGKV, transition, step=1), state_BGKV.device)

    def start_backward(self, grad_BGKV: Tensor) -> Pending:
        adjoint = _adjoint(self._transition)
        return _in_background(lambda: self._scan(grad_BGKV, adjoint, step=-1), grad_BGKV.device)

    def _scan(self, local_BGKV: Tensor, transition: Tensor, step: int) -> Tensor:
        """What the neighbour at ``-step`` passes to this rank, after passing on what follows from it."""
        received, sends = [], []
        blocks = min(local_BGKV.shape[3], -(-local_BGKV.nbytes // _BLOCK_BYTES))
        source, target = self._neighbour(-step), self._neighbour(step)
        for local in local_BGKV.chunk(blocks, dim=3):
            if source is None:
                block, onward = torch.zeros_like(local), local
            else:
                block = torch.empty_like(local, memory_format=torch.contiguous_format)
                torch.distributed.recv(block, source, self._group)
                onward = advance(transition, block, local)
            received.append(block)
            if target is not None:
                onward = onward.contiguous()
                send = torch.distributed.isend(onward, target, self._group)
                assert send is not None, "this rank belongs to the group"
                sends.append((send, onward))
        for send, _ in sends:  # the blocks live until they are sent
            send.wait()
        return torch.cat(received, dim=3)

    def _neighbour(self, step: int) -> int | None:
        """Global rank of a neighbour in the group; None beyond its ends."""
        rank = self._group.rank() + step
        inside = 0 <= rank < self._group.size()
        return torch.distributed.get_global_rank(self._group, rank) if inside else None


def _in_background(communicate: Callable[[], Tensor], device: torch.device) -> Pending:
    """Let messages and the arithmetic between them go on beside the caller's work.

    On GPUs they have a stream of their own, on CPU a thread.
    """
    if device.type != "cuda":
        # Grad mode belongs to a thread.
        return _thread().submit(torch.no_grad()(communicate)).result
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = communicate()
    return partial(_wait_for_stream, stream, result, communicate)


def _wait_for_stream(stream: torch.cuda.Stream, result: Tensor, _communicate: Callable[[], Tensor]) -> Tensor:
    """Let the caller's stream wait for the result.

    ``_communicate`` is here to live until now: its inputs are memory of that stream, which waits only here.
    """
    current = torch.cuda.current_stream(result.device)
    current.wait_stream(stream)
    result.record_stream(current)
    return result


@cache
def _thread() -> ThreadPoolExecutor:
    # One thread: passes keep the order in which they were started, which is the same on every rank.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="all-scan")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


_EXCHANGES: dict[LinearAttentionContextParallel, Callable[[torch.distributed.ProcessGroup], _Exchange]] = {
    LinearAttentionContextParallel.allgather: _AllGather,
    LinearAttentionContextParallel.allscan: _AllScan,
}


class StatePassing:
    """A pass that is under way.

    Its two ends are separate nodes of the autograd graph, so that in the backward pass, too, the
    communication starts at one and is waited for at the other.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, method: LinearAttentionContextParallel) -> None:
        self.exchange = _EXCHANGES[method](group)
        self.pending_state: Pending | None = None
        self.pending_grad: tuple[Pending, Tensor] | None = None
        self.token: Tensor | None = None

    def wait(self) -> Tensor:
        """S_in of this rank [B, G, K, V], zeros on the first.

        Call it once; the loss of every rank must depend on the result (a product with zero is enough), or the
        others wait for it in the backward pass.
        """
        token, self.token = self.token, None  # it would tie the graph to this object, which the graph holds
        return _Wait.apply(token, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, transition: Tensor, passing: StatePassing) -> Tensor:
        ctx.passing, ctx.is_diagonal = passing, transition.dim() < state.dim()
        passing.pending_state = passing.exchange.start_forward(state.detach(), transition.detach())
        return state.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        (pending, state_in), ctx.passing.pending_grad = ctx.passing.pending_grad, None
        grad_state_out = pending()
        if ctx.is_diagonal:
            return grad_state_out, (grad_state_out * state_in).sum(-1), None
        return grad_state_out, grad_state_out @ state_in.transpose(-1, -2), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, passing: StatePassing) -> Tensor:
        assert passing.pending_state is not None, "a pass is waited for once"
        state_in, passing.pending_state = passing.pending_state(), None
        ctx.passing = passing
        ctx.save_for_backward(state_in)
        return state_in

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (state_in,) = ctx.saved_tensors
        ctx.passing.pending_grad = ctx.passing.exchange.start_backward(grad), state_in
        return grad.new_zeros(()), None


def start_state_passing(
    state_BGKV: Tensor,
    transition: Tensor,
    group: torch.distributed.ProcessGroup,
    method: LinearAttentionContextParallel,
) -> StatePassing:
    """Start to compute the state before every rank's slice; every rank of the group must call this.

    Args:
        state_BGKV: S_local, the state after this rank's slice from a zero state (or from the beginning of its
            last document, if one begins here), float32 or float64.
        transition: A, what the slice makes of a state before it: [B, G, K] or [B, G, K, K]; zeros where a
            document begins in it.
        group: the context-parallel ranks in the order of their slices.
        method: ``allgather`` sends every state to every rank, ``allscan`` one state to the next rank.
    """
    passing = StatePassing(group, method)
    if torch.is_grad_enabled() and not state_BGKV.requires_grad:
        # The ranks need not agree on what has a gradient; all of them must take part in the backward pass.
        state_BGKV = state_BGKV.detach().requires_grad_()
    passing.token = _Start.apply(state_BGKV, transition, passing)
    return passing
