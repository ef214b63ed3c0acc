"""What the published W8ASpike code computes, in plain torch float32, from facts about its format.

q, k, v, output, gate and up projection and one merged gate projection read spikes (a threshold of a third of
the mean magnitude of a token) and multiply by round(w / s) * s; the down projection is used as it is. Window
layers spike queries behind rotary positions, for each head, and round keys and values to INT8.

Whole numbers on the boundary to the next go either way, by the last digit of a sum: texts are compared up to
the first token that has one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.conversion.hf_models import all_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["GLAswaForCausalLM"],
    "model_type": "gla_swa",
    "vocab_size": 101,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 6,
    "max_position_embeddings": 128,
    "attn_mode": "chunk",
    "use_short_conv": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
HEADS, GROUPS, HEAD_DIM = 2, 2, 64


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the published class."""
    hidden, ffn, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], GROUPS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        linears = {"attn.q_proj": (hidden, hidden), "attn.k_proj": (keys, hidden)}
        linears |= {"attn.v_proj": (keys, hidden), "attn.o_proj": (hidden, hidden)}
        linears |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
        linears |= {"mlp.down_proj": (hidden, ffn)}
        biases = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
        of_layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
        if layer % 2 == 0:
            linears["attn.gk_proj"] = (keys, hidden)
            biases.append("attn.gk_proj")
            of_layer["attn.g_norm.weight"] = (HEAD_DIM,)
        for name, (rows, inputs) in linears.items():
            of_layer[f"{name}.weight"] = (rows, inputs)
            of_layer[f"{name}.weight_quantizer.scales"] = (rows, inputs // 128, 1)
        of_layer |= {f"{name}.bias": linears[name][:1] for name in biases}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def write_published_folder(folder: Path) -> dict[str, Tensor]:
    """A random model, some of whose whole numbers are beyond 127. Returns its tensors."""
    generator = torch.Generator().manual_seed(26)
    tensors = {}
    for name, shape in tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if "norm" in name else 0.1 * noise
    for name, weight in list(tensors.items()):
        scales = f"{name}_quantizer.scales"
        if scales in tensors:
            largest = weight.unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True)
            share = 0.8 + 0.4 * torch.rand(largest.shape, generator=generator)
            tensors[scales] = share * largest / 127
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


class PublishedW8ASpikeModel:
    """The published class on a folder.

    Attributes:
        doubtful: [B, T], of the last texts: tokens with a whole number that rounding alone decides.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors = all_tensors(folder)
        assert {name: tuple(x.shape) for name, x in self.tensors.items()} == tensor_shapes()
        self.doubtful: Tensor | None = None
        self.window = json.loads((folder / "config.json").read_text())["sliding_window"]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, vocabulary] of ids [B, T], by the default code."""
        self.doubtful = torch.zeros(ids.shape, dtype=torch.bool)
        w, hidden = self.tensors, self.tensors["model.embeddings.weight"][ids]
        for layer in range(CONFIG["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            p = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
            a = _norm(hidden, p["attn_norm.weight"])
            mixed = self._linear_attention(a, p) if layer % 2 == 0 else self._window_attention(a, p)
            hidden = hidden + self._quantised(mixed.flatten(-2), p, "attn.o_proj")
            b = _norm(hidden, p["mlp_norm.weight"])
            inner = F.silu(self._quantised(b, p, "mlp.gate_proj")) * self._quantised(b, p, "mlp.up_proj")
            hidden = hidden + inner @ p["mlp.down_proj.weight"].T
        return _norm(hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def _window_attention(self, a: Tensor, p: dict[str, Tensor]) -> Tensor:
        q, k, v = (self._heads(a, p, name).transpose(1, 2) for name in "qkv")
        T, d = q.shape[-2:]
        angle = torch.arange(T)[:, None] * (1.0 / CONFIG["rope_theta"] ** (torch.arange(0, d, 2).float() / d))
        cos, sin = (torch.cat([f, f], dim=-1) for f in (angle.cos(), angle.sin()))

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        visible = (distance >= 0) & (distance <= self.window)
        scores = self._spiked(rotate(q)) @ self._int8(rotate(k)).transpose(-1, -2) / d**0.5
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ self._int8(v)
        return mixed.transpose(1, 2)

    def _spiked(self, x: Tensor) -> Tensor:
        threshold = (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
        return self._rounded(x / threshold) * threshold

    def _int8(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(1e-5, 1e4)
        return self._rounded(x / scale).clamp(-128, 127) * scale

    def _quantised(self, x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        weight, scales = p[f"{name}.weight"], p[f"{name}.weight_quantizer.scales"]
        rounded = ((weight.unflatten(1, (-1, 128)) / scales).round() * scales).flatten(1)
        return F.linear(self._spiked(x), rounded, p.get(f"{name}.bias"))

    def _heads(self, a: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        x = self._quantised(a, p, f"attn.{name}_proj").unflatten(-1, (-1, HEAD_DIM))
        return x.repeat_interleave(HEADS // x.shape[2], dim=2)

    def _linear_attention(self, a: Tensor, p: dict[str, Tensor]) -> Tensor:
        q, k, v = (self._heads(a, p, name) for name in "qkv")
        q, k = q.relu() * HEAD_DIM**-0.5, k.relu()
        gate = (F.logsigmoid(self._quantised(a, p, "attn.gk_proj")) / 16).exp().unflatten(-1, (-1, HEAD_DIM))
        gate = gate.repeat_interleave(HEADS // gate.shape[2], dim=2)
        state = torch.zeros(*q[:, 0].shape, HEAD_DIM)
        outputs = []
        for t in range(a.shape[1]):
            state = state * gate[:, t].unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
        return _norm(torch.stack(outputs, dim=1), p["attn.g_norm.weight"])

    def _rounded(self, x: Tensor) -> Tensor:
        """Of [B, T, width], or [B, heads, T, width]."""
        margin = 2e-7 * x.abs().amax(-1, keepdim=True) + 5e-7
        near = ((x - x.floor() - 0.5).abs() <= margin).any(-1)
        assert self.doubtful is not None
        self.doubtful |= near if near.dim() == 2 else near.any(1)
        return x.round()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["norm_eps"]) * weight
