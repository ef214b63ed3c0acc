"""Output projection and loss in one op, a chunk of tokens at a time.

The float32 logits of a whole sequence never exist, and no logits are computed twice: the forward pass
already forms the gradients, because the only gradient that can come from above is one scalar. Distillation
from a teacher's logits rides in the same pass.

Two sizes matter. A *chunk* of tokens is large enough for full-speed matrix products and for few accumulations
of the weight's gradient; its logits exist in the model's dtype. Inside it, a *block* of rows is small enough
that the passes of a softmax over its float32 logits stay in a core's cache; its gradient replaces its logits.

Vocabulary-parallel use: each rank passes its rows of the weight and two reductions over the ranks that share
the vocabulary; the gradient of ``hidden`` is then this rank's part of a sum.

Shape letters: N tokens, D hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Callable[[Tensor], Tensor]
"""Reduces a [n] tensor over the ranks that share the vocabulary and returns the result."""

# Bytes of one chunk's logits: 2048 tokens of a vocabulary of 49152 in bfloat16 on CPU.
_CHUNK_BYTES = {"cpu": 1 << 28, "gpu": 1 << 30}
# Elements of one block: a few rows in the cache of a core, or enough to fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 25}
# Elements of the weight's gradient that one product makes where products are added up: on CPU few enough that
# they are added before they leave the cache.
_SUMMED_ELEMENTS = {"cpu": 1 << 21, "gpu": 1 << 30}


def _local(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Distillation:
    """Soft targets of a teacher.

    ``loss = (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || student)``.

    Hinton et al., arXiv 1503.02531; the factor temperature^2 keeps the gradient's scale.
    """

    teacher_hidden: Tensor
    """[N, D_teacher] final hidden states of the teacher."""
    teacher_weight: Tensor
    """[V, D_teacher] the teacher's output projection, the same rows as the student's."""
    weight: float
    """Share of the KL term in [0, 1]."""
    temperature: float = 1.0
    """Softens both distributions."""


@dataclass(frozen=True)
class KeptDistillation:
    """Soft targets of a teacher of which few tokens of each distribution were kept.

    As :class:`Distillation`, with the sum over the vocabulary in the KL divergence taken over those tokens,
    each of which stands for a share of the teacher's distribution. Both are softened by the temperature.
    """

    ids: Tensor
    """[N, K] int64 indices into the whole vocabulary; one may come twice."""
    shares: Tensor
    """[N, K] float32 that add up to 1: of a likely token its probability, of one that was drawn among the
    others its part of their probability."""
    log_probabilities: Tensor
    """[N, K] float32 logarithms of the teacher's probability of each."""
    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenLosses:
    """Per-token values for reporting, [N] float32 each (float64 for float64 inputs), without gradient."""

    cross_entropy: Tensor
    """Next-token cross entropy in nats."""
    kl_divergence: Tensor | None
    """KL(teacher || student) at the distillation temperature, in nats."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    vocab_start: int = 0,
    distillation: Distillation | KeptDistillation | None = None,
    reduce_max: Reduction = _local,
    reduce_sum: Reduction = _local,
) -> tuple[Tensor, TokenLosses]:
    """Weighted sum of per-token losses of ``softmax(hidden @ weight.T)``.

    Args:
        hidden: [N, D] final hidden states.
        weight: [V, D] output projection: this rank's rows, padding rows left out. V may be 0.
        labels: [N] int64 targets as indices into the whole vocabulary.
        loss_weights: [N] float32 weight of each token's loss; 0 masks a token.
        vocab_start: index of this rank's first row in the whole vocabulary.
        distillation: soft targets, or None for plain cross entropy.
        reduce_max: maximum over the ranks that share the vocabulary.
        reduce_sum: sum over the ranks that share the vocabulary.

    Returns:
        The scalar ``sum(loss_weights * loss)`` in float32 (float64 for float64 inputs), differentiable once
        in ``hidden`` and ``weight``, and the per-token losses for reporting.
    """
    vocabulary = _Vocabulary(vocab_start, len(weight), reduce_max, reduce_sum)
    total, cross_entropy, kl_divergence = _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_weights, vocabulary, distillation
    )
    return total, TokenLosses(cross_entropy, kl_divergence if distillation is not None else None)


@dataclass(frozen=True)
class _Vocabulary:
    """This rank's part of the vocabulary and how to ask the ranks that have the rest."""

    start: int
    rows: int
    reduce_max: Reduction
    reduce_sum: Reduction

    @property
    def is_shared(self) -> bool:
        return self.reduce_sum is not _local

    def rowwise_max(self, x: Tensor) -> Tensor:
        if self.rows == 0:
            return self.reduce_max(x.new_full((len(x),), float("-inf")))
        return self.reduce_max(x.amax(dim=1))

    def rowwise_sum(self, x: Tensor) -> Tensor:
        return self.reduce_sum(x.sum(dim=1))


class _Targets:
    """Labels as columns of this rank's logits."""

    def __init__(self, labels: Tensor, vocabulary: _Vocabulary) -> None:
        column = labels - vocabulary.start
        self.vocabulary = vocabulary
        self.is_here = (column >= 0) & (column < vocabulary.rows)
        self.column = column.clamp_(0, max(vocabulary.rows - 1, 0)).unsqueeze(1)

    def logits(self, x: Tensor, rows: slice) -> Tensor:
        """x[i, label of i] on every rank, whichever rank has it."""
        if self.vocabulary.rows == 0:
            return self.vocabulary.reduce_sum(x.new_zeros(len(x)))
        found = x.gather(1, self.column[rows]).squeeze(1)
        return self.vocabulary.reduce_sum(torch.where(self.is_here[rows], found, 0.0))

    def subtract_(self, x: Tensor, rows: slice, amount: Tensor) -> Tensor:
        """x[i, label of i] -= amount[i] on the rank that has it."""
        if self.vocabulary.rows > 0:
            amount = torch.where(self.is_here[rows], amount, 0.0)
            x.scatter_add_(1, self.column[rows], amount.neg().unsqueeze(1))
        return x


def _spans(length: int, parts: int) -> Iterator[slice]:
    """``length`` in at most ``parts`` slices of equal size, the last one perhaps shorter."""
    size = max(1, -(-length // max(parts, 1)))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _chunks(hidden: Tensor, vocab_rows: int) -> Iterator[slice]:
    bytes_of_all = len(hidden) * vocab_rows * hidden.element_size()
    limit = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "gpu"]
    return _spans(len(hidden), -(-bytes_of_all // limit))


def _blocks(logits: Tensor, vocabulary: _Vocabulary) -> Iterator[slice]:
    # Every block of a shared vocabulary costs collectives, so there are few of them.
    size = _BLOCK_ELEMENTS["cpu" if logits.device.type == "cpu" and not vocabulary.is_shared else "gpu"]
    return _spans(len(logits), -(-logits.numel() // size))


def _sum_products_(total: Tensor, logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """Add ``logits.T @ hidden`` [V, D] to the total, or begin it, some rows after the other."""
    size = _SUMMED_ELEMENTS["cpu" if total.device.type == "cpu" else "gpu"]
    for rows in _spans(len(total), -(-total.numel() // size)):
        part = logits[:, rows].t() @ hidden
        if is_first:
            total[rows] = part
        else:
            total[rows] += part


def _exp_(x: Tensor) -> Tensor:
    """exp in place; torch's exp2 is vectorised on CPU, where its float32 exp is several times slower."""
    return x.mul_(math.log2(math.e)).exp2_()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        vocabulary: _Vocabulary,
        distillation: Distillation | KeptDistillation | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cross_entropy = torch.empty(len(hidden), dtype=loss_dtype, device=hidden.device)
        kl_divergence = cross_entropy.new_empty(len(hidden) if distillation is not None else 0)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        chunks = list(_chunks(hidden, vocabulary.rows))
        for chunk in chunks:
            logits = hidden[chunk] @ weight.t()
            targets = _Targets(labels[chunk], vocabulary)
            if isinstance(distillation, Distillation):
                teacher_logits = distillation.teacher_hidden[chunk] @ distillation.teacher_weight.t()
            for block in _blocks(logits, vocabulary):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                grad_scale = loss_weights[rows, None].to(loss_dtype) if needs_grad else None
                x = logits[block].to(loss_dtype)
                if distillation is None:
                    cross_entropy[rows] = _cross_entropy_(x, targets, block, grad_scale)
                elif isinstance(distillation, KeptDistillation):
                    cross_entropy[rows], kl_divergence[rows] = _distil_kept_(
                        x, rows, targets, block, grad_scale, distillation
                    )
                else:
                    teacher = teacher_logits[block].to(loss_dtype)
                    cross_entropy[rows], kl_divergence[rows] = _distil_(
                        x, teacher, targets, block, grad_scale, distillation
                    )
                if needs_grad and x.dtype != logits.dtype:
                    logits[block] = x
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
                if not ctx.needs_input_grad[1]:  # a frozen projection
                    continue
                # One product is as exact as its dtype allows; sums of several are kept in float32.
                if len(chunks) == 1:
                    grad_weight = logits.t() @ hidden[chunk]
                    continue
                if grad_weight is None:
                    grad_weight = torch.empty_like(weight, dtype=loss_dtype)
                _sum_products_(grad_weight, logits, hidden[chunk], is_first=chunk.start == 0)
        if needs_grad:
            if ctx.needs_input_grad[1]:
                grad_weight = (
                    torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
                )
            ctx.save_for_backward(grad_hidden, grad_weight)
        total = cross_entropy @ loss_weights.to(loss_dtype)
        if distillation is not None:
            w = distillation.weight
            kl_total = kl_divergence @ loss_weights.to(loss_dtype)
            total = (1 - w) * total + w * distillation.temperature**2 * kl_total
        ctx.mark_non_differentiable(cross_entropy, kl_divergence)
        return total, cross_entropy, kl_divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Reading the scalar would stall a GPU; on CPU it saves a pass over the largest gradient of the model.
        if grad_total.device.type != "cpu" or grad_total.item() != 1.0:
            scale = grad_total.to(grad_hidden.dtype)
            grad_hidden = grad_hidden * scale
            grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden, grad_weight, None, None, None, None


def _cross_entropy_(x: Tensor, targets: _Targets, rows: slice, grad_scale: Tensor | None) -> Tensor:
    """Cross entropy [n] of a block of logits x [n, V], which are overwritten by the gradient.

    Args:
        rows: where the block lies among the targets.
        grad_scale: [n, 1] weight of each row in the gradient; None leaves the block in no useful state.
    """
    vocabulary = targets.vocabulary
    top = vocabulary.rowwise_max(x)
    label_logits = targets.logits(x, rows)
    exponentials = _exp_(x.sub_(top[:, None]))
    normaliser = vocabulary.rowwise_sum(exponentials)
    if grad_scale is not None:
        exponentials.mul_(grad_scale / normaliser[:, None])
        targets.subtract_(exponentials, rows, grad_scale.squeeze(1))
    return normaliser.log() + top - label_logits


def _distil_(
    x: Tensor,
    teacher: Tensor,
    targets: _Targets,
    rows: slice,
    grad_scale: Tensor | None,
    distillation: Distillation,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and KL(teacher || student) [n] of a block of logits x [n, V].

    The logits are overwritten by the gradient of the mixed loss; those of the teacher [n, V], too.
    """
    vocabulary = targets.vocabulary
    temperature, w = distillation.temperature, distillation.weight
    top = vocabulary.rowwise_max(x)
    teacher_top = vocabulary.rowwise_max(teacher)
    label_logits = targets.logits(x, rows)

    student_scores = x.sub_(top[:, None])
    log_ratio = teacher.sub_(teacher_top[:, None]).sub(student_scores).div_(temperature)
    teacher_soft = _exp_(teacher.div_(temperature))
    teacher_normaliser = vocabulary.rowwise_sum(teacher_soft)
    log_ratio_mean = vocabulary.rowwise_sum(log_ratio.mul_(teacher_soft)) / teacher_normaliser
    student = _Softmaxes(student_scores, vocabulary, temperature)
    cross_entropy = student.normaliser.log() + top - label_logits
    kl_divergence = log_ratio_mean - teacher_normaliser.log() + student.soft_normaliser.log()
    if grad_scale is not None:
        # d CE / d logits = softmax - one hot
        # temperature^2 * d KL / d logits = temperature * (student's softmax - teacher's softmax)
        kl_scale = grad_scale * (w * temperature)
        gradient = student.mixed_(grad_scale, w)
        gradient.addcmul_(teacher_soft, kl_scale / teacher_normaliser[:, None], value=-1.0)
        if w < 1:
            targets.subtract_(gradient, rows, grad_scale.squeeze(1) * (1 - w))
    return cross_entropy, kl_divergence


def _distil_kept_(
    x: Tensor,
    tokens: slice,
    targets: _Targets,
    rows: slice,
    grad_scale: Tensor | None,
    distillation: KeptDistillation,
) -> tuple[Tensor, Tensor]:
    """:func:`_distil_` from the teacher's kept tokens, which lie at ``tokens`` among all of them."""
    vocabulary = targets.vocabulary
    temperature, w = distillation.temperature, distillation.weight
    kept = _Kept(distillation.ids[tokens], distillation.shares[tokens].to(x.dtype), vocabulary)
    top = vocabulary.rowwise_max(x)
    label_logits = targets.logits(x, rows)
    student_scores = x.sub_(top[:, None])
    mean_score = kept.mean(student_scores) / temperature
    entropy = (kept.shares * distillation.log_probabilities[tokens].to(x.dtype)).sum(1)
    student = _Softmaxes(student_scores, vocabulary, temperature)
    cross_entropy = student.normaliser.log() + top - label_logits
    kl_divergence = entropy - mean_score + student.soft_normaliser.log()
    if grad_scale is not None:
        gradient = student.mixed_(grad_scale, w)
        kept.subtract_(gradient, grad_scale * (w * temperature))
        if w < 1:
            targets.subtract_(gradient, rows, grad_scale.squeeze(1) * (1 - w))
    return cross_entropy, kl_divergence


class _Softmaxes:
    """The student's distribution as it is and softened, of scores [n, V] whose maximum is 0."""

    def __init__(self, scores_: Tensor, vocabulary: _Vocabulary, temperature: float) -> None:
        self._temperature = temperature
        if temperature == 1.0:
            self._soft = self._plain = _exp_(scores_)
            self.normaliser = self.soft_normaliser = vocabulary.rowwise_sum(self._plain)
            return
        self._soft = _exp_(scores_ / temperature)
        self.soft_normaliser = vocabulary.rowwise_sum(self._soft)
        self._plain = _exp_(scores_)
        self.normaliser = vocabulary.rowwise_sum(self._plain)

    def mixed_(self, grad_scale: Tensor, weight: float) -> Tensor:
        """The student's part of the mixed loss's gradient, in the memory of the scores."""
        if self._temperature == 1.0:
            return self._plain.mul_(grad_scale / self.normaliser[:, None])
        kl_scale = grad_scale * (weight * self._temperature) / self.soft_normaliser[:, None]
        if weight == 1:
            return torch.mul(self._soft, kl_scale, out=self._plain)
        self._plain.mul_(grad_scale * (1 - weight) / self.normaliser[:, None])
        return self._plain.addcmul_(self._soft, kl_scale)


class _Kept:
    """The teacher's kept tokens as columns of this rank's logits."""

    def __init__(self, ids: Tensor, shares: Tensor, vocabulary: _Vocabulary) -> None:
        column = ids - vocabulary.start
        is_here = (column >= 0) & (column < vocabulary.rows)
        self.shares = shares
        self._vocabulary = vocabulary
        self._here = torch.where(is_here, shares, 0.0) if vocabulary.is_shared else shares
        self._column = column.clamp_(0, max(vocabulary.rows - 1, 0))

    def mean(self, x: Tensor) -> Tensor:
        """[n] mean of x [n, V] over the kept tokens by their shares, on every rank."""
        if self._vocabulary.rows == 0:
            return self._vocabulary.reduce_sum(x.new_zeros(len(x)))
        return self._vocabulary.reduce_sum((x.gather(1, self._column) * self._here).sum(1))

    def subtract_(self, x: Tensor, amount: Tensor) -> None:
        """x[i, j] -= amount[i] * share, for every kept j."""
        if self._vocabulary.rows > 0:
            x.scatter_add_(1, self._column, self._here * -amount)
