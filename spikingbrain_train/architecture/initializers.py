"""How weights that a dense source does not have are initialized, without torch. Conversion draws them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

OPEN_GATE = 1.2784645427610738
"""Where swish(x) = x sigmoid(x) is 1: bias of an output gate that begins as if it were not there."""


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around 0."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Drawn between plus and minus a bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


@dataclass(frozen=True)
class Values:
    """Given values, in order; repeated until the weight is full."""

    values: tuple[float, ...]
    description: str
    """For the report."""


@dataclass(frozen=True)
class AttentionSize:
    """The size (root mean square) of the source's attention output, layer by layer."""


@dataclass(frozen=True)
class NearestSubNorm:
    """The size (root mean square) of what the source's projection reads, for the norm in front of it."""


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of the source's embedding, frequent tokens preferred."""


@dataclass(frozen=True)
class OfRecipe:
    """What the conversion recipe says for weights of this name: upcycling's routers."""

    name: str


class ScanPart(Enum):
    """Weights of a selective scan that attention has something for (conversion/scan_start.py)."""

    input_weight = "values, and a gate"
    input_bias = "biases of values, and an open gate"
    scan_weight = "keys and queries as functions of values"
    output_weight = "the source's output projection"
    output_bias = "the source's output bias"


@dataclass(frozen=True)
class ScanOfAttention:
    """A part of a selective scan, made of the source's attention in its layer."""

    part: ScanPart
    channels: int
    state_size: int
    output_scale: float
    misfit: str | None
    """Why the channels do not fit the source's heads, in a sentence; None where they do."""
    otherwise: Normal | Constant
    """What attention does not give, and how it begins where the source's layer has no attention."""


@dataclass(frozen=True)
class LightningDecays:
    """Logarithms of the decays of Lightning attention's heads, layer by layer."""

    def of_layer(self, heads: int, layer: int, num_layers: int) -> list[float]:
        """``-2^(-8 h / H) (1 - l / (L - 1) + 1e-5)`` for heads h = 1 to H of layer l = 0 to L - 1.

        Memories of one token to about 256, longer in later layers. As MiniMax-01 publishes them (arXiv
        2501.08313); TransNormerLLM, and with it Lightning attention-2 (arXiv 2401.04658), has 8 h / H in the
        place of the power, which leaves most heads a memory of one token.
        """
        share = 1 - layer / max(num_layers - 1, 1) + 1e-5
        return [-share * 2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]


Initializer = (
    Normal
    | Uniform
    | Constant
    | Values
    | ScanOfAttention
    | LightningDecays
    | AttentionSize
    | NearestSubNorm
    | EmbeddingRows
    | OfRecipe
)
