"""How large what the source computes is, layer by layer, estimated without data.

A parallel hybrid layer normalises the output of each branch (SpikingBrain, arXiv 2509.05276, eq. 6), and the
weight of that norm has to give back the size that the source's residual stream expects. Matrix norms miss it
by factors of 2 to 10, different in every layer, because attention averages over tokens. A few hundred tokens
that run through the source's layers find it; drawn from the vocabulary they serve nearly as well as real text
(docs/parallel_hybrid.md has the comparison). New sub-norms begin at sizes of the same tokens, too
(sub_norm_start.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.rotary import softmax_scale
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.rope_scaling import RopeType
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.sub_norm_start import nearest_size
from spikingbrain_train.conversion.vocabulary import draw_tokens
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.ops.gated_activation import gated_relu
from spikingbrain_train.ops.rotary import scaled_frequencies
from spikingbrain_train.ops.seeds import generator

SEQUENCES, LENGTH = 4, 64


class AttentionScale:
    """Runs a dense source on random tokens, as far as it is asked for and no further.

    Holds the hidden states of SEQUENCES x LENGTH tokens and one weight at a time, in float32.

    Args:
        source: a dense checkpoint.
        seed: seed of the tokens.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.scales: list[float] = []
        """Of the layers so far. Set from outside, to those of an earlier call with the same source and seed,
        they are not computed again."""
        self._hidden_BTD: Tensor | None = None
        self._sub_norms: dict[tuple[str, int], Tensor] = {}

    def of_layer(self, layer: int) -> float:
        """Geometric mean over tokens of the root mean square of one layer's attention output.

        The geometric mean keeps the few tokens with outputs many times larger than all others from deciding.
        """
        while len(self.scales) <= layer:
            self.scales.append(self._next_layer(len(self.scales)))
        return self.scales[layer]

    @torch.no_grad()
    def sub_norm(self, role: str, layer: int) -> Tensor:
        """[]: the weight with which a norm in front of a projection changes what it reads least.

        Args:
            role: ``attn_sub_norm`` or ``ffn_sub_norm``, which the source has not.
            layer: of the source.
        """
        if (role, layer) not in self._sub_norms:
            self.of_layer(layer)
        if (role, layer) not in self._sub_norms:  # the feed-forward of the last layer so far
            self._feed_forward(layer)
        return self._sub_norms[role, layer]

    @torch.no_grad()
    def _next_layer(self, layer: int) -> float:
        if self._hidden_BTD is None:
            self._hidden_BTD = self.source.read("embedding")[self._tokens()].float()
        elif layer > 0:
            self._hidden_BTD = self._hidden_BTD + self._feed_forward(layer - 1)
        output_BTD = self._attention(layer)
        self._hidden_BTD = self._hidden_BTD + output_BTD
        size_BT = output_BTD.pow(2).mean(dim=-1).sqrt()
        return size_BT.clamp(min=torch.finfo(torch.float32).tiny).log().mean().exp().item()

    def _tokens(self) -> Tensor:
        random = generator(self.seed, "tokens of the attention scale")
        tokens = draw_tokens(self.source.model.vocab_size, SEQUENCES * LENGTH, random, distinct=False)
        return tokens.view(SEQUENCES, LENGTH)

    def _project(self, x: Tensor, role: str, layer: int, bias: str | None = None) -> Tensor:
        values = None if bias is None else self.source.read(bias, layer).float()
        return linear(x, self.source.read(role, layer).float(), values)

    def _norm(self, x: Tensor, role: str, layer: int) -> Tensor:
        weight = self.source.read(role, layer).float()
        return rms_norm(x, weight.shape, weight, self.source.model.norm_epsilon)

    def _attention(self, layer: int) -> Tensor:
        model = self.source.model
        assert self._hidden_BTD is not None
        x_BTD = self._norm(self._hidden_BTD, "input_norm", layer)
        heads = []
        for letter in "qkv":
            bias = f"{letter}_bias" if model.add_qkv_bias else None
            projected = self._project(x_BTD, f"{letter}_weight", layer, bias)
            x_BHTK = projected.unflatten(-1, (-1, model.kv_channels)).transpose(1, 2)
            if model.qk_layernorm and letter != "v":
                x_BHTK = self._norm(x_BHTK, f"{letter}_norm", layer)
            heads.append(x_BHTK if letter == "v" else self._rotate(x_BHTK))
        q_BHTK, k_BGTK, v_BGTK = heads
        repeats = model.num_attention_heads // model.num_query_groups
        k_BHTK, v_BHTK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTK, v_BGTK))
        o_BHTK = scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=softmax_scale(model)
        )
        bias = "o_bias" if model.add_output_bias else None
        o_BTD = o_BHTK.transpose(1, 2).flatten(2)
        self._sub_norms["attn_sub_norm", layer] = nearest_size(o_BTD, model.norm_epsilon)
        if model.attn_sub_norm:
            o_BTD = self._norm(o_BTD, "attn_sub_norm", layer)
        return self._project(o_BTD, "o_weight", layer, bias)

    def _rotate(self, x_BHTK: Tensor) -> Tensor:
        """Rotary positions. Llama-3's scaling is left out: it slows down turns longer than these tokens."""
        half, scaling = x_BHTK.shape[-1] // 2, self.source.model.rope_scaling
        frequencies = self.source.model.rotary_base ** (-torch.arange(half) / half)
        if scaling.rope_type is not RopeType.llama3:
            frequencies = scaled_frequencies(frequencies, self.source.model.rotary_base, scaling, LENGTH)
        angles_TK = torch.outer(torch.arange(x_BHTK.shape[-2]).float(), frequencies).repeat(1, 2)
        turned = torch.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
        return x_BHTK * angles_TK.cos() + turned * angles_TK.sin()

    def _feed_forward(self, layer: int) -> Tensor:
        assert self._hidden_BTD is not None
        if layers(self.source.model)[layer].feed_forward.routes_tokens:
            raise ConfigurationError(
                "layers of several branches and new sub-norms begin at sizes that the source has, which are "
                "measured through dense feed-forwards, and this source has experts; give each layer one "
                "mixer, and leave attn_sub_norm at null"
            )
        x_BTD = self._norm(self._hidden_BTD, "mlp_norm", layer)
        gate, up, down = (
            f"mlp_{name}_bias" if self.source.model.add_mlp_bias else None for name in ("gate", "up", "down")
        )
        gate_BTF = self._project(x_BTD, "mlp_gate_weight", layer, gate)
        up_BTF = self._project(x_BTD, "mlp_up_weight", layer, up)
        product_BTF = self._product(gate_BTF, up_BTF)
        epsilon = self.source.model.norm_epsilon
        self._sub_norms["ffn_sub_norm", layer] = nearest_size(product_BTF, epsilon)
        if self.source.model.ffn_sub_norm:
            product_BTF = self._norm(product_BTF, "ffn_sub_norm", layer)
        return self._project(product_BTF, "mlp_down_weight", layer, down)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        model = self.source.model
        if model.activation_func is ActivationFunc.silu:
            return silu(gate) * up
        func = model.activation_func
        threshold = model.fatrelu_threshold if func is ActivationFunc.fatrelu else 0.0
        gate_up = torch.cat([gate, up], dim=-1)
        return gated_relu(gate_up, threshold, squared=func is ActivationFunc.relu2)
