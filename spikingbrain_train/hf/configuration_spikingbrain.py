"""Configuration of every form that SpikingBrain models are trained in (``model_type: "spikingbrain"``).

Part of the modelling code of a checkpoint (see modeling_spikingbrain.py); needs torch and transformers only.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from .configuration_gla_swa import check_spiking, rope_settings
from .rotary_gla_swa import RotaryPositions


class SpikingBrainConfig(PretrainedConfig):
    """Sizes of a decoder, and of what each of its layers is made (SpikingBrain, arXiv 2509.05276, section 2).

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            intermediate_size, hidden_act, rms_norm_eps, max_position_embeddings, initializer_range,
            attention_dropout, tie_word_embeddings: as in Llama and Qwen3; hidden_act may be "fatrelu".
        hidden_act_param: threshold of "fatrelu": x where it is at least that, else 0.
        skip_zeros: whether feed-forwards whose gate has zeros compute few tokens on a CPU without the weights
            that meet them (zeros_sparsellama.py).
        attention_bias: whether q, k and v projections have a bias (Qwen2).
        output_bias: whether output projections of mixers have a bias (Llama and Qwen3 with their
            attention_bias).
        mlp_bias: whether the projections of SwiGLUs have biases; experts have none.
        attn_sub_norm, ffn_sub_norm: whether an RMSNorm stands in front of the output projections of
            attention, and of the down projections of SwiGLUs (BitNet b1.58, arXiv 2504.12285).
        qk_norm: RMSNorm over head_dim on queries and keys of every mixer (Qwen3).
        mixers: the mixers of each layer, a list of kinds ("linear_attention", "sliding_attention",
            "full_attention" and those that other files beside this one bring) that read the same input. Of
            several the layer adds up their normed outputs times `branch_weights`.
        feed_forwards: the feed-forward of each layer, "mlp" (SwiGLU), "moe" (experts) or another file's.
        sliding_window: tokens that sliding attention sees, the current one included.
        linear_attention: settings of gated linear attention. `feature_map` ("relu" or "sigmoid"), `gate`
            ("low_rank"; "full_rank", one matrix; "tied", which is 1 - k; or "fixed", one stored decay a
            group), `gate_low_rank_dim`,
            `gate_logit_normalizer`, `qk_norm` (where the model has none elsewhere), `num_key_value_heads`
            (None: the model's), `rotary` (positions on the features), `output_gate`.
        moe: `num_experts`, `num_experts_per_tok`, `num_shared_experts` (one SwiGLU of so many widths, for
            all tokens), `moe_intermediate_size` (of one expert; None: intermediate_size). Probabilities are
            the softmax over all experts, made to add up to 1 for the chosen ones if `norm_topk_prob`, and
            weights of the chosen ones are 1 instead if `router_weights` is "ones". The router has a hidden
            layer of tanh if `router_hidden_size` is a number, and a bias of each expert if `router_bias`.
        kinds: settings of other kinds, by the kind's name.
        linear_transforms: what is done to inputs and weights of linears, as linears_spikingbrain.py has it.
        num_sink_tokens: learnable tokens in front of every text, seen by all of it.
        spiking: None, or where spikes are, as check_spiking (configuration_gla_swa.py) says.
        quantization_config: None, or INT8 weights, keys and values, as quantization_w8aspike.py has them.
        rope_parameters: rotary base and frequency scaling, as transformers 5 writes them
            ({"rope_type": "default", "rope_theta": 10000.0}).
        rope_theta, rope_scaling: the same as transformers 4 writes it; read, but not written.

    What belongs to a kind is checked where a model is made, since the kind's file knows it.

    Raises:
        ValueError: a setting that contradicts another one or that this code does not compute; the message
            names it.
    """

    model_type = "spikingbrain"
    skip_zeros = True
    keys_to_ignore_at_inference = ["past_key_values"]
    # transformers 5 turns this name into a property over `rope_parameters`.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = None,
        intermediate_size: int = 18944,
        hidden_act: str = "silu",
        hidden_act_param: float | None = None,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 131072,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        attention_bias: bool = False,
        output_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        attn_sub_norm: bool = False,
        ffn_sub_norm: bool = False,
        mixers: list[list[str]] | None = None,
        feed_forwards: list[str] | None = None,
        sliding_window: int = 4096,
        linear_attention: dict | None = None,
        moe: dict | None = None,
        kinds: dict | None = None,
        linear_transforms: list[dict] | None = None,
        num_sink_tokens: int = 0,
        spiking: dict | None = None,
        quantization_config: dict | None = None,
        rope_parameters: dict | None = None,
        rope_theta: float | None = None,
        rope_scaling: dict | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_act_param = hidden_act_param
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.output_bias = output_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.attn_sub_norm = attn_sub_norm
        self.ffn_sub_norm = ffn_sub_norm
        alternating = [["linear_attention"], ["sliding_attention"]]
        self.mixers = [alternating[i % 2] for i in range(num_hidden_layers)] if mixers is None else mixers
        self.feed_forwards = ["mlp"] * num_hidden_layers if feed_forwards is None else feed_forwards
        self.sliding_window = sliding_window
        self.linear_attention = linear_attention or {}
        self.moe = moe or {}
        self.kinds = kinds or {}
        self.linear_transforms = linear_transforms or []
        self.num_sink_tokens = num_sink_tokens
        self.spiking = spiking
        # Under its own name transformers would look for a quantiser of its own.
        self.w8aspike = kwargs.pop("w8aspike", None) or quantization_config
        self.rope_scaling, self.rope_theta = rope_settings(
            rope_scaling, rope_parameters, rope_theta, default=10000.0
        )
        self.use_cache = use_cache
        self._validate()
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

    def rotary_positions(self) -> RotaryPositions:
        """How tokens are turned. Raises ValueError where scaling is not supported or incomplete."""
        return RotaryPositions(
            self.head_dim, self.rope_theta, self.rope_scaling, self.max_position_embeddings
        )

    def to_dict(self) -> dict:
        """The keys of config.json, with rotary settings under the name that plain configurations read."""
        values = super().to_dict()
        w8aspike = values.pop("w8aspike", None)
        if w8aspike:
            values["quantization_config"] = w8aspike
        for key in ("kinds", "linear_transforms"):
            if not values.get(key):
                values.pop(key, None)
        if values.get("hidden_act_param") is None:
            values.pop("hidden_act_param", None)
        scaling = values.pop("rope_scaling", None)
        theta = values.pop("rope_theta", self.rope_theta)
        values["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
        return values

    def _validate(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups != 0:
            raise ValueError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {groups}."
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}.")
        if self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}.")
        if (self.hidden_act == "fatrelu") != (self.hidden_act_param is not None):
            raise ValueError(
                f'hidden_act "{self.hidden_act}" with hidden_act_param {self.hidden_act_param}: it is the '
                f'threshold of "fatrelu", which needs it.'
            )
        if self.hidden_act_param is not None and not self.hidden_act_param >= 0:
            raise ValueError(f"hidden_act_param must be at least 0, got {self.hidden_act_param}.")
        _check_layers("mixers", self.mixers, self.num_hidden_layers)
        _check_layers("feed_forwards", self.feed_forwards, self.num_hidden_layers)
        for branches in self.mixers:
            if not branches or len(set(branches)) < len(branches):
                raise ValueError(f"mixers lists {branches} for a layer: name each of its mixers once.")
        quantized = set((self.w8aspike or {}).get("linears", ()))
        for entry in self.linear_transforms:
            matrices = [names for of_kind in entry["linears"].values() for names in of_kind]
            both = sorted(quantized & {name for names in matrices for name in names})
            if both:
                raise ValueError(
                    f"{both[0]} has INT8 weights by quantization_config and {entry['name']} by "
                    f"linear_transforms: a linear has one of them."
                )
        check_spiking(self.spiking)
        self.rotary_positions()


def _check_layers(name: str, listed: list, num_layers: int) -> None:
    if len(listed) != num_layers:
        raise ValueError(f"{name} lists {len(listed)} layers, but num_hidden_layers is {num_layers}.")


# save_pretrained then copies this file and names it in config.json, also in a folder saved after training.
SpikingBrainConfig.register_for_auto_class()

__all__ = ["SpikingBrainConfig"]
