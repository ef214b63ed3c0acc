"""Configuration of the SpikingBrain-7B architecture in Hugging Face form (``model_type: "gla_swa"``).

Part of the modelling code of a checkpoint (see modeling_gla_swa.py); needs torch and transformers only.

Keys of the published format keep their names and meaning. Further keys are optional, and their defaults mean
what the published class always does, so that a published config.json loads unchanged.
"""

from __future__ import annotations

from types import EllipsisType

from transformers import PretrainedConfig

from .rotary_gla_swa import RotaryPositions

DEFAULT_ROPE_THETA = 1000000.0
DEFAULT_SLIDING_WINDOW = 4096


class GLAswaConfig(PretrainedConfig):
    """Shape and mixers of a decoder whose layers are gated linear attention (GLA) or softmax attention.

    Published keys (SpikingBrain, arXiv 2509.05276, section 2.2):

    Args:
        vocab_size, hidden_size, num_hidden_layers, intermediate_size: sizes, as in Llama and Qwen2.
        num_attention_heads: query heads.
        num_key_value_heads: groups that share one key, value and gate; None means one per query head.
        hidden_act: activation of the gated FFN; "swish" is SiLU.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary embedding of softmax layers, 1000000 by default. GLA layers have no
            rotary embedding unless linear_rotary says so.
        sliding_window: tokens before the current one that a softmax layer sees, as the published default
            code computes it (flash-attention's window_size = (sliding_window, 0)); None means all (full
            attention), and leaving it out 4096. The published SDPA variant and cache see one token less.
        attn_layers: 0-based indices of the softmax layers; all others are GLA. None means the odd layers.
        max_position_embeddings: longest text the model was trained on; nothing is allocated from it.
        attention_dropout: dropout on softmax attention weights while training.
        initializer_range: standard deviation of randomly initialised matrices.
        attn_mode, fuse_cross_entropy, conv_size: kernel choices of the published class; carried along,
            without effect on results.
        use_short_conv, elementwise_affine: must keep the published values (False, True); anything else is
            refused.

    Optional keys:

    Args:
        head_dim: key, query and value size of a head; None means hidden_size // num_attention_heads.
        attention_window: tokens that a softmax layer sees, the current one included: sliding_window + 1,
            which is what None means. Either may be left out, but they must not contradict each other.
        attention_bias: whether q, k and v projections have a bias that is trained (Qwen2: yes; Llama, Qwen3:
            no). If not, zeros are stored, for classes that always have one.
        qk_norm: RMSNorm over head_dim on queries and keys of every layer, before rotary embedding or ReLU
            (Qwen3).
        linear_qk_norm: the same in GLA layers only.
        linear_num_key_value_heads: groups of GLA layers, each with a key, value and gate; None means
            num_key_value_heads.
        linear_gate: "low_rank"; "full_rank": one matrix, gk_proj.{weight, bias}; or "fixed": one decay a
            group that is stored and not trained.
        linear_output_gate: whether normed heads of GLA layers are multiplied by swish(g_proj(x)).
        linear_rotary: whether GLA layers turn the features of queries and keys by rotary positions, too.
        full_attention_layers: those of `attn_layers` that ignore `sliding_window`; None means none.
        rope_parameters: None, or scaling of rotary positions as transformers writes it ({"rope_type":
            "yarn", "factor": ..., "original_max_position_embeddings": ...}; linear, dynamic, yarn, llama3
            and longrope), with or without rope_theta.
        rope_scaling: the same under its older name; read, but not written.
        gate_low_rank_dim: rank of the gate projection.
        gate_logit_normalizer: log gate = logsigmoid(gate logit) / gate_logit_normalizer.
        spiking: None, or where spikes are, as check_spiking says.
        quantization_config: None, or INT8 weights, keys and values, as quantization_w8aspike.py has them.
        w8aspike: the published W8ASpike layout, as stored_scales_w8aspike.py has it; None has none. The
            published class does not look at it.

    Raises:
        ValueError: a setting that contradicts another one or that this code does not compute; the message
            names it.
    """

    model_type = "gla_swa"
    keys_to_ignore_at_inference = ["past_key_values"]
    # transformers 5 turns this name into a property over `rope_parameters`; here it is the plain config
    # key it has always been.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        intermediate_size: int = 18944,
        hidden_act: str = "swish",
        norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        sliding_window: int | EllipsisType | None = ...,
        attn_layers: list[int] | None = None,
        max_position_embeddings: int = 131072,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        attn_mode: str = "chunk",
        use_short_conv: bool = False,
        conv_size: int = 4,
        elementwise_affine: bool = True,
        fuse_cross_entropy: bool = True,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        head_dim: int | None = None,
        attention_window: int | None = None,
        attention_bias: bool = True,
        qk_norm: bool = False,
        linear_qk_norm: bool = False,
        linear_rotary: bool = False,
        linear_num_key_value_heads: int | None = None,
        linear_output_gate: bool = False,
        linear_gate: str = "low_rank",
        full_attention_layers: list[int] | None = None,
        rope_scaling: dict | None = None,
        rope_parameters: dict | None = None,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16,
        spiking: dict | None = None,
        quantization_config: dict | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm_eps = norm_eps
        self.rope_scaling, self.rope_theta = rope_settings(rope_scaling, rope_parameters, rope_theta)
        self.sliding_window, self.attention_window = _windows(sliding_window, attention_window)
        self.attn_layers = (
            list(range(1, num_hidden_layers, 2)) if attn_layers is None else sorted(attn_layers)
        )
        self.max_position_embeddings = max_position_embeddings
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.attn_mode = attn_mode
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.elementwise_affine = elementwise_affine
        self.fuse_cross_entropy = fuse_cross_entropy
        self.use_cache = use_cache

        if head_dim is None and hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads}: "
                "set head_dim."
            )
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.linear_qk_norm = linear_qk_norm
        self.linear_rotary = linear_rotary
        self.linear_output_gate = linear_output_gate
        self.linear_gate = linear_gate
        self.linear_num_key_value_heads = (
            self.num_key_value_heads if linear_num_key_value_heads is None else linear_num_key_value_heads
        )
        self.full_attention_layers = sorted(full_attention_layers or [])
        self.gate_low_rank_dim = gate_low_rank_dim
        self.gate_logit_normalizer = gate_logit_normalizer
        self.spiking = spiking
        check_spiking(spiking)
        # Under its own name transformers would look for a quantiser of its own.
        self.w8aspike = kwargs.pop("w8aspike", None) or quantization_config
        self._validate(kwargs)
        if not (hasattr(PretrainedConfig, "dtype") or hasattr(PretrainedConfig, "torch_dtype")):
            # transformers before 4.56 would carry a dtype along that says nothing about its own torch_dtype.
            dtype = kwargs.pop("dtype", None)
            kwargs.setdefault("torch_dtype", dtype)

        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def check_windows(self) -> None:
        """Raises ValueError where `sliding_window` and `attention_window` contradict each other.

        `from_pretrained(folder, sliding_window=...)` sets one of them after the configuration was made.
        """
        if (self.sliding_window, self.attention_window) != _windows(
            self.sliding_window, self.attention_window
        ):
            raise ValueError(
                f"attention_window is null, but sliding_window {self.sliding_window}: set attention_window "
                f"to sliding_window + 1."
            )

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, which sets `kwargs` after the configuration was made."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).check_windows()
        return made

    def mixer_type(self, layer_idx: int) -> str:
        """The mixer of layer `layer_idx` (0-based): "gla", "swa" or "full"."""
        if layer_idx not in self.attn_layers:
            return "gla"
        if self.sliding_window is None or layer_idx in self.full_attention_layers:
            return "full"
        return "swa"

    def rotary_positions(self) -> RotaryPositions:
        """How tokens are turned. Raises ValueError where scaling is not supported or incomplete."""
        return RotaryPositions(
            self.head_dim, self.rope_theta, self.rope_scaling, self.max_position_embeddings
        )

    def to_dict(self) -> dict:
        """The keys of config.json, with rotary scaling under the name that plain configurations read, too."""
        values = super().to_dict()
        if (values.get("w8aspike") or {}).get("layout") != "published":
            w8aspike = values.pop("w8aspike", None)
            if w8aspike:
                values["quantization_config"] = w8aspike
        scaling = values.pop("rope_scaling", None)
        if scaling:
            values["rope_parameters"] = {**scaling, "rope_theta": self.rope_theta}
        return values

    def _validate(self, other_keys: dict) -> None:
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.num_attention_heads % self.linear_num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"linear_num_key_value_heads {self.linear_num_key_value_heads}."
            )
        if self.linear_gate not in ("low_rank", "full_rank", "fixed"):
            raise ValueError(
                f'linear_gate must be "low_rank", "full_rank" or "fixed", got "{self.linear_gate}".'
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}.")
        unknown = [i for i in self.attn_layers if not 0 <= i < self.num_hidden_layers]
        if unknown:
            raise ValueError(
                f"attn_layers names layers {unknown}, but there are {self.num_hidden_layers} layers."
            )
        stray = sorted(set(self.full_attention_layers) - set(self.attn_layers))
        if stray:
            raise ValueError(f"full_attention_layers {stray} must also be listed in attn_layers.")
        if self.use_short_conv:
            raise ValueError(
                "use_short_conv must be false: short convolutions are not part of SpikingBrain-7B."
            )
        if not self.elementwise_affine:
            raise ValueError("elementwise_affine must be true: g_norm always has a weight.")
        if "quant_weight_group_size" in other_keys:
            raise ValueError(
                "quant_weight_group_size marks a W8ASpike checkpoint; this class computes plain ones."
            )
        self.rotary_positions()


_PROJECTIONS = ("qkv", "gate", "attention_output", "mlp_fc1", "mlp_fc2")


def check_spiking(spiking: dict | None) -> None:
    """Hold the key `spiking` to what this code computes.

    Args:
        spiking: None, or {"projections": [...], "k": ..., "gate_encoding": "once" or "each_matrix"}: which
            projections ("qkv", "gate", "attention_output", "mlp_fc1", "mlp_fc2") read spikes, how many an
            average channel has, and whether both matrices of the gate read them. With "queries": true those
            of softmax layers are spikes, too. In front of INT8 weights spikes stand in `quantization_config`.

    Raises:
        ValueError: it asks for other spikes.
    """
    if not spiking:
        return
    unknown = set(spiking) - {"projections", "k", "gate_encoding", "queries"}
    strangers = set(spiking.get("projections", ())) - set(_PROJECTIONS)
    k = spiking.get("k", 0)
    if unknown or strangers:
        raise ValueError(f"spiking knows no {', '.join(sorted(unknown | strangers))}.")
    if not (spiking.get("projections") or spiking.get("queries")) or not k > 0:
        raise ValueError(f'spiking needs "projections" and a "k" above 0, got {spiking}.')
    if spiking.get("gate_encoding", "once") not in ("once", "each_matrix"):
        raise ValueError(f'gate_encoding of spiking is "once" or "each_matrix", got {spiking}.')


def _windows(
    sliding_window: int | EllipsisType | None, attention_window: int | None
) -> tuple[int | None, int | None]:
    """The published key (... where it is left out) and the number of tokens that a query sees.

    One of them may follow from the other.
    """
    if attention_window is not None:
        if attention_window < 1:
            raise ValueError(f"attention_window must be at least 1, got {attention_window}.")
        if sliding_window not in (..., attention_window - 1):
            shown = "null (full attention)" if sliding_window is None else sliding_window
            raise ValueError(
                f"sliding_window {shown} contradicts attention_window {attention_window}: change both, or "
                f"leave one out; it is attention_window - 1."
            )
        return attention_window - 1, attention_window
    if isinstance(sliding_window, EllipsisType):
        sliding_window = DEFAULT_SLIDING_WINDOW
    if sliding_window is None:
        return None, None
    if sliding_window < 1:
        raise ValueError(
            f"sliding_window must be at least 1, or null for full attention; got {sliding_window}."
        )
    return sliding_window, sliding_window + 1


def rope_settings(
    rope_scaling: dict | None,
    rope_parameters: dict | None,
    rope_theta: float | None,
    default: float = DEFAULT_ROPE_THETA,
) -> tuple[dict | None, float]:
    """Scaling without its base (None if there is none), and the base (`default` if none is named)."""
    scaling = dict(rope_parameters or rope_scaling or {})
    base = scaling.pop("rope_theta", rope_theta)
    if rope_theta not in (None, base):
        raise ValueError(f"rope_theta {rope_theta} contradicts rope_theta {base} in rope_parameters.")
    return scaling or None, default if base is None else base


# save_pretrained then copies this file and names it in config.json, also in a folder saved after training.
GLAswaConfig.register_for_auto_class()

__all__ = ["GLAswaConfig"]
