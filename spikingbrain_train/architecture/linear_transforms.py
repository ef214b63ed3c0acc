"""What is done to the input or the weight of linear projections, without torch: the contract, the registry.

Each kind is applied to the projections that its settings name; those of one projection are composed in the
order in which their kinds are registered, the package's own first. Here is what plans, checks and schedules
have to know of them; what happens to tensors is a
:class:`~spikingbrain_train.models.linears.linear_transform.LinearTransform`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from spikingbrain_train.architecture.kind import OWN_FORMAT, Kind
from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import ConfigurationError

_IN_EXPERTS = (Projection.mlp_fc1, Projection.mlp_fc2)


class LinearTransformKind(Kind):
    """One kind of transform. Its settings and metrics go by its name: ``model.<name>.x``, ``<name>/x``.

    The defaults of the settings of a kind from outside apply it nowhere.
    """

    transform: str
    """``package.module:name`` of what makes its LinearTransform of a model (ModelConfig), once a linear;
    imported when a model is built."""
    words: str
    """What a model with it does, in sentences: ``encodes activations as spikes``."""
    hf_formats: Collection[str] = ()
    """The Hugging Face formats whose modelling code does it, as ``hf_layers`` of layers calls them; this
    project's own does what has an ``export_module``.

    An export in another leaves it out, if somebody asks for that format."""
    quantizes: str = ""
    """What it makes numbers of few values of, "weights" or "inputs": a projection has one such kind of each.
    Empty where it may stand beside any other."""
    changes_input: bool = False
    """Whether linears multiply another tensor than they are given, which the backward pass then needs."""
    in_front: bool = False
    """Whether what it makes of an input is what travels to the linear, so that adapters beside the weight
    read it, too: spikes. What is done to an input inside the linear they do not see."""
    changes_weight: bool = False
    """Whether linears multiply by another tensor than their parameter, which the backward pass then needs."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "name"):
            cls.section = cls.name
        if "name" in vars(cls):
            own = () if cls.export_module is None else (OWN_FORMAT,)
            cls.hf_formats = (*own, *vars(cls).get("hf_formats", ()))

    def __reduce__(self) -> tuple[Callable[[str], LinearTransformKind], tuple[str]]:
        return _by_name, (self.name,)  # a kind is one object in every process

    @abstractmethod
    def projections(self, model: ModelConfig) -> Collection[str]:
        """The projections that it is applied to; none in a model without it."""

    def applies(self, model: ModelConfig, projection: str, matrix: int = 0) -> bool:
        """Whether it is applied to a linear.

        Args:
            model: the network.
            projection: what the linear projects, as :class:`Projection` calls it.
            matrix: its position where several linears, one behind the other, make up the projection.
        """
        return projection in self.projections(model)

    def holder(self, model: ModelConfig) -> str | None:
        """``package.module:name`` of what makes linear classes hold what is stored beside their weights.

        It is called with the class, the model, the projection and the axis over which the weight is split, of
        every projection, also of those that the kind is not applied to. None stores nothing.
        """
        return None

    def stored_beside(self, model: ModelConfig, weight: Weight) -> tuple[Weight, ...]:
        """Descriptions of that for one weight of a layer."""
        return ()

    def activation_bytes(self, config: RunConfig, weight: Weight) -> float:
        """Bytes per token that it keeps for the backward pass beside one weight of a layer, on one rank.

        Copies of inputs and weights are no part of it: see ``changes_input`` and ``changes_weight``.
        """
        return 0.0

    def owns(self, weight: str) -> bool:
        """Whether a weight, by its name, is one of those that it stores beside others and trains."""
        return False

    def freezes_base(self, model: ModelConfig) -> bool:
        """Whether nothing but what it owns is trained."""
        return False

    def trains(self, model: ModelConfig, weight: str) -> bool:
        """Whether one of those that it owns is trained."""
        return True

    def is_stored(self, weight: str, stored: ModelConfig) -> bool:
        """Whether one of those that it owns is in a checkpoint of ``stored``; else it begins anew."""
        return True

    def starting_from(self, model: ModelConfig, stored: ModelConfig) -> ModelConfig:
        """``model`` without what of it begins anew where it starts from a checkpoint of ``stored``.

        Raises CheckpointError where what both have does not fit.
        """
        return model

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        """Its settings against the network and the stage. Raises ConfigurationError.

        Args:
            model: the network.
            stage: that trains it.
            present: projections that the layers have.
        """

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Whether it can be done to what a rank has of a tensor, or an input. Raises ConfigurationError."""

    def schedule(self, model: ModelConfig, stage: StageConfig, iteration: int) -> Mapping[str, float]:
        """Attributes of its transforms in the step after ``iteration`` finished ones, and in evaluations.

        They depend on nothing else, so that a resumed run repeats the uninterrupted one, and are reported as
        ``<name>/<attribute>``.
        """
        return {}

    def choices(self, model: ModelConfig) -> Collection[str]:
        """Parts of it, by name, of which one can be chosen for a text: adapters."""
        return ()

    def choosing(self, model: ModelConfig, choice: str | None) -> Mapping[str, Any]:
        """Attributes of its transforms with which one of :meth:`choices` works alone, or with None none."""
        return {}

    def ahead_of(self, model: ModelConfig, stage: StageConfig, iteration: int) -> str:
        """How an export after ``iteration`` steps is ahead of training, as a sentence; "" if it is not."""
        return ""

    @abstractmethod
    def describe(self, model: ModelConfig) -> str:
        """A few words for plans and reports on what it does where: ``spikes with k 3 in front of qkv``."""

    def in_experts(self, model: ModelConfig) -> str | None:
        """What experts that are not made of linears cannot do for it; None if nothing.

        In words behind "cannot", with the setting that asks for it.
        """
        asked = [each.name for each in _IN_EXPERTS if each in self.projections(model)]
        return f"do what model.{self.name} asks for inside experts ({', '.join(asked)})" if asked else None


def _by_name(name: str) -> LinearTransformKind:
    return LINEAR_TRANSFORMS[name]


LINEAR_TRANSFORMS: Registry[LinearTransformKind] = Registry(
    "linear transform",
    "model",
    built_in=(
        "spikingbrain_train.architecture.spikes",
        "spikingbrain_train.architecture.int8_inputs",
        "spikingbrain_train.architecture.q8_inputs",
        "spikingbrain_train.architecture.quantization",
        "spikingbrain_train.architecture.ternary",
        "spikingbrain_train.architecture.lora",
    ),
)
"""Every kind of linear transform, in the order in which they are applied. A new one of the package is a line
here."""


def transforms_of(model: ModelConfig) -> list[LinearTransformKind]:
    """Every kind that is applied in ``model``, in order."""
    return [kind for kind in LINEAR_TRANSFORMS if kind.projections(model)]


def keeps_its_input(model: ModelConfig, projection: str) -> bool:
    """Whether a projection keeps a transformed copy of its input for the backward pass."""
    return any(kind.changes_input and kind.applies(model, projection) for kind in LINEAR_TRANSFORMS)


def keeps_its_weight(model: ModelConfig, projection: str, matrix: int) -> bool:
    """Whether a linear keeps a transformed copy of its weight; see :meth:`LinearTransformKind.applies`."""
    return any(kind.changes_weight and kind.applies(model, projection, matrix) for kind in LINEAR_TRANSFORMS)


def in_experts(model: ModelConfig) -> tuple[str, ...]:
    """What each kind has linears inside experts do: see :meth:`LinearTransformKind.in_experts`."""
    return tuple(words for kind in LINEAR_TRANSFORMS if (words := kind.in_experts(model)) is not None)


def choices_of(model: ModelConfig) -> list[str]:
    """What a network has beside its weights, by name, of which one can be chosen for a text."""
    return [choice for kind in transforms_of(model) for choice in kind.choices(model)]


def stored_beside(model: ModelConfig, weight: Weight) -> Iterator[Weight]:
    """What all kinds store beside one weight of a layer."""
    for kind in LINEAR_TRANSFORMS:
        yield from kind.stored_beside(model, weight)


def with_plain_weights(model: ModelConfig) -> ModelConfig:
    """The same network with the parameters as they are in the place of what transforms make of them.

    Raises:
        ConfigurationError: something that is stored beside them would be lost.
    """
    changing = [kind for kind in LINEAR_TRANSFORMS if kind.changes_weight and hasattr(model, kind.name)]
    for kind in changing:
        if kind.holder(model) is not None:
            raise ConfigurationError(
                f"weights as they are would lose what is stored beside them ({kind.describe(model)}); export "
                f"the model without --float-weights"
            )
    sections: dict[str, Any] = {kind.name: type(getattr(model, kind.name))() for kind in changing}
    return replace(model, **sections)


def freezes_base(model: ModelConfig) -> bool:
    """Whether a transform trains what it owns alone: adapters beside a frozen model."""
    return any(kind.freezes_base(model) for kind in LINEAR_TRANSFORMS)


def base_of(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The network without what transforms train beside it, and a note on each that is left out."""
    notes, sections = [], {}
    for kind in LINEAR_TRANSFORMS:
        if kind.freezes_base(model):
            sections[kind.name] = type(kind.own_settings(model))()
            notes.append(f"the base alone is written, without its {kind.describe(model)}")
    return replace(model, **sections), notes


def trains(model: ModelConfig, weight: str) -> bool:
    """Whether a weight, by its name, trains in a stage that trains all of a model."""
    owner = _owner(weight)
    return not freezes_base(model) if owner is None else owner.trains(model, weight)


def may_begin_anew(weight: str) -> bool:
    """Whether a weight, by its name, may be missing in a checkpoint that a model starts from."""
    return _owner(weight) is not None


def is_stored(weight: str, stored: ModelConfig) -> bool:
    """Whether a weight, by its name, is in a checkpoint of ``stored`` that a model may start from."""
    owner = _owner(weight)
    return owner is None or owner.is_stored(weight, stored)


def _owner(weight: str) -> LinearTransformKind | None:
    return next((kind for kind in LINEAR_TRANSFORMS if kind.owns(weight)), None)


def starting_from(model: ModelConfig, stored: ModelConfig) -> ModelConfig:
    """``model`` without what of it begins anew where it starts from a checkpoint of ``stored``."""
    for kind in LINEAR_TRANSFORMS:
        model = kind.starting_from(model, stored)
    return model


def check_alternatives(model: ModelConfig) -> None:
    """No projection has two kinds of numbers in the place of its weights, or of its inputs.

    Raises ConfigurationError.
    """
    known: dict[tuple[str, str], LinearTransformKind] = {}
    for kind in transforms_of(model):
        for projection in kind.projections(model) if kind.quantizes else ():
            other = known.setdefault((kind.quantizes, projection), kind)
            require(
                other is kind,
                f"model.{other.name}.projections and model.{kind.name}.projections both list "
                f"{Projection(projection).name}, whose {kind.quantizes} are one or the other; take it out of "
                f"one list",
            )


def check_gate(kind: LinearTransformKind, model: ModelConfig, present: Collection[str]) -> None:
    """A gate that something is done to is there. Raises ConfigurationError."""
    require(
        Projection.gate in present or Projection.gate not in kind.projections(model),
        f"model.{kind.name}.projections lists gate, but no layer has a low-rank gate or an output gate; take "
        f"gate out of the list",
    )


def without_transforms(model: ModelConfig) -> ModelConfig:
    """The same network with plain linears."""
    sections = [kind.name for kind in LINEAR_TRANSFORMS if hasattr(model, kind.name)]
    return replace(model, **{section: type(getattr(model, section))() for section in sections})
