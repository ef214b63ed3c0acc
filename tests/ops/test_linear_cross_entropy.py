"""The fused output projection and loss against torch's own cross entropy and KL divergence under autograd.

Inputs are float64, where both sides agree to rounding: 1e-12 relative. bfloat16 is compared with the float64
result of the same (rounded) inputs; its logits alone carry a relative error of 2^-9, so 2 percent of the
gradient's norm is the bound there.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spikingbrain_train.ops import linear_cross_entropy as module
from spikingbrain_train.ops.linear_cross_entropy import (
    Distillation,
    KeptDistillation,
    TokenLosses,
    linear_cross_entropy,
)

N, D, V, TEACHER_D = 37, 12, 53, 20


@dataclass
class Problem:
    """Random inputs; some tokens are masked and weights differ."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss_weights: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def distillation(self, weight: float, temperature: float) -> Distillation:
        return Distillation(self.teacher_hidden, self.teacher_weight, weight, temperature)

    def kept_distillation(self, weight: float, temperature: float) -> KeptDistillation:
        """Every token of the teacher's distribution in an order of its own, the last one in two halves."""
        logits = self.teacher_hidden @ self.teacher_weight.t() / temperature
        ids = torch.rand(N, V).argsort(1)
        log_probabilities = F.log_softmax(logits, dim=1).gather(1, ids)
        shares = log_probabilities.exp()
        shares[:, -1] /= 2
        ids, shares, log_probabilities = (
            torch.cat((each, each[:, -1:]), dim=1) for each in (ids, shares, log_probabilities)
        )
        return KeptDistillation(ids, shares, log_probabilities, weight, temperature)


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    loss_weights = torch.rand(N)
    loss_weights[::5] = 0.0
    return Problem(
        hidden=torch.randn(N, D, dtype=torch.float64),
        weight=torch.randn(V, D, dtype=torch.float64),
        labels=torch.randint(V, (N,)),
        loss_weights=loss_weights,
        teacher_hidden=torch.randn(N, TEACHER_D, dtype=torch.float64),
        teacher_weight=torch.randn(V, TEACHER_D, dtype=torch.float64) / 2,
    )


@pytest.fixture(params=["one block", "blocks of 5 rows", "chunks of 16 tokens", "chunks and blocks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tokens in chunks, chunks in blocks, the weight's gradient in rows; none divides what it cuts."""
    if "chunks" in request.param:
        monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 16 * V * 8)
    if "blocks" in request.param:
        monkeypatch.setitem(module._BLOCK_ELEMENTS, "cpu", 5 * V)
        monkeypatch.setitem(module._SUMMED_ELEMENTS, "cpu", 10 * D)


def expected(
    problem: Problem, hidden: Tensor, weight: Tensor, distillation: Distillation | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, cross entropy and KL divergence by their definitions."""
    logits = hidden @ weight.t()
    cross_entropy = F.cross_entropy(logits, problem.labels, reduction="none")
    if distillation is None:
        return problem.loss_weights.double() @ cross_entropy, cross_entropy, None
    w, t = distillation.weight, distillation.temperature
    student = F.log_softmax(logits / t, dim=1)
    teacher = F.log_softmax(problem.teacher_hidden @ problem.teacher_weight.t() / t, dim=1)
    kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    loss = problem.loss_weights.double() @ ((1 - w) * cross_entropy + w * t * t * kl)
    return loss, cross_entropy, kl


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("cut")
def test_loss_and_gradients_are_those_of_cross_entropy(problem: Problem) -> None:
    ours, theirs = problem.leaves(), problem.leaves()
    loss, token_losses = linear_cross_entropy(*ours, problem.labels, problem.loss_weights)
    reference, cross_entropy, _ = expected(problem, *theirs)
    assert_close(loss, reference)
    assert_close(token_losses.cross_entropy, cross_entropy)
    assert token_losses.kl_divergence is None
    (loss * 3).backward()
    (reference * 3).backward()
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x.grad, y.grad)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_adds_the_kl_divergence(problem: Problem, weight: float, temperature: float) -> None:
    distillation = problem.distillation(weight, temperature)
    ours, theirs = problem.leaves(), problem.leaves()
    loss, token_losses = linear_cross_entropy(
        *ours, problem.labels, problem.loss_weights, distillation=distillation
    )
    reference, cross_entropy, kl = expected(problem, *theirs, distillation)
    assert_close(loss, reference)
    assert_close(token_losses.cross_entropy, cross_entropy)
    assert_close(token_losses.kl_divergence, kl)
    loss.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x.grad, y.grad)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_kept_tokens_stand_for_the_distribution(problem: Problem, weight: float, temperature: float) -> None:
    ours, theirs = problem.leaves(), problem.leaves()
    loss, token_losses = linear_cross_entropy(
        *ours,
        problem.labels,
        problem.loss_weights,
        distillation=problem.kept_distillation(weight, temperature),
    )
    reference, cross_entropy, kl = expected(problem, *theirs, problem.distillation(weight, temperature))
    assert_close(loss, reference)
    assert_close(token_losses.cross_entropy, cross_entropy)
    assert_close(token_losses.kl_divergence, kl)
    loss.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x.grad, y.grad)


class _Largest(TorchDispatchMode):
    """Remembers the most rows of a vocabulary's width that any tensor made meanwhile has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # A weight that is turned round is as wide, and not contiguous.
        if isinstance(made, Tensor) and made.shape[1:] == (self._width,) and made.is_contiguous():
            self.rows = max(self.rows, len(made))
        return made


@pytest.mark.parametrize("vocabulary", [slice(0, V), slice(20, V)], ids=["one rank", "one of two ranks"])
def test_no_logits_of_all_tokens_exist_of_either_model(
    problem: Problem, vocabulary: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = vocabulary.stop - vocabulary.start
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 16 * rows * 8)
    hidden, weight = problem.leaves()
    weight = weight[vocabulary].detach().requires_grad_()
    distillation = Distillation(problem.teacher_hidden, problem.teacher_weight[vocabulary], 1.0, 2.0)
    shared = {}
    if rows < V:  # what another rank would add changes no shape
        shared = {"reduce_max": torch.clone, "reduce_sum": torch.clone, "vocab_start": vocabulary.start}
    with _Largest(rows) as largest:
        loss, _ = linear_cross_entropy(
            hidden, weight, problem.labels, problem.loss_weights, distillation=distillation, **shared
        )
        loss.backward()
    assert 0 < largest.rows <= 16


def test_masked_tokens_have_no_gradient(problem: Problem) -> None:
    hidden, weight = problem.leaves()
    linear_cross_entropy(hidden, weight, problem.labels, problem.loss_weights)[0].backward()
    masked = problem.loss_weights == 0
    assert masked.any()
    assert (hidden.grad[masked] == 0).all()
    assert (hidden.grad[~masked] != 0).any(dim=1).all()


class _SharedVocabulary:
    """Reductions between threads, one thread a rank."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts: list[Tensor] = [torch.empty(0)] * ranks

    def of_rank(self, rank: int) -> dict:
        def reduction(combine):
            def reduce(x: Tensor) -> Tensor:
                self.parts[rank] = x.clone()
                self.barrier.wait()
                result = combine(torch.stack(self.parts))
                self.barrier.wait()
                return result

            return reduce

        return {
            "reduce_max": reduction(lambda x: x.amax(0)),
            "reduce_sum": reduction(lambda x: x.sum(0)),
        }


@pytest.mark.parametrize(
    "cuts", [[20], [7, 40], [V]], ids=["two ranks", "three ranks", "a rank without rows"]
)
@pytest.mark.parametrize("distil", [None, (0.4, 1.0), (0.4, 2.0)], ids=["plain", "KL", "KL at 2"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept tokens"])
def test_ranks_with_parts_of_the_vocabulary_agree_with_one(
    problem: Problem, cuts: list[int], distil: tuple[float, float] | None, kept: bool
) -> None:
    if kept and distil is None:
        return
    starts, stops = [0, *cuts], [*cuts, V]
    shared = _SharedVocabulary(len(starts))
    of_kept = problem.kept_distillation(*distil) if kept and distil is not None else None

    def run(rank: int) -> tuple[Tensor, TokenLosses, Tensor, Tensor]:
        rows = slice(starts[rank], stops[rank])
        hidden, weight = problem.leaves()
        distillation = None
        if distil is not None:
            own = Distillation(problem.teacher_hidden, problem.teacher_weight[rows], *distil)
            distillation = of_kept or own
        weight = weight[rows].detach().requires_grad_()
        loss, token_losses = linear_cross_entropy(
            hidden,
            weight,
            problem.labels,
            problem.loss_weights,
            vocab_start=starts[rank],
            distillation=distillation,
            **shared.of_rank(rank),
        )
        loss.backward()
        return loss.detach(), token_losses, hidden.grad, weight.grad

    with ThreadPoolExecutor(len(starts)) as pool:
        results = list(pool.map(run, range(len(starts))))
    hidden, weight = problem.leaves()
    reference, cross_entropy, kl = expected(
        problem, hidden, weight, None if distil is None else problem.distillation(*distil)
    )
    reference.backward()
    for loss, token_losses, _, _ in results:
        assert_close(loss, reference.detach())
        assert_close(token_losses.cross_entropy, cross_entropy.detach())
        if kl is not None:
            assert_close(token_losses.kl_divergence, kl.detach())
    assert_close(sum(r[2] for r in results), hidden.grad)
    assert_close(torch.cat([r[3] for r in results]), weight.grad)


def test_extreme_logits_stay_finite(problem: Problem) -> None:
    """Differences of thousands between logits: probabilities of exactly 0 and 1."""
    ours = (problem.hidden * 1e3).requires_grad_(), problem.weight.clone().requires_grad_()
    theirs = (problem.hidden * 1e3).requires_grad_(), problem.weight.clone().requires_grad_()
    loss, _ = linear_cross_entropy(*ours, problem.labels, problem.loss_weights)
    reference, _, _ = expected(problem, *theirs)
    loss.backward()
    reference.backward()
    assert_close(loss, reference)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_within_its_rounding(
    problem: Problem, dtype: torch.dtype, bound: float
) -> None:
    ours = tuple(x.to(dtype).requires_grad_() for x in (problem.hidden, problem.weight))
    theirs = tuple(x.detach().double().requires_grad_() for x in ours)
    loss, token_losses = linear_cross_entropy(*ours, problem.labels, problem.loss_weights)
    reference, cross_entropy, _ = expected(problem, *theirs)
    assert loss.dtype == token_losses.cross_entropy.dtype == torch.float32
    loss.backward()
    reference.backward()
    assert (token_losses.cross_entropy - cross_entropy).norm() <= bound * cross_entropy.norm()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad - y.grad).norm() <= bound * y.grad.norm()


def test_evaluation_without_gradients_gives_the_same_losses(problem: Problem) -> None:
    with torch.no_grad():
        loss, token_losses = linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, problem.loss_weights
        )
    reference, cross_entropy, _ = expected(problem, problem.hidden, problem.weight)
    assert_close(loss, reference)
    assert_close(token_losses.cross_entropy, cross_entropy)


def test_inputs_are_left_as_they_were(problem: Problem) -> None:
    inputs = (problem.hidden, problem.weight, problem.labels, problem.teacher_hidden, problem.teacher_weight)
    before = [x.clone() for x in inputs]
    leaves = problem.leaves()
    linear_cross_entropy(
        *leaves, problem.labels, problem.loss_weights, distillation=problem.distillation(0.5, 2.0)
    )[0].backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
