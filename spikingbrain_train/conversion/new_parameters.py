"""Initial values of the parameters that a dense source does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingForm
from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.conversion.attention_scale import AttentionScale
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.seeds import generator
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.vocabulary import draw_tokens

TIE_BREAKING_STD = 1e-7
"""Router of exactly upcycled experts. Zeros would send every token to the expert that wins ties; this
spreads tokens and moves probabilities by less than 1e-5 of their value."""


@dataclass(frozen=True)
class Initialisation:
    """How one kind of parameter starts."""

    description: str
    """For the report."""
    values: Callable[[Parameter], Tensor]
    """float32 values that broadcast to the parameter's shape."""


class NewParameters:
    """Initial values by role.

    Random values depend on the recipe's seed and the parameter's name alone, so they are the same whatever
    the number of layers, the order of conversion or the topology that later loads them.

    Args:
        source: the checkpoint that is converted.
        conversion: the recipe.
    """

    def __init__(self, source: Source, conversion: ConversionConfig) -> None:
        self.source = source
        self.conversion = conversion
        self.attention_scale = AttentionScale(source, conversion.seed)
        gla, hybrid, upcycling = conversion.gla, conversion.parallel_hybrid, conversion.upcycling
        spread = gla.init_gate_bias(source.model.kv_channels)
        branch_norm = Initialisation(
            "size of the source's attention output, layer by layer", self._attention_size
        )
        router_std = {
            UpcyclingForm.exact: TIE_BREAKING_STD,
            UpcyclingForm.published: upcycling.router_init_std,
        }
        self._starts = {
            "gate_down_weight": self._normal(gla.init_gate_std),
            "gate_up_weight": self._normal(gla.init_gate_std),
            # The bias spreads the channels of a head from fast to slow forgetting.
            "gate_up_bias": Initialisation(
                f"from {spread[0]:g} to {spread[-1]:g} over the channels of each head",
                lambda parameter: torch.tensor(spread).repeat(parameter.model.num_query_groups),
            ),
            # A small output norm keeps the new mixer's contribution low until alignment has trained it.
            "out_norm": self._constant(gla.init_out_norm),
            "softmax_norm": branch_norm,
            "linear_norm": branch_norm,
            "branch_weights": Initialisation(
                f"{hybrid.init_softmax_weight:g} and {hybrid.init_linear_weight:g}",
                lambda _: torch.tensor([hybrid.init_softmax_weight, hybrid.init_linear_weight]),
            ),
            "sinks": Initialisation("rows of the embedding, frequent tokens preferred", self._embedding_rows),
            "router": self._normal(of_kind(upcycling.form, router_std, "the routers' starts")),
        }

    def describe(self, parameter: Parameter) -> str:
        """How a new parameter starts, in words."""
        return self._start(parameter).description

    def draw(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """The values of a new parameter, of its shape and ``dtype``, on CPU."""
        return self._start(parameter).values(parameter).expand(parameter.shape).to(dtype, copy=True)

    def _start(self, parameter: Parameter) -> Initialisation:
        return self._starts[parameter.rule.roles[0]]

    def _noise(self, parameter: Parameter) -> Tensor:
        return torch.empty(parameter.shape).normal_(generator=generator(self.conversion.seed, parameter.name))

    def _normal(self, std: float) -> Initialisation:
        if std == 0:
            return self._constant(0.0)
        return Initialisation(f"normal, std {std:g}", lambda parameter: std * self._noise(parameter))

    def _constant(self, value: float) -> Initialisation:
        return Initialisation(f"constant {value:g}", lambda _: torch.tensor(value))

    def _attention_size(self, parameter: Parameter) -> Tensor:
        assert parameter.layer is not None
        return torch.tensor(self.attention_scale.of_layer(parameter.layer))

    def _embedding_rows(self, parameter: Parameter) -> Tensor:
        random = generator(self.conversion.seed, parameter.name)
        number = parameter.model.num_sink_tokens
        tokens = draw_tokens(parameter.model.vocab_size, number, random, distinct=True)
        return self.source.read("embedding")[tokens].float()
