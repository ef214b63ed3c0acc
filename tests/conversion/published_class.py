"""What the published SpikingBrain-7B modelling code computes, in plain torch, from facts about its format.

It always has q/k/v biases and an output layer, takes the odd layers for window layers, derives the head
dimension, and knows no norms on q and k, no rotary scaling, one gate rank and one normalizer. What it does
not find in the file it draws. Its default code shows a query sliding_window keys and its own; its SDPA
variant counts the query's own among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conversion.hf_models import all_tensors


def published_tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published class."""
    hidden, ffn, vocabulary = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        of_layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
        for name, size in (("q", hidden), ("k", keys), ("v", keys)):
            of_layer |= {f"attn.{name}_proj.weight": (size, hidden), f"attn.{name}_proj.bias": (size,)}
        of_layer["attn.o_proj.weight"] = (hidden, hidden)
        if layer % 2 == 0:
            of_layer |= {"attn.gk_proj.0.weight": (16, hidden), "attn.gk_proj.1.weight": (keys, 16)}
            of_layer |= {"attn.gk_proj.1.bias": (keys,), "attn.g_norm.weight": (head_dim,)}
        of_layer |= {f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        of_layer["mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


class PublishedModel:
    """The published class on a folder. `drawn` are the tensors that it did not find there."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = all_tensors(folder)
        shapes = published_tensor_shapes(self.config)
        self.drawn = sorted(set(shapes) - set(stored))
        self.ignored = sorted(set(stored) - set(shapes))
        self.tensors = {name: stored.get(name, torch.randn(shape)).double() for name, shape in shapes.items()}

    @torch.no_grad()
    def logits(self, ids: Tensor, *, sdpa: bool = False) -> Tensor:
        """[B, T, vocabulary] float64 of ids [B, T]; by the default code, or by the SDPA variant."""
        w, hidden = self.tensors, self.tensors["model.embeddings.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            p = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
            a = self._norm(hidden, p["attn_norm.weight"])
            mixed = self._linear(a, p) if layer % 2 == 0 else self._window(a, p, sdpa)
            hidden = hidden + mixed.flatten(-2) @ p["attn.o_proj.weight"].T
            b = self._norm(hidden, p["mlp_norm.weight"])
            inner = F.silu(b @ p["mlp.gate_proj.weight"].T) * (b @ p["mlp.up_proj.weight"].T)
            hidden = hidden + inner @ p["mlp.down_proj.weight"].T
        return self._norm(hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["norm_eps"]) * weight

    def _heads(self, a: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        """[B, T, heads, head_dim], with keys and values repeated for the heads of their group."""
        heads = self.config["num_attention_heads"]
        x = a @ p[f"attn.{name}_proj.weight"].T + p[f"attn.{name}_proj.bias"]
        x = x.unflatten(-1, (-1, a.shape[-1] // heads))
        return x.repeat_interleave(heads // x.shape[2], dim=2)

    def _linear(self, a: Tensor, p: dict[str, Tensor]) -> Tensor:
        q, k, v = (self._heads(a, p, name) for name in "qkv")
        q, k = q.relu() * q.shape[-1] ** -0.5, k.relu()
        gate = a @ p["attn.gk_proj.0.weight"].T @ p["attn.gk_proj.1.weight"].T + p["attn.gk_proj.1.bias"]
        gate = (F.logsigmoid(gate) / 16).exp().unflatten(-1, (-1, q.shape[-1]))
        gate = gate.repeat_interleave(q.shape[2] // gate.shape[2], dim=2)
        state = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=q.dtype)
        outputs = []
        for t in range(a.shape[1]):
            state = state * gate[:, t].unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
        return self._norm(torch.stack(outputs, dim=1), p["attn.g_norm.weight"])

    def _window(self, a: Tensor, p: dict[str, Tensor], sdpa: bool) -> Tensor:
        q, k, v = (self._heads(a, p, name).transpose(1, 2) for name in "qkv")
        T, d = q.shape[-2:]
        # In float32, as in every implementation.
        angle = torch.arange(T)[:, None] * (
            1.0 / self.config["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
        )
        cos, sin = (torch.cat([f, f], dim=-1) for f in (angle.cos(), angle.sin()))

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        furthest = self.config["sliding_window"] - (1 if sdpa else 0)
        visible = (distance >= 0) & (distance <= furthest)
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / d**0.5
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2)
