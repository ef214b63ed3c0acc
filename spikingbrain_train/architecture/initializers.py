"""How weights that a dense source does not have are initialized, without torch. Conversion draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around 0."""

    std: float


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
class EmbeddingRows:
    """Rows of the source's embedding, frequent tokens preferred."""


@dataclass(frozen=True)
class OfRecipe:
    """What the conversion recipe says for weights of this name: upcycling's routers."""

    name: str


Initializer = Normal | Constant | Values | AttentionSize | EmbeddingRows | OfRecipe
