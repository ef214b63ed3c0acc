"""Low-rank adapters beside the matrices of projections, without torch (LoRA, arXiv 2106.09685).

The same function in exports is peft's: an adapter is written as a folder of its own, beside that of the base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from spikingbrain_train.architecture.initializers import Constant, Uniform
from spikingbrain_train.architecture.layers import alike, layers
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, LinearTransformKind
from spikingbrain_train.architecture.sizes import bytes_per_element
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.lora import LoraTarget
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import CheckpointError

ROLES = {
    "q_weight": LoraTarget.q_proj,
    "k_weight": LoraTarget.k_proj,
    "v_weight": LoraTarget.v_proj,
    "o_weight": LoraTarget.o_proj,
    "mlp_gate_weight": LoraTarget.gate_proj,
    "mlp_up_weight": LoraTarget.up_proj,
    "mlp_down_weight": LoraTarget.down_proj,
    "mamba_in_weight": LoraTarget.in_proj,
    "mamba_out_weight": LoraTarget.out_proj,
}
"""Role of a matrix -> what adapters call it."""

TARGETS: dict[str, tuple[LoraTarget, ...]] = {
    Projection.qkv: (LoraTarget.q_proj, LoraTarget.k_proj, LoraTarget.v_proj),
    Projection.attention_output: (LoraTarget.o_proj,),
    Projection.mlp_fc1: (LoraTarget.gate_proj, LoraTarget.up_proj),
    Projection.mlp_fc2: (LoraTarget.down_proj,),
}
"""The matrices that lie in a projection of attention or a feed-forward, in order."""

_OTHERS: dict[str, tuple[LoraTarget, ...]] = {
    Projection.qkv: (LoraTarget.in_proj,),
    Projection.attention_output: (LoraTarget.out_proj,),
}
"""Those that lie in it in other layers."""

_MASK = 1
"""Byte of a channel that dropout keeps or hides."""
_MATRIX = re.compile(r"(?:^|.*\.)lora\.(?P<target>\w+)\.(?P<name>[A-Za-z0-9-]+)_(?P<letter>[AB])")


def adapter_of(weight: str) -> str | None:
    """The adapter that a weight is part of, by the weight's name; None for those of the base."""
    match = _MATRIX.fullmatch(weight)
    return None if match is None else match["name"]


def targets_in(projection: str, roles: Collection[str]) -> list[tuple[str, LoraTarget]]:
    """Role and target of each matrix of a weight that adapters can stand beside."""
    possible = _possible(projection)
    return [(role, ROLES[role]) for role in roles if ROLES.get(role) in possible]


def _possible(projection: str) -> set[LoraTarget]:
    """What can be adapted in a projection, in whichever layer."""
    return {*TARGETS.get(projection, ()), *_OTHERS.get(projection, ())}


def targets_of_linear(projection: str, roles: Collection[str]) -> tuple[LoraTarget, ...]:
    """What adapters call the matrices of a linear, in order.

    Args:
        projection: what the linear projects.
        roles: what its matrices are; empty are those of attention and feed-forwards.
    """
    if not roles:
        return TARGETS[projection]
    return tuple(target for _, target in targets_in(projection, roles))


class LoraKind(LinearTransformKind):
    """``alpha / rank * B A x`` of every adapter, added to what a projection gives."""

    name = "lora"
    transform = "spikingbrain_train.models.linears.lora:LoraAdapters"
    words = "adds low-rank adapters"

    def projections(self, model: ModelConfig) -> Collection[str]:
        if not model.lora.names:
            return ()
        asked = set(model.lora.target_modules)
        return [each for each in TARGETS if asked & _possible(each)]

    def settings(self, model: ModelConfig) -> set[str]:
        return self.all_settings(model) if model.lora.names else {"lora.names"}

    def owns(self, weight: str) -> bool:
        return adapter_of(weight) is not None

    def freezes_base(self, model: ModelConfig) -> bool:
        return bool(model.lora.names)

    def trains(self, model: ModelConfig, weight: str) -> bool:
        name = adapter_of(weight)
        return name is not None and model.lora.trains(name)

    def is_stored(self, weight: str, stored: ModelConfig) -> bool:
        return adapter_of(weight) in stored.lora.names

    def starting_from(self, model: ModelConfig, stored: ModelConfig) -> ModelConfig:
        """Without the adapters that ``stored`` has not."""
        lora = model.lora.only(stored.lora.names)
        if not lora.names:
            return replace(model, lora=lora)
        for name in lora.names:
            require_same_rank(stored, model, name)
        # Order, weights and what trains are free: an adapter is known by its name.
        known = replace(lora, names=stored.lora.names, ranks=stored.lora.ranks, trained=[])
        return replace(model, lora=known if set(lora.names) == set(stored.lora.names) else lora)

    def choices(self, model: ModelConfig) -> Collection[str]:
        """Adapters that are not switched off."""
        return [name for name in model.lora.names if model.lora.weight(name) != 0]

    def choosing(self, model: ModelConfig, choice: str | None) -> Mapping[str, Any]:
        """The weight of the chosen one is that which it has beside the others."""
        return {"weights": {n: model.lora.weight(n) if n == choice else 0.0 for n in model.lora.names}}

    def activation_bytes(self, config: RunConfig, weight: Weight) -> float:
        """``A x`` of each adapter as B reads it, and with dropout the input that A reads, with a mask.

        Where the linear itself keeps a rounded input, the one that is not is kept beside it, once for all
        adapters; of attention_output that is too much where softmax attention keeps its output anyway.

        Ranks have ``A x`` of a column-parallel linear for all tokens, that of a row-parallel one for their
        share of the sequence under sequence parallelism.
        """
        parallel, element = config.parallel, bytes_per_element(config.precision)
        tensor = parallel.tensor_model_parallel_size
        share = tensor if parallel.sequence_parallel else 1
        total = 0.0
        reads_another = weight.projection is not None and any(
            kind.changes_input and not kind.in_front and kind.applies(config.model, *weight.projection)
            for kind in LINEAR_TRANSFORMS
        )
        for factor in self.stored_beside(config.model, weight):
            if not factor.name.endswith("_A"):
                continue
            # Of routed experts those that a token meets; their tensor ranks have all of their tokens.
            met = factor.active[0] if factor.copies is not None else 1
            is_row_parallel = factor.by_columns
            rank, inputs = factor.shapes[0]
            total += met * rank * element / (share if is_row_parallel and factor.copies is None else 1)
            if config.model.lora.dropout:
                total += met * inputs * (element + _MASK) / (tensor if is_row_parallel else share)
            elif reads_another:
                total += met * inputs * element / (tensor if is_row_parallel else share)
                reads_another = False
        return total

    def stored_beside(self, model: ModelConfig, weight: Weight) -> tuple[Weight, ...]:
        """A [rank, inputs] and B [outputs, rank] of each matrix in a weight and each adapter."""
        if weight.projection is None or not self.applies(model, *weight.projection):
            return ()
        by_columns = weight.split_axis == 1
        found = []
        for role, target in targets_in(weight.projection[0], weight.roles):
            if target in model.lora.target_modules:
                rows, inputs = weight.shapes[weight.roles.index(role)]
                for name in model.lora.names:
                    found += _factors(weight, target, name, (rows, inputs), model.lora.rank(name), by_columns)
        return tuple(found)

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        if model.lora.names:
            check_places(model)

    def describe(self, model: ModelConfig) -> str:
        lora = model.lora
        each = ", ".join(f"{name} of rank {lora.rank(name)}" for name in lora.names)
        frozen = [name for name in lora.names if not lora.trains(name)]
        frozen_words = f" ({', '.join(frozen)} frozen)" if frozen else ""
        return f"adapters {each}{frozen_words} in {', '.join(t.value for t in lora.target_modules)}"


def check_places(model: ModelConfig) -> None:
    """Every target is in some layer, and layers that have one have its neighbours, too.

    Raises ConfigurationError.
    """
    there: set[LoraTarget] = set()
    for layer, _ in alike(layers(model)):
        for weight in layer.weights(model):
            if weight.projection is None:
                continue
            projection, _ = weight.projection
            found = {target for _, target in targets_in(projection, weight.roles)}
            there |= found
            asked = set(TARGETS.get(projection, ())) & set(model.lora.target_modules)
            require(
                not asked - found or not found & set(TARGETS[projection]),
                f"model.lora.target_modules lists {', '.join(sorted(t.value for t in asked))}, but layers "
                f"{layer.mixer_name} have another matrix in their place ({weight.name}); adapters stand "
                f"beside attention's projections and feed-forwards of gate, up and down projection, so take "
                f"it out of the list",
            )
    missing = [target.value for target in model.lora.target_modules if target not in there]
    require(
        not missing,
        f"model.lora.target_modules lists {', '.join(missing)}, which no layer has; take it out of the list",
    )


def check_merge(model: ModelConfig) -> None:
    """No target has its input or weight changed by what an adapter in the weight would not pass unchanged.

    Behind spikes the sum is one matrix, ``(W + B A) s``. What rounds W rounds ``W + B A`` to something else,
    and beside an input that is rounded inside the linear the adapter reads the one that is not.

    Raises ConfigurationError.
    """
    asked = set(model.lora.target_modules)
    for kind in LINEAR_TRANSFORMS:
        if kind is LORA or not (kind.changes_weight or (kind.changes_input and not kind.in_front)):
            continue
        for projection in kind.projections(model):
            found = asked & _possible(projection)
            require(
                not found,
                f"adapters beside {', '.join(sorted(target.value for target in found))} cannot be merged: "
                f"model.{kind.name}.projections has {Projection(projection).name}, so a weight with an "
                f"adapter in it is another function than both apart; keep the adapter beside the weights",
            )


def require_same_rank(stored: ModelConfig, model: ModelConfig, name: str) -> None:
    """An adapter has the rank with which it was stored. Raises CheckpointError."""
    was, now = stored.lora.rank(name), model.lora.rank(name)
    if was != now:
        raise CheckpointError(
            f"adapter {name} has rank {was} in the checkpoint, but rank {now} by model.lora.ranks; set the "
            f"rank to {was}, or give the new adapter another name"
        )


def _factors(
    weight: Weight, target: LoraTarget, name: str, shape: tuple[int, int], rank: int, by_columns: bool
) -> list[Weight]:
    """The factor that meets the split axis is split as the weight is; ranks hold the other whole."""
    rows, inputs = shape
    routed = weight.copies is not None and weight.copies.routed
    if weight.copies is not None and not routed:  # side by side in one wide feed-forward
        wide = weight.copies.number
        rows, inputs = (rows, inputs * wide) if by_columns else (rows * wide, inputs)
    whole = Split.whole_experts if routed else Split.none
    prefix = f"{weight.name.removesuffix('weight')}lora.{target.value}.{name}"
    common = {"group": "adapters", "copies": weight.copies if routed else None, "active": weight.active}
    # Of several matrices in one weight each has rows of its own here; one keeps the order of the weight's.
    layout = weight.layout if len(weight.roles) == 1 else "rows"
    roles = (f"lora_{target.value}_{name}_A",), (f"lora_{target.value}_{name}_B",)
    a = Weight(
        f"{prefix}_A",
        roles[0],
        ((rank, inputs),),
        split=weight.split if by_columns else whole,
        init=Uniform(inputs**-0.5),
        by_columns=by_columns,
        **common,  # type: ignore[arg-type]
    )
    b = Weight(
        f"{prefix}_B",
        roles[1],
        ((rows, rank),),
        split=whole if by_columns else weight.split,
        init=Constant(0.0),
        layout=layout,
        **common,  # type: ignore[arg-type]
    )
    return [a, b]


LORA = LINEAR_TRANSFORMS.register(LoraKind())
