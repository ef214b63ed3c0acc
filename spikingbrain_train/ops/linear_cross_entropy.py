"""Output projection and loss in one op, a chunk of tokens at a time.

The float32 logits of a whole sequence never exist, and no logits are computed twice: the forward pass already forms the
gradients, because the only gradient that can come from above is one scalar. Distillation from a teacher's logits rides
in the same pass.

Vocabulary-parallel use: each rank passes its rows of the weight and two reductions over the ranks that share the
vocabulary; the gradient of ``hidden`` is then this rank's part of a sum.

Shape letters: N tokens, D hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]
"""Reduces a [N] float32 tensor over the ranks that share the vocabulary and returns the result."""

CHUNK_TOKENS = 512
"""Tokens whose logits exist at a time: large enough for full-speed matrix products, small enough for caches and memory."""


def _local(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Distillation:
    """Soft targets: ``loss = (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || student)``.

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
class TokenLosses:
    """Per-token values for reporting, [N] float32 each, without gradient."""

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
    distillation: Distillation | None = None,
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
        The scalar ``sum(loss_weights * loss)`` in float32, differentiable in ``hidden`` and ``weight``, and the
        per-token losses for reporting.
    """
    total, cross_entropy, kl_divergence = _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_weights, vocab_start, distillation, reduce_max, reduce_sum
    )
    return total, TokenLosses(cross_entropy, kl_divergence if distillation is not None else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_weights, vocab_start, distillation, reduce_max, reduce_sum):
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # One accumulation in the weight's dtype is exact enough for one chunk; more chunks accumulate in float32.
        grad_weight = None
        cross_entropy = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        kl_divergence = torch.zeros_like(cross_entropy) if distillation is not None else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk = _Chunk(hidden[rows] @ weight.t(), labels[rows], vocab_start, reduce_max, reduce_sum)
            cross_entropy[rows] = chunk.cross_entropy
            if distillation is not None:
                teacher_logits = distillation.teacher_hidden[rows] @ distillation.teacher_weight.t()
                kl_divergence[rows], grad_logits = chunk.distil(teacher_logits, distillation, needs_grad)
            elif needs_grad:
                grad_logits = chunk.cross_entropy_gradient(1.0)
            if needs_grad:
                grad_logits = grad_logits.mul_(loss_weights[rows, None]).to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                part = grad_logits.t() @ hidden[rows]
                if grad_weight is None:
                    grad_weight = part if len(hidden) <= CHUNK_TOKENS else part.float()
                else:
                    grad_weight += part
        if needs_grad:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, grad_weight)
        total = cross_entropy @ loss_weights
        if distillation is not None:
            w = distillation.weight
            total = (1 - w) * total + w * distillation.temperature**2 * (kl_divergence @ loss_weights)
        else:
            kl_divergence = cross_entropy.new_empty(0)
        ctx.mark_non_differentiable(cross_entropy, kl_divergence)
        return total, cross_entropy, kl_divergence

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None, None, None


class _Chunk:
    """Softmax quantities of one chunk of logits, whose vocabulary may be spread over ranks."""

    def __init__(self, logits, labels, vocab_start, reduce_max, reduce_sum):
        self.reduce_max, self.reduce_sum = reduce_max, reduce_sum
        self.logits = logits.float()
        self.log_normaliser = self._log_sum_exp(self.logits)
        local = labels - vocab_start
        self.has_label = (local >= 0) & (local < logits.shape[1])
        self.label_row = torch.nonzero(self.has_label).squeeze(1)
        self.label_column = local[self.label_row]
        label_logit = self.logits.new_zeros(len(labels))
        label_logit[self.label_row] = self.logits[self.label_row, self.label_column]
        self.cross_entropy = self.log_normaliser - self.reduce_sum(label_logit)

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 0:
            top = logits.new_full((len(logits),), float("-inf"))
        else:
            top = logits.amax(dim=1)
        top = self.reduce_max(top)
        return self.reduce_sum((logits - top[:, None]).exp_().sum(dim=1)).log_() + top

    def cross_entropy_gradient(self, factor: float) -> Tensor:
        """factor * d cross_entropy / d logits, in place of the logits."""
        grad = self.logits.sub_(self.log_normaliser[:, None]).exp_()
        if factor != 1.0:
            grad.mul_(factor)
        grad[self.label_row, self.label_column] -= factor
        return grad

    def distil(
        self, teacher_logits: Tensor, distillation: Distillation, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """KL(teacher || student) at the temperature, and the gradient of the mixed loss with respect to the logits."""
        temperature, w = distillation.temperature, distillation.weight
        teacher = teacher_logits.float()
        student = self.logits
        if temperature != 1.0:
            teacher = teacher / temperature
            student = student / temperature
            student_normaliser = self._log_sum_exp(student)
        else:
            student_normaliser = self.log_normaliser
        teacher = teacher - self._log_sum_exp(teacher)[:, None]
        log_ratio = teacher - student + student_normaliser[:, None]
        teacher_probability = teacher.exp_()
        kl_divergence = self.reduce_sum((teacher_probability * log_ratio).sum(dim=1))
        if not needs_grad:
            return kl_divergence, None
        # temperature^2 * d KL / d logits = temperature * (student - teacher probabilities)
        if temperature == 1.0:
            soft = teacher_probability
            grad = self.logits.sub_(self.log_normaliser[:, None]).exp_().sub_(soft, alpha=w)
            grad[self.label_row, self.label_column] -= 1 - w
            return kl_divergence, grad
        soft = (student - student_normaliser[:, None]).exp_().sub_(teacher_probability)
        return kl_divergence, self.cross_entropy_gradient(1 - w).add_(soft, alpha=w * temperature)
