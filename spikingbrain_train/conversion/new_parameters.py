"""Initial values of the parameters that a dense source does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.architecture.initializers import (
    AttentionSize,
    Constant,
    EmbeddingRows,
    Initializer,
    LightningDecays,
    NearestSubNorm,
    Normal,
    OfRecipe,
    ScanOfAttention,
    Uniform,
    Values,
)
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingForm
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.conversion.attention_scale import AttentionScale
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.scan_start import ScanStart
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.vocabulary import draw_tokens
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.fused_tensors import transform_of
from spikingbrain_train.ops.seeds import generator

TIE_BREAKING_STD = 1e-7
"""Router of exactly upcycled experts. Zeros would send every token to the expert that wins ties; this
spreads tokens and moves probabilities by less than 1e-5 of their value."""


@dataclass(frozen=True)
class InitialValues:
    """What a parameter holds at first."""

    description: str
    """For the report."""
    values: Callable[[Parameter], Tensor]
    """float32 values that broadcast to the parameter's shape."""


class NewParameters:
    """Initial values, by the :data:`~spikingbrain_train.architecture.initializers.Initializer` of a weight.

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
        self._by_class: dict[type[Initializer], Callable[[Any], InitialValues]] = {
            Normal: self._normal,
            Uniform: self._uniform,
            Constant: self._constant,
            Values: self._values,
            LightningDecays: self._lightning_decays,
            AttentionSize: self._attention_size,
            NearestSubNorm: self._nearest_sub_norm,
            EmbeddingRows: self._embedding_rows,
            OfRecipe: self._of_recipe,
            ScanOfAttention: self._scan_of_attention,
        }

    def describe(self, parameter: Parameter) -> str:
        """How a new parameter is initialized, in words."""
        return self._initial_values(parameter).description

    def draw(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """The values of a new parameter, of its shape and ``dtype``, on CPU."""
        return self._initial_values(parameter).values(parameter).expand(parameter.shape).to(dtype, copy=True)

    def _initial_values(self, parameter: Parameter) -> InitialValues:
        """Raises ConfigurationError where a parameter has no initializer, or one that is not known."""
        init = parameter.weight.init
        if init is None:
            raise ConfigurationError(
                f"{parameter.name} is made of {', '.join(parameter.roles)}, which the source does not have, "
                f"and nothing says how else it is initialized; give the weight an init of "
                f"architecture/initializers.py"
            )
        if type(init) not in self._by_class:
            raise ConfigurationError(
                f"{parameter.name} is initialized by {type(init).__name__}, which conversion/new_parameters "
                f"does not know; known are {', '.join(known.__name__ for known in self._by_class)}"
            )
        if isinstance(init, ScanOfAttention) and not self._has_attention(parameter):
            init = init.otherwise
        return self._by_class[type(init)](init)

    def _has_attention(self, parameter: Parameter) -> bool:
        roles = ("q_weight", "k_weight", "v_weight", "o_weight")
        return all(self.source.has_role(role, parameter.layer) for role in roles)

    def _noise(self, parameter: Parameter) -> Tensor:
        return torch.empty(parameter.shape).normal_(generator=generator(self.conversion.seed, parameter.name))

    def _normal(self, init: Normal) -> InitialValues:
        if init.std == 0:
            return self._constant(Constant(0.0))
        return InitialValues(f"normal, std {init.std:g}", lambda parameter: init.std * self._noise(parameter))

    def _uniform(self, init: Uniform) -> InitialValues:
        def draw(parameter: Parameter) -> Tensor:
            source = generator(self.conversion.seed, parameter.name)
            return torch.empty(parameter.shape).uniform_(-init.bound, init.bound, generator=source)

        return InitialValues(f"uniform within {init.bound:.3g}", draw)

    def _constant(self, init: Constant) -> InitialValues:
        return InitialValues(f"constant {init.value:g}", lambda _: torch.tensor(init.value))

    def _values(self, init: Values) -> InitialValues:
        def fill(parameter: Parameter) -> Tensor:
            repeats = -(-parameter.numel // len(init.values))
            return torch.tensor(init.values).repeat(repeats)[: parameter.numel].view(parameter.shape)

        return InitialValues(init.description, fill)

    def _lightning_decays(self, init: LightningDecays) -> InitialValues:
        def of_layer(parameter: Parameter) -> Tensor:
            assert parameter.layer is not None
            return torch.tensor(init.of_layer(parameter.numel, parameter.layer, parameter.model.num_layers))

        return InitialValues("decays of Lightning attention, layer by layer", of_layer)

    def _attention_size(self, init: AttentionSize) -> InitialValues:
        def measure(parameter: Parameter) -> Tensor:
            assert parameter.layer is not None
            return torch.tensor(self.attention_scale.of_layer(parameter.layer))

        return InitialValues("size of the source's attention output, layer by layer", measure)

    def _nearest_sub_norm(self, init: NearestSubNorm) -> InitialValues:
        def measure(parameter: Parameter) -> Tensor:
            assert parameter.layer is not None
            (role,) = parameter.roles
            return self.attention_scale.sub_norm(role, parameter.layer)

        return InitialValues("size of what the source's projection reads, layer by layer", measure)

    def _embedding_rows(self, init: EmbeddingRows) -> InitialValues:
        def choose(parameter: Parameter) -> Tensor:
            random = generator(self.conversion.seed, parameter.name)
            vocabulary, number = parameter.model.vocab_size, parameter.shape[0]
            tokens = draw_tokens(vocabulary, number, random, distinct=True)
            return self.source.read("embedding")[tokens].float()

        return InitialValues("rows of the embedding, frequent tokens preferred", choose)

    def _scan_of_attention(self, init: ScanOfAttention) -> InitialValues:
        if init.misfit is not None:
            raise ConfigurationError(init.misfit)

        def make(parameter: Parameter) -> Tensor:
            assert parameter.layer is not None
            start = ScanStart(self.source, parameter.layer, init.channels, init.state_size)
            drawn = (
                self._by_class[type(init.otherwise)](init.otherwise).values(parameter).expand(parameter.shape)
            )
            made = start.of(init.part, drawn.float(), init.output_scale)
            return transform_of(parameter.weight).fuse([made], parameter.model)

        return InitialValues(init.part.value, make)

    def _of_recipe(self, init: OfRecipe) -> InitialValues:
        upcycling = self.conversion.upcycling
        router_std = {
            UpcyclingForm.exact: TIE_BREAKING_STD,
            UpcyclingForm.published: upcycling.router_init_std,
        }
        if init.name != "router":
            raise ConfigurationError(f"no recipe says how {init.name} is initialized; recipes know router")
        return self._normal(Normal(entry_of(upcycling.form, router_std, "the routers' initializers")))
