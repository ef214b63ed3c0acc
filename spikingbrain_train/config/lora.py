"""Low-rank adapters beside frozen projections (LoRA, arXiv 2106.09685), named as peft names them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import (
    FUNCTION,
    TRAINING,
    WEIGHTS,
    OnChange,
    Resuming,
    Role,
    setting,
)

_TRAINED = Resuming(OnChange.refused, "its optimizer holds other adapters", Role.training)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")


class LoraTarget(str, Enum):
    """A matrix that an adapter stands beside, as Hugging Face models call its linear."""

    q_proj = "q_proj"
    """Queries of every mixer that has attention's projections, softmax or linear."""
    k_proj = "k_proj"
    """Keys of the same."""
    v_proj = "v_proj"
    """Values of the same."""
    o_proj = "o_proj"
    """Output projection of the same."""
    gate_proj = "gate_proj"
    """Gate of dense feed-forwards, routed and shared experts."""
    up_proj = "up_proj"
    """What the gate multiplies, of the same."""
    down_proj = "down_proj"
    """Second matrix of the same."""
    in_proj = "in_proj"
    """Input projection of Mamba layers, x and z."""
    out_proj = "out_proj"
    """Output projection of the same."""


_IN_MAMBA = (LoraTarget.in_proj, LoraTarget.out_proj)
ATTENTION_AND_FEED_FORWARD = [each for each in LoraTarget if each not in _IN_MAMBA]
"""What adapters stand beside if nothing else is said."""


@dataclass
class LoraConfig:
    """Adapters ``y = W x + weight * alpha / rank * B A x``; in a model that has some, nothing else trains."""

    names: list[str] = setting(default_factory=list, resume=WEIGHTS)
    """Adapters that the model holds, all of them active at once; empty is a model without. A checkpoint
    without some of them can be loaded: these begin anew, without effect."""
    ranks: list[int] = setting(default_factory=lambda: [8], minimum=1, resume=WEIGHTS)
    """Rank of A and B: one for all adapters, or one for each of names."""
    alphas: list[float] = setting(default_factory=lambda: [16.0], above=0, resume=FUNCTION)
    """What alpha / rank scales B A with: one for all adapters, or one for each of names."""
    weights: list[float] = setting(default_factory=lambda: [1.0], resume=FUNCTION)
    """Weight of each adapter in the sum: one for all of them, or one for each of names; 0 switches it off."""
    target_modules: list[LoraTarget] = setting(
        default_factory=lambda: list(ATTENTION_AND_FEED_FORWARD), resume=WEIGHTS
    )
    """Matrices that have adapters, in every layer that has them."""
    trained: list[str] = setting(default_factory=list, resume=_TRAINED)
    """Which of names train; empty is all of them."""
    dropout: float = setting(0.0, minimum=0, below=1, resume=TRAINING)
    """Share of the input that A does not see in training, of each matrix and adapter for itself."""

    def check(self, prefix: str) -> None:
        """Names, and as many numbers as there are. Raises ConfigurationError."""
        for name in self.names:
            require(
                _NAME.fullmatch(name) is not None,
                f"{prefix}names has {name!r}; name adapters by letters, digits and hyphens",
            )
        for setting_name in ("names", "target_modules", "trained"):
            listed = [str(getattr(each, "value", each)) for each in getattr(self, setting_name)]
            twice = sorted({each for each in listed if listed.count(each) > 1})
            require(not twice, f"{prefix}{setting_name} lists {' and '.join(twice)} more than once")
        for setting_name in ("ranks", "alphas", "weights"):
            number = len(getattr(self, setting_name))
            require(
                number == 1 or number == len(self.names),
                f"{prefix}{setting_name} has {number} numbers for {len(self.names)} adapters; give one for "
                f"all of {prefix}names, or one for each",
            )
        require(
            not self.names or bool(self.target_modules),
            f"{prefix}target_modules is empty, so {prefix}names has adapters of nothing; list some of "
            f"{', '.join(each.value for each in LoraTarget)}",
        )
        unknown = [name for name in self.trained if name not in self.names]
        require(
            not unknown,
            f"{prefix}trained has {', '.join(unknown)}, which {prefix}names does not list; train some of "
            f"those that it does",
        )

    def rank(self, name: str) -> int:
        """Of an adapter."""
        return self.ranks[self._place(name) if len(self.ranks) > 1 else 0]

    def alpha(self, name: str) -> float:
        """Of an adapter."""
        return self.alphas[self._place(name) if len(self.alphas) > 1 else 0]

    def weight(self, name: str) -> float:
        """Of an adapter in the sum of all."""
        return self.weights[self._place(name) if len(self.weights) > 1 else 0]

    def scaling(self, name: str) -> float:
        """What the product B A of an adapter is multiplied by."""
        return self.weight(name) * self.alpha(name) / self.rank(name)

    def trains(self, name: str) -> bool:
        """Whether an adapter is trained."""
        return not self.trained or name in self.trained

    def only(self, names: Collection[str]) -> LoraConfig:
        """The same settings for some of the adapters, in the order in which they stand here."""
        kept = [name for name in self.names if name in names]
        if not kept:
            return LoraConfig()
        return LoraConfig(
            names=kept,
            ranks=[self.rank(name) for name in kept],
            alphas=[self.alpha(name) for name in kept],
            weights=[self.weight(name) for name in kept],
            target_modules=list(self.target_modules),
            trained=[name for name in self.trained if name in kept],
            dropout=self.dropout,
        )

    def _place(self, name: str) -> int:
        return self.names.index(name)
