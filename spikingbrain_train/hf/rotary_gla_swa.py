"""Rotary positions and their scaling, as transformers computes them (`rope_parameters` of a config.json).

Part of the modelling code of a checkpoint (see modeling_gla_swa.py); needs torch only.

Two kinds of scaling, "dynamic" and "longrope", depend on the length of a text. Every text of a batch, and
every document of a packed row, has the length of its own; transformers takes the longest of the batch for
all. In cached generation a new token is turned by the length up to it, and what is cached stays as it was.

Letters: B batch, T tokens, H heads, K head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class RotaryPositions:
    """Angles of tokens, and what turned queries and keys of softmax attention are multiplied by.

    Args:
        head_dim: K, even.
        rope_theta: base of the frequencies.
        rope_scaling: settings as in transformers, without the base; None is no scaling.
        max_position_embeddings: what transformers takes for the original context where there is no other.
    """

    def __init__(
        self, head_dim: int, rope_theta: float, rope_scaling: dict | None, max_position_embeddings: int
    ) -> None:
        scaling = dict(rope_scaling or {})
        self.kind = scaling.get("rope_type", scaling.get("type", "default"))
        if self.kind not in ROPE_TYPES:
            raise ValueError(f'rope_type "{self.kind}" is not supported; use one of {", ".join(ROPE_TYPES)}.')
        self.head_dim = head_dim
        self.base = rope_theta
        self.scaling = scaling
        self.original = max_position_embeddings
        if self.kind != "dynamic":
            self.original = scaling.get("original_max_position_embeddings") or max_position_embeddings
        self.factor: float = scaling.get("factor") or max_position_embeddings / self.original
        needed = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
            "longrope": ("short_factor", "long_factor"),
        }
        missing = [name for name in needed.get(self.kind, ()) if scaling.get(name) is None]
        if missing:
            raise ValueError(f'rope_parameters of type "{self.kind}" need {" and ".join(missing)}.')
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            if len(scaling[name]) != head_dim // 2:
                raise ValueError(
                    f"rope_parameters: {name} must list {head_dim // 2} factors, got {len(scaling[name])}."
                )

    @property
    def depends_on_length(self) -> bool:
        """Whether :meth:`frequencies` needs to know how long texts are."""
        return self.kind in ("dynamic", "longrope")

    @property
    def attention_factor(self) -> float:
        """What turned queries and keys are multiplied by, each: 1 but for YaRN and LongRoPE."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.scaling.get("attention_factor") is not None:
            return self.scaling["attention_factor"]
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0
        own, of_all = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        if own and of_all:
            return self._magnitude(own) / self._magnitude(of_all)
        return self._magnitude(1.0)

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, device: torch.device, length_BT: Tensor | None = None) -> Tensor:
        """Angle per token of each rotated pair, float32.

        Args:
            device: where to compute them.
            length_BT: [B or 1, T or 1] tokens of the text of each token; None is a short text.

        Returns:
            [K / 2], or [B or 1, T or 1, K / 2] where it depends on a given length.
        """
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        frequency = 1.0 / (self.base**exponent)
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "yarn":
            kept = 1 - self._yarn_ramp(device)
            return frequency / self.factor * (1 - kept) + frequency * kept
        if self.kind == "llama3":
            low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
            turns = self.original * frequency / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return frequency * (kept + (1.0 - kept) / self.factor)
        if self.kind == "longrope":
            short, long = (
                frequency / torch.tensor(self.scaling[name], dtype=torch.float32, device=device)
                for name in ("short_factor", "long_factor")
            )
            if length_BT is None:
                return short
            return torch.where(length_BT[..., None] > self.original, long, short)
        if self.kind == "dynamic" and length_BT is not None:
            length = length_BT[..., None].clamp(min=self.original).to(torch.float32)
            stretch = self.factor * length / self.original - (self.factor - 1)
            return 1.0 / (self.base * stretch ** (self.head_dim / (self.head_dim - 2))) ** exponent
        return frequency

    def _yarn_ramp(self, device: torch.device) -> Tensor:
        """0 for channels that are left alone, 1 for those that are scaled in full: [K / 2]."""

        def channel(turns: float) -> float:
            return self.head_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low = channel(self.scaling.get("beta_fast") or 32)
        high = channel(self.scaling.get("beta_slow") or 1)
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        channels = torch.arange(self.head_dim // 2, dtype=torch.float32, device=device)
        return ((channels - low) / (high - low)).clamp(0.0, 1.0)

    def cos_sin(
        self, position_ids: Tensor, dtype: torch.dtype, length_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, K] in `dtype`, of float32 angles as in Llama.

        Args:
            position_ids: [B or 1, T] position of each token in its text.
            dtype: of the result.
            length_BT: see :meth:`frequencies`.
        """
        frequency = self.frequencies(position_ids.device, length_BT)
        angle = position_ids[..., None].to(torch.float32) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def text_lengths(
    position_ids: Tensor, valid_BT: Tensor | None = None, document_BT: Tensor | None = None
) -> Tensor:
    """Tokens of the text of each token, as far as it has been read, from positions: [B, T or 1] int64.

    Args:
        position_ids: [B or 1, T] position of each token in its text.
        valid_BT: [B, T] bool, False where a token is padding, which does not count.
        document_BT: [B or 1, T] number of the document of each token in its row; None is one text a row.
    """
    length = position_ids + 1
    if valid_BT is not None:
        length = torch.where(valid_BT, length, 1)
    if document_BT is None:
        return length.amax(-1, keepdim=True)
    length, document_BT = torch.broadcast_tensors(length, document_BT)
    longest = torch.ones_like(length).scatter_reduce(-1, document_BT, length, "amax")
    return longest.gather(-1, document_BT)


def apply_rotary(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2), as Llama and Qwen2 do."""
    first, second = x_BHTK.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return x_BHTK * cos_BTK.unsqueeze(1) + rotated * sin_BTK.unsqueeze(1)
