"""The mixer "mamba" of a `spikingbrain` model, whose settings are `config.kinds["mamba"]`.

Part of the modelling code of a checkpoint; needs torch and transformers only.

    x, z = in_proj(u);  x = silu(conv1d(x));  dt, B, C = x_proj(x)        (with bc_dt_norm: RMSNorm of each)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t;  out_proj(y * silu(z))

(Mamba, arXiv 2312.00752; Falcon-Mamba, arXiv 2410.05355.) Of a text remain the last inputs of the convolution
and one state: `inputs` [B, W - 1, D] and `state` [B, D, N] in float32.

Shapes: B batch, T time, D channels, N state size, W width of the convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import MIXERS, Mixer, Place, StateLayer, with_defaults
from .layout_gla_swa import TokenLayout
from .spikes_gla_swa import encoders_of

_KEY = "mamba"
_DEFAULTS: dict[str, Any] = {
    "intermediate_size": None,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": None,
    "use_conv_bias": True,
    "use_bias": False,
    "bc_dt_norm": False,
    "mixer_rms_eps": 1e-6,
}
"""What settings are where config.json leaves them out."""
_CHUNK = 32  # tokens that are scanned side by side
_STEPS = (0.001, 0.1)  # step sizes that channels begin with, where the model is not loaded


class SpikingBrainMamba(nn.Module):
    """Of a configuration and a place, as `Mixer.make` has them."""

    def __init__(self, config: SpikingBrainConfig, place: Place) -> None:
        super().__init__()
        settings, hidden = with_defaults(_KEY, config.kinds.get(_KEY), _DEFAULTS), config.hidden_size
        self.cache_idx = place.cache_idx
        self.channels = settings["intermediate_size"] or 2 * hidden
        self.state_size = settings["state_size"]
        self.width = settings["conv_kernel"]
        self.rank = settings["time_step_rank"] or -(-hidden // 16)
        self.eps = settings["mixer_rms_eps"] if settings["bc_dt_norm"] else None
        encoder, bias = encoders_of(config.spiking), settings["use_bias"]
        self.qkv_spikes = encoder("qkv", 0)
        self.in_proj = nn.Linear(hidden, 2 * self.channels, bias=bias)
        self.conv1d = nn.Conv1d(
            self.channels,
            self.channels,
            self.width,
            groups=self.channels,
            bias=settings["use_conv_bias"],
        )
        self.x_proj = nn.Linear(self.channels, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.channels, bias=True)
        self.A_log = nn.Parameter(torch.zeros(self.channels, self.state_size))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.attention_output_spikes = encoder("attention_output", 0)
        self.out_proj = nn.Linear(self.channels, hidden, bias=bias)

    def initialize(self, std: float) -> None:
        """What transformers does not draw: as Mamba begins."""
        smallest, largest = _STEPS
        steps = smallest * (largest / smallest) ** torch.linspace(0, 1, self.channels)
        nn.init.normal_(self.conv1d.weight, std=(3 * self.width) ** -0.5)
        if self.conv1d.bias is not None:
            nn.init.zeros_(self.conv1d.bias)
        nn.init.ones_(self.D)
        _fill(self.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))
        _fill(self.A_log, torch.log(torch.arange(1, self.state_size + 1)))

    def forward(
        self, x_BTH: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: Any
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            x_BTH: normed input, [B, T, hidden_size].
            rotary: not used: the recurrence carries the order.
            layout: what the tokens are.
            cache: a `RecurrentCache`, or None.
        """
        xz = self.in_proj(self.qkv_spikes(x_BTH))
        x, z = xz.chunk(2, dim=-1)
        layer = None if cache is None else cache.layers[self.cache_idx]
        states = {} if layer is None else layer.states
        inputs, state = states.get("inputs"), states.get("state")
        if inputs is None or state is None:
            inputs = x.new_zeros(len(x), self.width - 1, self.channels)
            dtype = torch.promote_types(x.dtype, torch.float32)
            state = torch.zeros(len(x), *self.A_log.shape, dtype=dtype, device=x.device)
        valid_BT = layout.valid_new(x.shape[1])
        y, inputs, state = self._mix(x, valid_BT, inputs, state, layout)
        if layer is not None:
            layer.states = {"inputs": inputs.clone(), "state": state.clone()}  # views would keep all inputs
        return self.out_proj(self.attention_output_spikes(y * F.silu(z)))

    def _mix(
        self, x: Tensor, valid_BT: Tensor | None, inputs: Tensor, state: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks are the beginning of a text; each of several documents starts from the states behind them."""
        if layout.starts_BT is None:
            return self._read(x, valid_BT, inputs, state)
        front, rows = layout.num_in_front, []
        for row in range(len(x)):
            here = slice(row, row + 1)
            valid_T = None if valid_BT is None else valid_BT[here]
            begin, outputs = (inputs[here], state[here]), []
            if front:
                y, *behind = self._read(x[here, :front], None, *begin)
                outputs.append(y)
                begin = (behind[0], behind[1])
            starts = layout.starts_BT[row].nonzero().flatten().tolist()
            bounds = [front, *(front + start for start in starts if start > 0), x.shape[1]]
            for first, end in zip(bounds, bounds[1:], strict=False):
                valid = None if valid_T is None else valid_T[:, first:end]
                outputs.append(self._read(x[here, first:end], valid, *begin)[0])
            rows.append(torch.cat(outputs, dim=1))
        return torch.cat(rows), inputs, state  # there is no cache with several documents in a row

    def _read(
        self, x: Tensor, valid_BT: Tensor | None, inputs: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution and scan of one document a row: y [B, T, D], and both states behind it."""
        x, inputs = self._convolve(x, valid_BT, inputs)
        dt, B, C = self.x_proj(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        if self.eps is not None:
            dt, B, C = (_rms_norm(each, self.eps) for each in (dt, B, C))
        dtype = state.dtype
        dt = F.softplus(self.dt_proj(dt).to(dtype))
        if valid_BT is not None:
            dt = dt.masked_fill(~valid_BT.unsqueeze(-1), 0.0)  # padding leaves the state as it is
        A = -self.A_log.to(dtype).exp()
        y, state = selective_scan(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), state)
        return y.to(x.dtype) + x * self.D, inputs, state

    def _convolve(self, x: Tensor, valid_BT: Tensor | None, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """silu(conv1d(x)) [B, T, D] with the inputs before, and the last W - 1 inputs behind it.

        Padding is moved to the front, so that every token stands behind the tokens of text before it.
        """
        before = self.width - 1
        x, order = torch.cat([inputs, x], dim=1), None
        if valid_BT is not None:
            is_text = F.pad(valid_BT, (before, 0), value=True)
            order = is_text.long().argsort(dim=1, stable=True).unsqueeze(-1).expand(-1, -1, self.channels)
            x = x.gather(1, order)
        y = F.silu(self.conv1d(x.transpose(1, 2)).transpose(1, 2))
        if order is not None:
            # The first `before` of x have no output; in their places stand padding or earlier inputs.
            y = torch.zeros_like(x).scatter(1, order, F.pad(y, (0, 0, before, 0)))[:, before:]
        return y, x[:, x.shape[1] - before :]


def _fill(parameter: Tensor, values: Tensor) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):  # transformers 5 marks what it has loaded
        with torch.no_grad():
            parameter.copy_(values.expand_as(parameter))


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def selective_scan(
    x_BTD: Tensor, dt_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] without the skip connection, and the state behind the last token.

    A chunk of tokens at a time, by doubling: decays are only ever multiplied, never divided by.
    """
    outputs = []
    chunks = (each.split(_CHUNK, dim=1) for each in (x_BTD, dt_BTD, B_BTN, C_BTN))
    for x, dt, B, C in zip(*chunks, strict=True):
        decay = (dt.unsqueeze(-1) * A_DN).exp()
        states = (dt * x).unsqueeze(-1) * B.unsqueeze(2)
        for level in range(math.ceil(math.log2(x.shape[1]))):
            step = 1 << level
            later = states[:, step:] + decay[:, step:] * states[:, :-step]
            states = torch.cat([states[:, :step], later], dim=1)
            decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        states = states + decay * state_BDN.unsqueeze(1)
        outputs.append((states @ C.unsqueeze(-1)).squeeze(-1))
        state_BDN = states[:, -1]
    return torch.cat(outputs, dim=1), state_BDN


MIXERS.register(Mixer(_KEY, SpikingBrainMamba, cache_layer=lambda config: StateLayer()))

__all__ = ["SpikingBrainMamba", "selective_scan"]
