"""What is done to inputs and weights of linear projections (spikes, INT8, ternary numbers), and to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import FUNCTION, TRAINING, WEIGHTS, setting


class Projection(str, Enum):
    """A group of linear projections whose inputs and weights can be transformed: spikes, INT8 weights."""

    qkv = "qkv"
    """The fused q, k and v projection of every mixer; that of x and z in Mamba layers."""
    gate = "gate"
    """The two matrices of the low-rank gate, of which for spikes model.spiking.gate_encoding says which; that
    of a full-rank gate, and that of the output gate."""
    attention_output = "attention_output"
    """The output projection of every mixer."""
    mlp_fc1 = "mlp_fc1"
    """Gate and up projection of dense feed-forwards, routed and shared experts."""
    mlp_fc2 = "mlp_fc2"
    """Down projection of dense feed-forwards, routed and shared experts."""


_VOCABULARY = "embedding and vocabulary projection are no linears of a layer and stay in full precision"
NO_PROJECTIONS: Mapping[str, str] = dict.fromkeys(
    ("output_layer", "output", "lm_head", "vocabulary", "embedding", "embed_tokens"), _VOCABULARY
)
"""What somebody may take for a :class:`Projection` -> why it is none."""


class GateEncoding(str, Enum):
    """Where the low-rank gate reads spikes, if it is among the projections that do."""

    once = "once"
    """In front of W1: the hidden state is encoded, and W2 W1 acts as one matrix, which is what the published
    code makes of them."""
    each_matrix = "each_matrix"
    """In front of W1 and of W2: the gate_low_rank_dim values between them are encoded as well."""


@dataclass
class SpikingConfig:
    """Adaptive-threshold spikes in front of linear projections (eq. 19-21)."""

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections read spikes, e.g. [qkv,attention_output,mlp_fc1,mlp_fc2]; empty is a model
    without."""
    gate_encoding: GateEncoding = setting(GateEncoding.once, resume=FUNCTION)
    """Where the low-rank gate reads spikes, if gate is among the projections."""
    k: float = setting(3.0, above=0, resume=TRAINING)
    """Fineness of the spikes: more, and closer to the input, for a larger k. The threshold is Vth(x) =
    mean(|x|) / k over the whole input of one token."""
    queries: bool = setting(False, resume=FUNCTION)
    """Whether softmax layers attend with spiking queries as well, encoded behind rotary positions with a
    threshold for each token and head (published W8ASpike); needs projections."""

    def check(self, prefix: str) -> None:
        """Each projection is listed once, and queries spike where projections do.

        Raises ConfigurationError.
        """
        _check_listed_once(self.projections, prefix)
        require(
            bool(self.projections) or not self.queries,
            f"{prefix}queries=true encodes queries of a model without spikes; name the projections that read "
            f"spikes in {prefix}projections, or set {prefix}queries=false",
        )


def _check_listed_once(projections: Sequence[Projection], prefix: str) -> None:
    names = [projection.name for projection in projections]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(
        not twice,
        f"{prefix}projections lists {' and '.join(twice)} more than once; list each projection once",
    )


@dataclass
class QuantizationConfig:
    """INT8 numbers in the place of weights, keys and values, as W8ASpike has them (section 3.3).

    Training sees what an export stores; parameters stay as they are.
    """

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections multiply by INT8 weights, e.g. [qkv,attention_output,mlp_fc1,mlp_fc2]; empty is a
    model without. They compose with spikes."""
    group_size: int = setting(128, minimum=1, resume=FUNCTION)
    """Weights that share a scale, max |w| / 127: neighbours along the input. It must divide the input of
    every quantised projection; one that is narrower is one group."""
    keys_and_values: bool = setting(False, resume=FUNCTION)
    """Whether softmax layers attend to INT8 keys (behind rotary positions) and values, with a scale for each
    token and head."""
    stored_scales: bool = setting(False, resume=WEIGHTS)
    """Whether scales are stored beside the weights and never change, as in an imported W8ASpike checkpoint,
    instead of following from the weights; whole numbers are then not bounded, as published. Every projection
    has some, also one that is not rounded."""

    def check(self, prefix: str) -> None:
        """Each projection is listed once, and stored scales scale something.

        Raises ConfigurationError.
        """
        _check_listed_once(self.projections, prefix)
        require(
            bool(self.projections) or not self.stored_scales,
            f"{prefix}stored_scales=true keeps scales of INT8 weights, but {prefix}projections is empty; "
            f"name the projections that have them, or set {prefix}stored_scales=false",
        )


@dataclass
class Int8InputsConfig:
    """Inputs of projections as INT8 numbers, as BitNet b1.58 has them (arXiv 2402.17764, section 2).

    An alternative to spikes.
    """

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections read whole numbers from -127 to 127 times a scale of their token, max |x| / 127;
    empty is a model without. Others may read spikes."""

    def check(self, prefix: str) -> None:
        """Each projection is listed once. Raises ConfigurationError."""
        _check_listed_once(self.projections, prefix)


@dataclass
class Q8InputsConfig:
    """Inputs of projections as llama.cpp's CPU products round them: INT8 blocks (Q8_K and Q8_0 of ggml).

    For models that are to run there. An alternative to spikes and to INT8 inputs with a scale for each token.
    """

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections read whole numbers from -127 to 127 times a scale of 256 neighbouring inputs, where
    256 divides their number, else of 32; empty is a model without."""

    def check(self, prefix: str) -> None:
        """Each projection is listed once. Raises ConfigurationError."""
        _check_listed_once(self.projections, prefix)


@dataclass
class TernaryConfig:
    """Weights of -1, 0 and 1 times a scale, as BitNet b1.58 has them (arXiv 2402.17764, eq. 1-3).

    Training sees what an export stores; parameters stay as they are.
    """

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections multiply by ternary weights, e.g. [qkv,attention_output,mlp_fc1,mlp_fc2]; empty is a
    model without. The scale is the mean magnitude of a matrix; q, k, v, gate and up projection are one each,
    and so is each expert's. They compose with spikes and with INT8 inputs."""

    def check(self, prefix: str) -> None:
        """Each projection is listed once. Raises ConfigurationError."""
        _check_listed_once(self.projections, prefix)
