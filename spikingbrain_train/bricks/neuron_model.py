"""A model whose neurons can be watched and left out. One seam for all forms.

A neuron is a channel inside a feed-forward: its activation is ``act(gate) * up``, what the down projection
reads, and its output is the activation times its column of the down projection (configurable foundation
models, arXiv 2409.02877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.evaluation.language_model import LanguageModel

Change = Callable[["FeedForward", Tensor], "Tensor | None"]
"""From a feed-forward and its activations [..., F] to what the down projection reads; None leaves them."""

ChangeByInput = Callable[["FeedForward", Tensor, Tensor], "Tensor | None"]
"""The same, which is also given what the feed-forward reads at these tokens, [N, h], before its
activations."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A feed-forward or an expert, or the channels of it that this rank holds."""

    part: Part
    """Layer, name in it, and which share of the channels."""
    down: torch.nn.Module
    """Its down projection, which is called with the activations."""
    norms: Tensor
    """[F] float32: norm of each channel's column of the down projection."""
    group: ProcessGroup | None = None
    """Ranks that hold the other channels; None where this one holds all."""
    into: torch.nn.Module | None = None
    """Its gate projection, joined with the up projection or not, which reads the feed-forward's input."""
    copies: int = 1
    """How often each token goes through, on all ranks together."""

    @property
    def neurons(self) -> int:
        """Channels on all ranks together."""
        return len(self.norms) * (1 if self.group is None else self.group.size())

    @property
    def width(self) -> int:
        """Numbers of a token that it reads."""
        weight: Tensor = getattr(self.down, "weight")  # noqa: B009  (torch's own __getattr__ has no type)
        return weight.shape[0]

    def output_norms(self, inside: Tensor) -> Tensor:
        """[..., F] activations to the norm of what each neuron adds, float32."""
        return inside.float().abs() * self.norms

    def all_channels(self, values: Tensor) -> Tensor:
        """[..., F] of this rank to [..., all channels], in their order."""
        if self.group is None or self.group.size() == 1 or not values.numel():
            return values
        parts = [torch.empty_like(values) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def own_channels(self, values: Tensor) -> Tensor:
        """[..., all channels] to those [..., F] that this rank holds."""
        if self.group is None or self.group.size() == 1:
            return values
        return values.chunk(self.group.size(), -1)[self.group.rank()]


class NeuronModel:
    """Behind it is a Hugging Face folder (:mod:`.hugging_face`) or a Megatron checkpoint (:mod:`.megatron`).

    Args:
        language_model: that reads text, one at a time; on several ranks all read together.
        name: for the report.
        form: of the model, for the report.
        dtype: of its weights, for the report.
        feed_forwards: that this rank holds, in their order.
        gather: from this rank's object to those of all ranks; None on one rank.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        name: str,
        form: str,
        dtype: str,
        feed_forwards: Sequence[FeedForward],
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        self.language_model, self.name, self.form, self.dtype = language_model, name, form, dtype
        self.feed_forwards = list(feed_forwards)
        self.gathered = gather or (lambda mine: [mine])

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Let ``change`` see, and replace, what every down projection reads while the context lasts."""
        with ExitStack() as stack:
            for each in self.feed_forwards:
                stack.callback(each.down.register_forward_pre_hook(_hook(each, change)).remove)
            yield

    @contextmanager
    def changed_by_inputs(self, change: ChangeByInput) -> Iterator[None]:
        """The same with a change that also sees what each feed-forward reads.

        Without sequence parallelism, as checkpoints are opened to read where no ranks share a text.
        """
        last: dict[Part, Tensor] = {}

        def keep(part: Part) -> Any:
            def look(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
                last[part] = inputs[0].reshape(-1, inputs[0].shape[-1])

            return look

        def look(feed_forward: FeedForward, inside: Tensor) -> Tensor | None:
            return change(feed_forward, last.pop(feed_forward.part), inside)

        with ExitStack() as stack:
            for each in self.feed_forwards:
                assert each.into is not None
                stack.callback(each.into.register_forward_pre_hook(keep(each.part)).remove)
            stack.enter_context(self.changed(look))
            yield


def _hook(feed_forward: FeedForward, change: Change) -> Any:
    def look(_: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = change(feed_forward, inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    return look


def strongest(share: float) -> Change:
    """Leave out the neurons of lowest output norm at every token.

    Those stay whose norm is at least that of the last one that does, so equal ones stay together: what is
    zero already costs nothing.

    Args:
        share: of all channels of a feed-forward that are left out, 0 to 1.
    """

    def change(feed_forward: FeedForward, inside: Tensor) -> Tensor | None:
        norms = feed_forward.output_norms(inside)
        whole = feed_forward.all_channels(norms)
        keep = whole.shape[-1] - round(share * whole.shape[-1])
        if keep == whole.shape[-1] or not whole.numel():
            return None
        if not keep:
            return torch.zeros_like(inside)
        least = whole.topk(keep, dim=-1).values[..., -1:]
        return inside.masked_fill(norms < least, 0)

    return change
