"""How a dense source becomes a hybrid: the recipe that `spikingbrain-convert import` follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spikingbrain_train.config.model import ActivationFunc, LayersConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import setting


class UpcyclingForm(str, Enum):
    """How copies of a dense feed-forward are scaled as experts; S shared, top k of N routed ones."""

    published = "published"
    """All three matrices by (S + k/N) ** (-1/3), random router (arXiv 2509.05276, eq. 15-18)."""
    exact = "exact"
    """Only the down projection, by 1 / (S + k/N), and a router of nearly zeros, which merely spreads the
    tokens over the experts: the dense function at initialisation."""


@dataclass
class UpcyclingConfig:
    """Dense feed-forwards become mixtures of experts; used in layers whose feed-forward is ``moe``."""

    form: UpcyclingForm = UpcyclingForm.published
    """Scaling of the copies and start of the router."""
    router_init_std: float = setting(0.02, minimum=0)
    """Standard deviation of the random router of the published form; the report does not give it."""
    reinit_fraction: float = setting(0.0, minimum=0, maximum=1, must="be between 0 (copies) and 1 (all new)")
    """Share of each routed expert's intermediate channels that is drawn anew, for diversity; 0 copies all."""


@dataclass
class ConversionConfig(LayersConfig):
    """The swap of sequence mixers and feed-forwards. Everything else of the source is kept as it is."""

    plugins: list[str] = setting(default_factory=list)
    """Modules of other packages that register kinds of mixers and feed-forwards, e.g. [my_package.mixers]."""
    keep_mixers: bool = setting(False)
    """Keep the source's mixers and what they are made of (mixers, sliding_window, gla, parallel_hybrid), also
    where it is a hybrid already; feed-forwards, experts, sinks and spikes are this recipe's."""
    activation_func: ActivationFunc | None = setting(None)
    """Put in the place of the activation of the source's feed-forwards, whose weights stay as they are; null
    keeps it. relu is the first step of ProSparse (docs/prosparse.md)."""
    fatrelu_threshold: float | None = setting(None, minimum=0)
    """Smallest gate that fatrelu lets through; null keeps the source's, or takes 0.01."""
    attn_sub_norm: bool | None = setting(None)
    """True puts an RMSNorm in front of the output projection of attention (BitNet b1.58 2B4T), which begins
    so that the function changes least (docs/bitnet.md); null keeps what the source has."""
    ffn_sub_norm: bool | None = setting(None)
    """The same in front of the down projection of dense feed-forwards."""
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    """Start of the experts and routers."""
    seed: int = setting(1234, minimum=0, below=2**32, must=f"be at least 0 and below 2**32 = {2**32}")
    """Seed of the new parameters: a name and this seed decide a tensor's values, in any order or topology."""

    def check(self, prefix: str) -> None:
        """A threshold belongs to an activation that has one. Raises ConfigurationError."""
        super().check(prefix)
        require(
            self.fatrelu_threshold is None or self.activation_func in (None, ActivationFunc.fatrelu),
            f"{prefix}fatrelu_threshold={self.fatrelu_threshold} has no part in "
            f"{prefix}activation_func={getattr(self.activation_func, 'value', None)}; set it to null, or "
            f"{prefix}activation_func=fatrelu",
        )
