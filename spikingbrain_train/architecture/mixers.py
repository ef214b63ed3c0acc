"""What a sequence mixer is, without torch: the contract of every kind, and the registry of kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from spikingbrain_train.architecture.backends.backend import Backends
from spikingbrain_train.architecture.context_traffic import ContextTraffic
from spikingbrain_train.architecture.initializers import Constant, NearestSubNorm
from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig


class MixerKind(SubmoduleKind):
    """One kind of sequence mixer: the ``self_attention`` of a layer, or a branch of it."""

    family: str
    """What its weights are: kinds of one family can take each other's weights. Names its branch in a layer of
    several, too. Where a class names none, it is its name."""
    leads: bool = False
    """Whether it begins close to the source's attention, so that branches of it lead a layer of several."""
    keeps_its_output: bool = True
    """Whether its backward pass needs what its output projection reads; plans of FP8 count it then."""
    backends: Backends[Any] | None = None
    """Who can compute its op; None where there is no choice. What ``cluster.kernels`` has no setting for is
    chosen as under ``auto``."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "family") and hasattr(cls, "name"):
            cls.family = cls.name

    def __reduce__(self) -> tuple[Callable[[str], MixerKind], tuple[str]]:
        return _by_name, (self.name,)  # a kind is one object in every process

    @abstractmethod
    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        """Its parameters, in the order of the forward pass.

        Args:
            model: the network.
            group: how the conversion report calls the projections.
        """

    def window(self, model: ModelConfig) -> int | None:
        """Tokens (the current one included) that a query sees; None is all before it."""
        return None

    @abstractmethod
    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Forward FLOPs between its projections, per token of text; the sinks' own work is shared out."""

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> Any | None:
        """What it asks of its op on a rank, as the table of its backends knows it; None where it has none.

        Args:
            config: of the run.
            model: of the network, which may be the run's teacher.
            layout: what the rank holds of a sequence.
            has_documents: whether the sequence is several documents that do not see each other.
        """
        return None

    @abstractmethod
    def activation_bytes(self, config: RunConfig) -> float:
        """Bytes per token that it keeps for its backward pass on one rank, its normed input left out."""

    def context_traffic(self, config: RunConfig) -> ContextTraffic | None:
        """What context-parallel ranks send each other in a layer of it; None where a kind does not say.

        Called where ``parallel.context_parallel_size`` is above 1. The search of a layout tries no context
        parallelism with a kind that does not say.
        """
        return None

    def input_projections(self, model: ModelConfig) -> tuple[str, ...]:
        """The projections that read the layer's normed input, as ``Projection`` names them."""
        return ("qkv",)


def _by_name(name: str) -> MixerKind:
    return MIXERS[name]


MIXERS: Registry[MixerKind] = Registry(
    "mixer",
    "model.mixers",
    built_in=(
        "spikingbrain_train.architecture.softmax_attention",
        "spikingbrain_train.architecture.gated_linear_attention",
        "spikingbrain_train.architecture.gated_delta_rule",
        "spikingbrain_train.architecture.mamba",
    ),
)
"""Every kind of sequence mixer. A new one of the package is a line here."""


def attention_weights(
    model: ModelConfig, group: str, new_norms: str | None = None, num_query_groups: int | None = None
) -> tuple[Weight, ...]:
    """Fused q, k and v projection, output projection, biases and q/k norms, as every attention has them.

    Letters: h hidden_size, H query heads, G query groups, d kv_channels. The fused projection has
    (H + 2G) d h elements, the output projection H d h.

    Args:
        model: the network.
        group: how the conversion report calls the projections.
        new_norms: how it calls q/k norms that begin at 1 because the source has none; None adds none to a
            source without.
        num_query_groups: groups, a multiple of the model's; None is the model's.
    """
    hidden, width = model.hidden_size, model.kv_channels
    of_the_source = tuple(
        width * heads for heads in (model.num_attention_heads, *2 * (model.num_query_groups,))
    )
    rows = (of_the_source[0], *2 * (width * (num_query_groups or model.num_query_groups),))
    biases, norms, output_bias, sub_norm = [], [], [], []
    if model.attn_sub_norm:
        shape = (of_the_source[0],)
        sub_norm = [
            Weight(
                "linear_proj.sub_norm.weight", ("attn_sub_norm",), (shape,), "norms", init=NearestSubNorm()
            )
        ]
    if model.add_output_bias:
        output_bias = [Weight("linear_proj.bias", ("o_bias",), ((hidden,),), f"{group} output", Split.none)]
    if model.add_qkv_bias:
        biases.append(
            Weight(
                "linear_qkv.bias",
                ("q_bias", "k_bias", "v_bias"),
                tuple((row,) for row in rows),
                f"{group} q/k/v",
                layout="query_groups",
                source_shapes=tuple((row,) for row in of_the_source),
            )
        )
    if model.qk_layernorm or new_norms:
        norms = [
            Weight(
                f"{letter}_layernorm.weight",
                (f"{letter}_norm",),
                ((width,),),
                new_norms or "norms",
                Split.none,
                init=Constant(1.0) if new_norms else None,
            )
            for letter in "qk"
        ]
    return (
        Weight(
            "linear_qkv.weight",
            ("q_weight", "k_weight", "v_weight"),
            tuple((row, hidden) for row in rows),
            f"{group} q/k/v",
            layout="query_groups",
            source_shapes=tuple((row, hidden) for row in of_the_source),
            reads_input=True,
            projection=("qkv", 0),
        ),
        *biases,
        *norms,
        *sub_norm,
        Weight(
            "linear_proj.weight",
            ("o_weight",),
            ((hidden, rows[0]),),
            f"{group} output",
            projection=("attention_output", 0),
        ),
        *output_bias,
    )
