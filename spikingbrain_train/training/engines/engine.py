"""What a training run asks of the library that reduces gradients, shards state and updates weights.

A stage computes losses and lets autograd run, callbacks decide whether an update takes place, the trainer
keeps count. Where gradients are summed, what of the optimizer lies on which rank, and how both get into a
checkpoint is the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.parameter_norm import parameter_norm


class TrainedChunk(Protocol):
    """A (virtual) pipeline stage as schedules call it: what megatron-core asks of its data parallelism."""

    @property
    def module(self) -> HybridGPTModel:
        """The stage itself."""
        ...

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Its forward pass."""
        ...

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply the gradients of the step; called once, behind its last backward pass."""
        ...

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Have the gradients of the step summed over data- and context-parallel ranks."""
        ...


class TrainedModel(Protocol):
    """This rank's part of the model as it trains; the chunks of it are in ``training/parallel_chunks.py``."""

    @property
    def module(self) -> HybridGPTModel | ModelChunks:
        """The model itself."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """This rank's weights."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules below it."""
        ...

    def zero_grad_buffer(self) -> None:
        """Forget all gradients."""
        ...


class TrainedOptimizer(Protocol):
    """An optimizer as the learning-rate schedule and reports see it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters: ``lr``, ``weight_decay``, and the multipliers of both."""
        ...


class Engine(ABC):
    """The model that trains and its optimizer, on every rank; all ranks call every method together."""

    model: Any
    """A :class:`TrainedModel`; a subclass of megatron-core's, which has no types."""
    optimizer: Any
    """A :class:`TrainedOptimizer`, with what ``checkpoint/optimizer_state.py`` asks of one."""

    @abstractmethod
    def begin_gradients(self) -> None:
        """Let the gradients of a step begin at zero, whatever became of those before."""

    @abstractmethod
    def update_weights(self, check: Callable[[float], None]) -> float:
        """One optimizer step, unless ``check`` raises: it is told the gradient norm before anything changes.

        Args:
            check: called with the norm, which is the same on every rank.

        Returns:
            Norm of all gradients before they are clipped.
        """

    @abstractmethod
    def gradient_norm(self) -> float:
        """Norm of all gradients of the step, the same on every rank; nothing is updated."""

    @abstractmethod
    def gradients(self) -> Iterator[Tensor]:
        """The gradients of the step that lie on this rank, summed over ranks."""

    @abstractmethod
    def begin_state(self) -> None:
        """Give an optimizer that has not stepped the state that a checkpoint stores."""

    @abstractmethod
    def follow_weights(self) -> None:
        """Let the optimizer's fp32 weights be those that somebody has set in the model."""

    @abstractmethod
    def gather_updated_weights(self) -> None:
        """Bring every weight on every rank up to the last update."""

    def parameter_norm(self, groups: ProcessGroups) -> Tensor:
        """[] float64 L2 norm of all weights as of the last update, the same on every rank."""
        return parameter_norm(self.model.module, groups)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within, every weight lies on every rank as a whole, and what is written to it counts."""
        return nullcontext()

    @abstractmethod
    def state_to_save(self) -> dict[str, Any]:
        """``model`` and ``optimizer`` of a checkpoint as sharded tensors, from where they lie."""

    @abstractmethod
    def state_to_fill(self) -> dict[str, Any]:
        """What to read of a checkpoint for :meth:`fill_state`, whatever engine wrote it."""

    @abstractmethod
    def fill_state(self, loaded: dict[str, Any]) -> None:
        """Take up the weights and the optimizer state that were read."""
