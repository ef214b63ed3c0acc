"""What the network is: the sizes of a decoder and the sequence mixer of each of its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Mixer(str, Enum):
    """The sequence mixer of one layer (SpikingBrain, arXiv 2509.05276, section 2.1)."""

    full = "full"
    """Causal softmax attention with rotary positions."""
    swa = "swa"
    """Sliding-window softmax attention with rotary positions (eq. 2)."""
    gla = "gla"
    """Gated linear attention with ReLU features and a low-rank gate, no positions (eq. 10-11)."""


@dataclass
class GatedLinearAttentionConfig:
    """The 7B form: ``log g = logsigmoid(W2 (W1 x) + b2) / gate_logit_normalizer`` (eq. 10-11)."""

    gate_low_rank_dim: int = 16
    """Width of the gate's bottleneck: W1 is [gate_low_rank_dim, hidden_size] without bias."""
    gate_logit_normalizer: float = 16.0
    """Divisor of the log gate; larger means slower forgetting."""
    init_gate_bias_min: float = -16.0
    """Initial b2 of a head's first channel, the fastest to forget: its decay of one step starts at
    sigmoid(init_gate_bias_min) ** (1 / gate_logit_normalizer)."""
    init_gate_bias_max: float = 4.0
    """Initial b2 of a head's last channel, the slowest; those between are spread evenly, so that every head
    starts with memories from about one token to about a thousand.
    """
    init_gate_std: float = 0.02
    """Standard deviation of the initial W1 and W2."""
    init_out_norm: float = 0.3
    """Initial weight of the per-head RMSNorm behind the recurrence."""

    def init_gate_bias(self, kv_channels: int) -> list[float]:
        """Initial b2 of the channels of one head (the same in every head)."""
        step = (self.init_gate_bias_max - self.init_gate_bias_min) / max(kv_channels - 1, 1)
        return [self.init_gate_bias_min + step * channel for channel in range(kv_channels)]


@dataclass
class RopeScalingConfig:
    """The frequency scaling of Llama 3.1 and later. Disabled when ``factor`` is 1."""

    factor: float = 1.0
    """How many times longer than the original context the scaled one is (Llama 3.1: 8)."""
    low_freq_factor: float = 1.0
    """Frequencies with wavelengths above original / low_freq_factor are scaled in full."""
    high_freq_factor: float = 4.0
    """Frequencies with wavelengths below original / high_freq_factor are left alone."""
    original_max_position_embeddings: int = 8192
    """Context length (tokens) that the frequencies were trained for."""


@dataclass
class ModelConfig:
    """Architecture of the decoder. Field names are Megatron-core's where it has one."""

    num_layers: int = MISSING
    """Number of decoder layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU feed-forward."""
    num_attention_heads: int = MISSING
    """Query heads."""
    num_query_groups: int = MISSING
    """Key/value groups (GQA); each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = MISSING
    """Width of one head, for keys and values alike."""
    vocab_size: int = MISSING
    """Entries of the tokenizer's vocabulary as the source checkpoint stores them (before padding for TP)."""
    max_position_embeddings: int = MISSING
    """Longest sequence (tokens) that the model is declared for."""
    mixers: list[Mixer] = field(default_factory=lambda: [Mixer.gla, Mixer.swa])
    """Mixer of each layer, repeated until num_layers are filled: [gla, swa] is SpikingBrain-7B."""
    sliding_window: int = 4096
    """Keys (the current token included) that a sliding-window layer sees."""
    gla: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    """Settings of the gated linear attention layers."""
    rotary_base: float = 10000.0
    """Base of the rotary position frequencies (1e6 for Qwen2.5)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Llama-3-style scaling of the rotary frequencies."""
    norm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    add_qkv_bias: bool = False
    """Whether the q, k and v projections have a bias (Qwen2 and Qwen2.5)."""
    qk_layernorm: bool = False
    """Whether q and k are RMS-normalised per head (Qwen3)."""
    share_embeddings_and_output_weights: bool = False
    """Whether the output projection is the embedding matrix ("tied")."""
    init_method_std: float = 0.02
    """Standard deviation of the weights of a model that starts from nothing."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times tensor_model_parallel_size."""

    def layer_mixers(self) -> list[Mixer]:
        """The mixer of every layer, in order."""
        return [self.mixers[layer % len(self.mixers)] for layer in range(self.num_layers)]

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding matrix, over all tensor-parallel ranks."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple
