"""SpikingBrain2.0 (arXiv 2604.22575): what of its ``sse_swa_moba`` checkpoints the kinds here hold. No torch.

Three kinds of layers, by the names of its published code:

- full attention (``attn.full_layers``): a layer of ours, tensor by tensor;
- MoBA (the other ``attn.layers``): tensors of full attention. A query sees the ``moba_topk`` blocks of
  ``moba_chunk_size`` tokens that it chooses, its own among them. While there are no more, that is full
  attention; the choice among more is computed by no kind here;
- all others: attention with a window, which a branch of ours holds with its norm, beside state expansion
  (SSE) on a gated delta rule, which no kind here computes.

So such a checkpoint cannot be imported as the model that it is. It can be read: every tensor is told, with
where it would go or why it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.reporting.tables import spans

MODEL_TYPE = "sse_swa_moba"
ARCHITECTURE = "SSESWAMoBAForCausalLM"

_GATE_RANK = 16  # gate_low_rank_dim of the published class, which its config does not have


def is_spikingbrain2(values: dict[str, Any]) -> bool:
    """Whether a config.json is of SpikingBrain2.0."""
    return values.get("model_type") == MODEL_TYPE or values.get("architectures") == [ARCHITECTURE]


@dataclass(frozen=True)
class KnownTensor:
    """A tensor that a SpikingBrain2.0 checkpoint has, by its config.json."""

    pattern: str
    """Its name, with ``{layer}`` in place of a number."""
    layer: int | None
    """0-based; None around the layers."""
    shape: tuple[int, ...]
    what: str
    """What it is, in words; where it would go, if a kind here holds it."""
    is_held: bool
    """Whether a kind here holds it."""

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.pattern.format(layer=self.layer)


@dataclass(frozen=True)
class SpikingBrain2:
    """What a config.json of SpikingBrain2.0 describes.

    Raises:
        CheckpointError: a key is missing or malformed; it is named.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    window: int
    block: int
    """Tokens of a MoBA block."""
    top_blocks: int
    partitions: int
    """Partitions of the expanded state."""
    linear: str
    """``gdn`` (gated delta rule) or ``gla`` (gated linear attention)."""
    output_gate: bool
    short_convolution: int | None
    """Tokens that it reads; None without."""
    full_layers: list[int]
    moba_layers: list[int]

    @classmethod
    def read(cls, values: dict[str, Any], path: Path) -> SpikingBrain2:
        """From a config.json, which messages call ``path``."""
        keys = ConfigKeys(values, path)
        number = keys.integer("num_hidden_layers")
        if not isinstance(values.get("attn"), dict):
            raise keys.refuse("attn", "must describe the softmax layers")
        attn = ConfigKeys(values["attn"], path)
        softmax = attn.layers("layers", [], number)
        full = attn.layers("full_layers", [], number)
        linear = values.get("linear_attn_type", "gdn")
        if linear not in _LINEAR:
            raise keys.refuse("linear_attn_type", f"must be one of {', '.join(_LINEAR)}")
        heads = attn.integer("num_heads")
        return cls(
            num_layers=number,
            hidden_size=keys.integer("hidden_size"),
            ffn_hidden_size=keys.integer("intermediate_size"),
            num_heads=heads,
            num_groups=attn.integer("num_kv_heads", heads),
            head_dim=keys.integer("head_dim"),
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=keys.integer("max_position_embeddings"),
            rotary_base=attn.number("rope_theta", 10000.0),
            tied=keys.boolean("tie_word_embeddings", False),
            qk_norm=attn.boolean("qk_norm", False),
            qkv_bias=attn.boolean("qkv_bias", False),
            window=attn.integer("window_size"),
            block=attn.integer("moba_chunk_size", 1024),
            top_blocks=attn.integer("moba_topk", 4),
            partitions=keys.integer("num_sparse_partition", 4),
            linear=linear,
            output_gate=keys.boolean("use_output_gate", True),
            short_convolution=keys.integer("conv_size", 4) if keys.boolean("use_short_conv", False) else None,
            full_layers=sorted(set(softmax) & set(full)),
            moba_layers=sorted(set(softmax) - set(full)),
        )

    @property
    def sse_layers(self) -> list[int]:
        """Layers of state expansion beside a window."""
        softmax = {*self.full_layers, *self.moba_layers}
        return [layer for layer in range(self.num_layers) if layer not in softmax]

    @property
    def reach(self) -> int:
        """Tokens up to which MoBA is full attention."""
        return self.block * self.top_blocks

    def rows(self) -> list[tuple[str, str]]:
        """The architecture, for a terminal."""
        rule = _LINEAR[self.linear]
        return [
            (
                "layers:",
                f"{len(self.full_layers)} of full attention ({spans(self.full_layers) or 'none'}); "
                f"{len(self.moba_layers)} of MoBA, {self.top_blocks} blocks of {self.block:,} tokens "
                f"({spans(self.moba_layers) or 'none'}); {len(self.sse_layers)} of state expansion in "
                f"{self.partitions} partitions on {rule}, beside a window of {self.window} "
                f"({spans(self.sse_layers) or 'none'})",
            ),
            (
                "sizes:",
                f"hidden {self.hidden_size}, feed-forward {self.ffn_hidden_size}, {self.num_heads} heads of "
                f"{self.head_dim} in {self.num_groups} groups",
            ),
            ("vocabulary:", f"{self.vocab_size}, {'tied' if self.tied else 'untied'} embeddings"),
            (
                "positions:",
                f"up to {self.max_position_embeddings}, rotary base {self.rotary_base:g}; MoBA is full "
                f"attention up to {self.reach:,} tokens",
            ),
        ]

    def tensors(self) -> Iterator[KnownTensor]:
        """Every tensor of such a checkpoint, in forward order."""
        hidden = self.hidden_size
        yield KnownTensor("model.embeddings.weight", None, (self.vocab_size, hidden), "embedding", True)
        for layer in range(self.num_layers):
            prefix = "model.layers.{layer}."
            for pattern, shape, what, is_held in self._of_layer(layer):
                yield KnownTensor(prefix + pattern, layer, shape, what, is_held)
        yield KnownTensor("model.norm.weight", None, (hidden,), "final norm", True)
        if not self.tied:
            yield KnownTensor("lm_head.weight", None, (self.vocab_size, hidden), "output layer", True)

    def _of_layer(self, layer: int) -> Iterator[tuple[str, tuple[int, ...], str, bool]]:
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        yield "attn_norm.weight", (hidden,), "norm", True
        if layer in self.full_layers:
            yield from self._attention("attn.", "full attention")
        elif layer in self.moba_layers:
            yield from self._attention("attn.", f"full attention up to {self.reach:,} tokens")
        else:
            yield from self._attention("attn.swa_", f"attention with a window of {self.window}")
            yield "attn.swa_merge_norm.weight", (hidden,), "norm of the window's branch", True
            for pattern, shape, what in self._state_expansion():
                yield f"attn.{pattern}", shape, what, False
        yield "mlp_norm.weight", (hidden,), "norm", True
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            yield f"mlp.{name}_proj.weight", shape, "feed-forward", True

    def _attention(self, prefix: str, what: str) -> Iterator[tuple[str, tuple[int, ...], str, bool]]:
        hidden, queries, keys = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_groups * self.head_dim,
        )
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{prefix}{letter}_proj.weight", (rows, hidden), what, True
            if self.qkv_bias:
                yield f"{prefix}{letter}_proj.bias", (rows,), what, True
        yield f"{prefix}o_proj.weight", (hidden, queries), what, True
        if self.qk_norm:
            for letter in "qk":
                yield f"{prefix}{letter}_norm.weight", (self.head_dim,), what, True

    def _state_expansion(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """The branch that no kind here computes; it has as many heads of keys as of queries."""
        hidden, width, heads = self.hidden_size, self.head_dim, self.num_heads
        channels = heads * width
        for letter in "qkv":
            yield f"sse_{letter}_proj.weight", (channels, hidden), "SSE: queries, keys, values"
        for letter in "qk":
            what = "SSE: low-rank queries and keys of the expanded state"
            yield f"lora_{letter}_proj.0.weight", (width, hidden), what
            yield f"lora_{letter}_proj.1.weight", (channels, width), what
        if self.linear == "gdn":
            yield "A_log", (2 * heads,), "gated delta rule: decay"
            yield "dt_bias", (2 * heads,), "gated delta rule: decay"
            yield "sse_a_proj.weight", (2 * heads, hidden), "gated delta rule: decay"
            yield "sse_b_proj.weight", (2 * heads, hidden), "gated delta rule: strength of writing"
        else:
            for half in range(2):
                what = "SSE: gates of the two states"
                yield f"sse_gk_proj.{half}.0.weight", (_GATE_RANK, hidden), what
                yield f"sse_gk_proj.{half}.1.weight", (channels, _GATE_RANK), what
                yield f"sse_gk_proj.{half}.1.bias", (channels,), what
        yield "sse_e_proj.weight", (self.partitions, hidden), "SSE: choice of partitions"
        if self.short_convolution is not None:
            for letter in "qk":
                shape = (channels, 1, self.short_convolution)
                yield f"{letter}_conv1d_shared.weight", shape, "short convolution"
        if self.output_gate:
            yield "sse_g_proj.0.weight", (width, hidden), "SSE: output gate"
            yield "sse_g_proj.1.weight", (channels, width), "SSE: output gate"
        yield "sse_o_norm.weight", (width,), "SSE: output norm"
        yield "sse_o_proj.weight", (hidden, channels), "SSE: output projection"
        yield "sse_merge_norm.weight", (hidden,), "norm of the SSE branch"

    def refusal(self, path: Path) -> CheckpointError:
        """Why such a checkpoint is not imported, as the error to raise."""
        tensors = list(self.tensors())
        missing = [tensor for tensor in tensors if not tensor.is_held]
        advice = f"`spikingbrain-convert inspect {path.parent}` says where each would go"
        if not missing:
            return CheckpointError(
                f"{path}: {ARCHITECTURE} is SpikingBrain2.0, whose MoBA layers choose {self.top_blocks} "
                f"blocks of {self.block} tokens, as no kind of layer here does; {advice}"
            )
        return CheckpointError(
            f"{path}: {ARCHITECTURE} is SpikingBrain2.0, of which {len(missing)} of {len(tensors)} tensors, "
            f"such as {missing[0].name}, have no place here: no kind of layer computes state expansion on "
            f"{_LINEAR[self.linear]} ({len(self.sse_layers)} layers); {advice}, and which would not"
        )


_LINEAR = {"gdn": "a gated delta rule", "gla": "gated linear attention with two states"}
"""What ``linear_attn_type`` names, in words."""
