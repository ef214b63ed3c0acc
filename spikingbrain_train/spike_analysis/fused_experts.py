"""Experts that a Hugging Face model holds in one tensor, [experts, outputs, inputs] (transformers 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.spike_analysis.linear_records import Linear

Encode = Callable[[Linear, Tensor, Tensor], Tensor]
"""From a linear, its weight [outputs, inputs] and its input [..., inputs] to what it is to read."""

_ONE_AFTER_THE_OTHER = "eager"
"""How transformers calls it."""


class FusedExperts:
    """Lets every expert read what is made of its input, although no module stands in front of it.

    Args:
        model: whose experts they are.
        weights: its parameters of three dimensions that hold experts.
        name: of the model, for sentences.

    Raises:
        CheckpointError: it multiplies them in another way than one after the other by ``F.linear``.
    """

    def __init__(
        self, model: PreTrainedModel, weights: Mapping[Linear, torch.nn.Parameter], name: str
    ) -> None:
        self._model, self._weights = model, dict(weights)
        if self._weights:
            self._check(name)

    @contextmanager
    def reading(self, encode: Encode) -> Iterator[None]:
        """Let them read what ``encode`` gives while the context lasts."""
        if not self._weights:
            yield
            return
        linears = {_storage(weight): linear for linear, weight in self._weights.items()}
        with _one_after_the_other(self._model), _LinearsOfSlices(linears, encode):
            yield

    @torch.no_grad()
    def _check(self, name: str) -> None:
        seen: set[Linear] = set()

        def look(linear: Linear, weight: Tensor, x: Tensor) -> Tensor:
            seen.add(linear)
            return x

        tokens = torch.arange(8, device=self._model.device).remainder(int(self._model.config.vocab_size))
        with self.reading(look):
            self._model.base_model(input_ids=tokens.unsqueeze(0), use_cache=False)
        missing = [linear.projection for linear in self._weights if linear not in seen]
        if missing:
            raise CheckpointError(
                f"{name} multiplies by {missing[0]} in a way that hides its inputs from counting; import it "
                "with spikingbrain-convert, if that reads its family, and name the checkpoint"
            )


class _LinearsOfSlices(TorchFunctionMode):
    """Changes the input of ``F.linear`` where its weight is a slice of a known tensor."""

    def __init__(self, linears: Mapping[int, Linear], encode: Encode) -> None:
        super().__init__()
        self._linears, self._encode = linears, encode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and len(args) >= 2 and args[1].dim() == 2:
            x, weight, *rest = args
            linear = self._linears.get(_storage(weight))
            if linear is not None:
                args = (self._encode(linear, weight, x), weight, *rest)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _one_after_the_other(model: PreTrainedModel) -> Iterator[None]:
    """transformers may multiply all experts at once, whose inputs nobody sees."""
    of_any_release: Any = model
    if not hasattr(model, "get_experts_implementation"):  # early transformers 5, which has no other way
        yield
        return
    before = of_any_release.get_experts_implementation()
    of_any_release.set_experts_implementation(_ONE_AFTER_THE_OTHER)
    try:
        yield
    finally:
        of_any_release.set_experts_implementation(before)
