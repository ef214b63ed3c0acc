"""Layers of several mixers that read the same input, without torch: names, order and what they add.

    y = sum of w_i RMSNorm(mixer_i(x))        (SpikingBrain, arXiv 2509.05276, eq. 6, of two mixers)

Each branch is a whole mixer with projections of its own; new are a norm of each (hidden_size numbers) and one
vector of branch weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.architecture.initializers import AttentionSize, Values
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig, ParallelHybridConfig


def in_order(mixers: Sequence[MixerKind]) -> tuple[MixerKind, ...]:
    """Branches as their weights are ordered, however a config lists them: those that lead first."""
    return tuple(sorted(mixers, key=lambda kind: (not kind.leads, kind.family, kind.name)))


def branch_names(mixers: Sequence[MixerKind]) -> list[str]:
    """What each branch is called: by its family, or, where two are of one, by its kind."""
    families = [kind.family for kind in mixers]
    return [kind.family if families.count(kind.family) == 1 else kind.name for kind in mixers]


def module_name(branch: str) -> str:
    """The branch's module in a layer: ``softmax_attention``."""
    return f"{branch}_attention"


def norm_name(branch: str) -> str:
    """The norm behind it: ``softmax_norm``."""
    return f"{branch}_norm"


def initial_branch_weights(settings: ParallelHybridConfig, mixers: Sequence[MixerKind]) -> list[float]:
    """Where branch weights start.

    Branches that lead share ``init_softmax_weight``, as they begin as the source does, and others have
    ``init_linear_weight``; where none leads all share the former.
    """
    leads = [kind.leads for kind in mixers]
    leading = leads if any(leads) else [True] * len(mixers)
    share = settings.init_softmax_weight / sum(leading)
    return [share if is_leading else settings.init_linear_weight for is_leading in leading]


def dropped_branches(mixers: Sequence[MixerKind]) -> list[str]:
    """What drop-out of softmax branches drops: the branches that lead, where there is another beside them."""
    if all(kind.leads for kind in mixers):
        return []
    return [name for name, kind in zip(branch_names(mixers), mixers, strict=True) if kind.leads]


def branch_weights(model: ModelConfig, mixers: Sequence[MixerKind]) -> tuple[Weight, ...]:
    """All parameters of a layer's mixers, below ``self_attention.``, in the order of the forward pass."""
    if len(mixers) == 1:
        return mixers[0].weights(model)
    names = branch_names(mixers)
    weights = [
        weight.below(f"{module_name(name)}.")
        for name, kind in zip(names, mixers, strict=True)
        for weight in kind.weights(model, group=f"{name} branch")
    ]
    norms = [
        Weight(
            f"{norm_name(name)}.weight",
            (norm_name(name),),
            ((model.hidden_size,),),
            "branch norms",
            Split.none,
            init=AttentionSize(),
        )
        for name in names
    ]
    initial = initial_branch_weights(model.parallel_hybrid, mixers)
    mix = Weight(
        "branch_weights",
        ("branch_weights",),
        ((len(mixers),),),
        f"branch weights ({', '.join(names)})",
        Split.none,
        init=Values(tuple(initial), " and ".join(f"{weight:g}" for weight in initial)),
    )
    return (*weights, *norms, mix)
