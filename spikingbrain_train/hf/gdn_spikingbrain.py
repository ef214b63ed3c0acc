"""The mixer "gdn" of a `spikingbrain` model: the gated delta rule (Gated DeltaNet, arXiv 2412.06464).

Part of the modelling code of a checkpoint; its settings are `config.kinds["gdn"]`.

    q, k, v = W_q x, W_k x, W_v x        with `short_convolution` a causal convolution of each channel, with
                                         `activation` "silu" that, too
    q, k    = q / |q|, k / |k|
    log g   = -exp(A_log) softplus(a_proj(x) + dt_bias),   beta = sigmoid(b_proj(x))    one number a group
    S_t = g_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,   o_t = K^-0.5 q_t S_t
    y = o_proj(g_norm(o))                with `output_gate` o_proj(g_norm(o) * silu(g_proj(x)))

A text leaves behind the state and, of a convolution, its last inputs.

Shapes: B batch, T new tokens, H query heads, G key/value groups, R = H // G heads of a group, K key and V
value dim, D channels, W width of a convolution, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import MIXERS, Mixer, Place, StateLayer, check_known, with_defaults
from .layout_gla_swa import TokenLayout
from .mixer_settings_spikingbrain import mixer_settings
from .mixers_gla_swa import GLAswaAttention, GLAswaRMSNorm
from .quantization_w8aspike import joint_outputs

_NAME = "gdn"
_DEFAULTS: dict[str, Any] = {
    "num_query_groups": None,
    "short_convolution": 0,
    "activation": "none",
    "output_gate": False,
}
"""What settings are where config.json leaves them out."""
CHUNK_SIZE = 64

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_gate and beta [B, T, G]."""


def gated_delta_rule(
    inputs: Inputs, state_BGKV: Tensor | None, starts_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, over one token, over many in chunks, or by flash-linear-attention's kernel.

    The kernel is taken on CUDA in half precision, where it is installed.

    Args:
        inputs: q and k of length 1, log gates of any values in [-inf, 0], betas between 0 and 1.
        state_BGKV: state before the first token; None means zeros.
        starts_BT: bool, [B or 1, T], True where the state starts anew, at `state_BGKV`; None means nowhere.

    Returns:
        Outputs [B, T, H, V] in q's dtype, and the state after the last token, float32 (float64 for float64
        inputs).
    """
    q_BTHK, k_BTGK, v_BTGV, log_gate_BTG, beta_BTG = inputs
    if starts_BT is not None:
        return _documents(inputs, state_BGKV, starts_BT.expand(q_BTHK.shape[:2]))
    dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    kernel = _kernel() if q_BTHK.is_cuda and q_BTHK.dtype in (torch.float16, torch.bfloat16) else None
    if kernel is not None and q_BTHK.shape[1] > 1:
        return _by_kernel(kernel, inputs, state_BGKV)
    if state_BGKV is None:
        B, _, G, K = k_BTGK.shape
        state_BGKV = torch.zeros(B, G, K, v_BTGV.shape[-1], dtype=dtype, device=q_BTHK.device)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        run = _step if q_BTHK.shape[1] == 1 else _chunked
        q, k, v, log_gate, beta, state = (x.to(dtype) for x in (*inputs, state_BGKV))
        o_BTHV, state_BGKV = run(q, k, v, log_gate, beta, state)
    return o_BTHV.to(q_BTHK.dtype), state_BGKV


def _part(inputs: Inputs, rows: slice, tokens: slice) -> Inputs:
    q, k, v, log_gate, beta = (x[rows, tokens] for x in inputs)
    return q, k, v, log_gate, beta


def _documents(inputs: Inputs, state_BGKV: Tensor | None, starts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Each document from the state before the first."""
    T, outputs, states = starts_BT.shape[1], [], []
    for row, starts in enumerate(starts_BT.tolist()):
        bounds = [0, *(t for t in range(1, T) if starts[t]), T]
        before = None if state_BGKV is None else state_BGKV[row : row + 1]
        of_row = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            o, state = gated_delta_rule(_part(inputs, slice(row, row + 1), slice(start, end)), before)
            of_row.append(o)
        outputs.append(torch.cat(of_row, dim=1))
        states.append(state)
    return torch.cat(outputs), torch.cat(states)


def _step(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1GV: Tensor, log_gate_B1G: Tensor, beta_B1G: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: what the faded state holds under the key is replaced, by the share beta."""
    B, _, H, K = q_B1HK.shape
    G = k_B1GK.shape[2]
    q_BGRK = q_B1HK.view(B, G, H // G, K) * K**-0.5
    k_BGK, v_BGV, beta_BG = k_B1GK[:, 0], v_B1GV[:, 0], beta_B1G[:, 0]
    state = state_BGKV * log_gate_B1G[:, 0].exp()[..., None, None]
    held_BGV = (k_BGK.unsqueeze(-2) @ state).squeeze(-2)
    correction_BGV = (v_BGV - held_BGV) * beta_BG.unsqueeze(-1)
    state = state + k_BGK.unsqueeze(-1) * correction_BGV.unsqueeze(-2)
    return (q_BGRK @ state).reshape(B, 1, H, -1), state


def _chunked(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTG: Tensor, beta_BTG: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Corrections of the tokens of a chunk are the solution of one triangular system (section 3.3).

    Decays are exponentials of sums of log gates, never of differences of such sums, so that nothing overflows
    or cancels, whatever the gates.
    """
    B, T, H, K = q_BTHK.shape
    G, V = v_BTGV.shape[2:]
    C = min(CHUNK_SIZE, 1 << (T - 1).bit_length())
    N = -(-T // C)

    def chunks(x_BTGX: Tensor) -> Tensor:
        # Zeros behind the text neither write nor fade.
        x = F.pad(x_BTGX, (0, 0, 0, 0, 0, N * C - T))
        return x.reshape(B, N, C, G, -1, x.shape[-1]).permute(1, 0, 3, 4, 2, 5)

    q_NBGRCK = chunks(q_BTHK) * K**-0.5
    k, v = (chunks(x).squeeze(3) for x in (k_BTGK, v_BTGV))
    log_gate, beta = (chunks(x.unsqueeze(-1)).squeeze(3) for x in (log_gate_BTG, beta_BTG))  # [N, B, G, C, 1]

    causal_CC = torch.ones(C, C, dtype=torch.bool, device=q_BTHK.device).tril()
    behind = log_gate.expand(N, B, G, C, C).masked_fill(~causal_CC.tril(-1), 0.0)
    decay_NBGCC = behind.cumsum(-2).masked_fill(~causal_CC, -torch.inf).exp()
    from_start = log_gate.cumsum(-2).exp()

    system = (k @ k.transpose(-1, -2) * decay_NBGCC * beta).tril(-1)
    right = torch.cat([v, k * from_start], dim=-1) * beta
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([V, K], dim=-1)
    k_to_end = (k * decay_NBGCC[..., -1, :, None]).transpose(-1, -2)
    states, corrections = [], []
    for n in range(N):
        correction = u[n] - w[n] @ state_BGKV
        states.append(state_BGKV)
        corrections.append(correction)
        state_BGKV = state_BGKV * from_start[n, ..., -1:, :] + k_to_end[n] @ correction
    within = q_NBGRCK @ k.unsqueeze(3).transpose(-1, -2) * decay_NBGCC.unsqueeze(3)
    o = (q_NBGRCK * from_start.unsqueeze(3)) @ torch.stack(states).unsqueeze(3)
    o = o + within @ torch.stack(corrections).unsqueeze(3)
    return o.permute(1, 0, 4, 2, 3, 5).reshape(B, N * C, H, V)[:, :T], state_BGKV


def _by_kernel(kernel: Callable, inputs: Inputs, state_BGKV: Tensor | None) -> tuple[Tensor, Tensor]:
    """By `fla.ops.gated_delta_rule.chunk_gated_delta_rule`, which wants a key, a value and gates a head."""
    q, k, *others = inputs
    heads = q.shape[2] // k.shape[2]
    v, log_gate, beta = (x.repeat_interleave(heads, dim=2) for x in others)
    o, state = kernel(
        q,
        k.to(q.dtype).repeat_interleave(heads, dim=2),
        v.to(q.dtype),
        log_gate.clamp(min=-100.0),  # it sums them: exp(-100) is nothing, and -inf would give NaN
        beta,
        scale=q.shape[-1] ** -0.5,
        initial_state=None if state_BGKV is None else state_BGKV.repeat_interleave(heads, dim=1),
        output_final_state=True,
    )
    return o, state[:, ::heads].contiguous()


@functools.lru_cache
def _kernel() -> Callable | None:
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError:
        return None


def short_convolution(
    x_BTD: Tensor,
    weight_DW: Tensor,
    state_BSD: Tensor | None = None,
    valid_BT: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel of the last W tokens of text and of the same document, with a kernel of its own.

    Args:
        x_BTD: inputs.
        weight_DW: kernels; the last tap multiplies the token itself.
        state_BSD: the W - 1 inputs before; None means zeros.
        valid_BT: as in `TokenLayout`: padding is left out, wherever it stands.
        starts_BT: as in `TokenLayout`.

    Returns:
        [B, T, D], without meaning where padding stands, and the last W - 1 inputs.
    """
    B, T, D = x_BTD.shape
    S = weight_DW.shape[1] - 1
    inputs = torch.cat([x_BTD.new_zeros(B, S, D) if state_BSD is None else state_BSD, x_BTD], dim=1)
    document = torch.zeros(B, S + T, dtype=torch.int64, device=x_BTD.device)
    if starts_BT is not None:
        document = F.pad(starts_BT.expand(B, T).cumsum(-1), (S, 0))
    order, ends = None, torch.full((B,), S + T, device=x_BTD.device)
    if valid_BT is not None:
        valid = F.pad(valid_BT.expand(B, T), (S, 0), value=True)
        order = (~valid).long().argsort(dim=-1, stable=True)  # text in its order, padding behind it
        inputs = inputs.gather(1, order.unsqueeze(-1).expand(B, S + T, D))
        document, ends = document.gather(1, order), valid.sum(-1)
    y = inputs * weight_DW[:, S]
    for back in range(1, S + 1):
        same = (document[:, back:] == document[:, :-back]).unsqueeze(-1).to(x_BTD.dtype)
        y = y + F.pad(inputs[:, :-back] * same * weight_DW[:, S - back], (0, 0, back, 0))
    last = ends.unsqueeze(-1) - torch.arange(S, 0, -1, device=x_BTD.device)
    state = inputs.gather(1, last.unsqueeze(-1).expand(B, S, D))
    if order is not None:
        y = torch.empty_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)
    return y[:, S:], state


class ChannelKernels(nn.Module):
    """Kernels [channels, width] of a short convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.initialize(0.0)

    def initialize(self, std: float) -> None:
        """As if there were no convolution."""
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.weight[:, -1] = 1.0


class GatedDeltaRule(GLAswaAttention):
    """Of a configuration and a place, as `Mixer.make` has them."""

    def __init__(self, config: SpikingBrainConfig, place: Place) -> None:
        own = _settings(config)
        settings = mixer_settings(config, place, own["num_query_groups"])
        super().__init__(settings)
        hidden, width = settings.hidden_size, self.head_dim
        self.activation = own["activation"]
        self.has_convolution = own["short_convolution"] > 0
        if self.has_convolution:
            self.q_conv1d = ChannelKernels(self.num_heads * width, own["short_convolution"])
            self.k_conv1d, self.v_conv1d = (
                ChannelKernels(self.num_groups * width, own["short_convolution"]) for _ in range(2)
            )
        self.gate_spikes = settings.encoder("gate", 0)
        self.a_proj = nn.Linear(hidden, self.num_groups, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_groups, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.num_groups))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_groups))
        self.g_proj = nn.Linear(hidden, self.num_heads * width, bias=True) if own["output_gate"] else None
        self.g_norm = GLAswaRMSNorm(width, settings.norm_eps)

    def initialize(self, std: float) -> None:
        """Gates of about a half and of a hundred tokens."""
        nn.init.zeros_(self.A_log)
        nn.init.constant_(self.dt_bias, -5.0)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: Any
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            x_BTD: normed input.
            rotary: not used: gates and the order of corrections carry positions.
            layout: what the tokens are.
            cache: a cache of `StateLayer`, or None.
        """
        layer = None if cache is None else cache.layers[self.cache_idx]
        states: dict[str, Tensor] = {} if layer is None else layer.states
        valid_BT = layout.valid_new(x_BTD.shape[1])
        x = self.qkv_spikes(x_BTD)
        q, k, v = joint_outputs((self.q_proj, self.k_proj, self.v_proj), x)
        inputs = None
        if self.has_convolution:
            (q, k, v), inputs = self._convolved((q, k, v), states.get("inputs"), layout, valid_BT)
        if self.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in (q, k, v))
        q, k = _l2_norm(self.q_norm(q)), _l2_norm(self.k_norm(k))
        x = self.gate_spikes(x_BTD)
        log_gate, beta = self.log_gate(x), torch.sigmoid(_at_least_float32(self.b_proj(x)))
        if valid_BT is not None:
            # Padding leaves the state as it is: it replaces nothing (beta = 0) and does not fade it.
            log_gate, beta = (each.masked_fill(~valid_BT.unsqueeze(-1), 0.0) for each in (log_gate, beta))
        o_BTHV, state = self._mix((q, k, v, log_gate, beta), states.get("recurrent"), layout)
        if layer is not None:
            layer.states = {"recurrent": state} if inputs is None else {"recurrent": state, "inputs": inputs}
        o_BTD = self.g_norm(o_BTHV).flatten(-2)
        if self.g_proj is not None:
            o_BTD = o_BTD * F.silu(self.g_proj(x))
        return self.output(o_BTD)

    def log_gate(self, x_BTD: Tensor) -> Tensor:
        """Logarithm of the decay of every group, [B, T, G], in at least float32."""
        a_BTG, A_log, dt_bias = (_at_least_float32(x) for x in (self.a_proj(x_BTD), self.A_log, self.dt_bias))
        return -A_log.exp() * F.softplus(a_BTG + dt_bias)

    def _convolved(
        self,
        parts: tuple[Tensor, ...],
        state_BSD: Tensor | None,
        layout: TokenLayout,
        valid_BT: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:
        """q, k and v, and the last inputs of all. Sinks are convolved by themselves; no text sees them."""
        weight = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])
        x_BTD, front = torch.cat(parts, dim=-1), layout.num_in_front
        text, valid = x_BTD[:, front:], None if valid_BT is None else valid_BT[:, front:]
        y, inputs = short_convolution(text, weight, state_BSD, valid, layout.starts_BT)
        if front:
            y = torch.cat([short_convolution(x_BTD[:, :front], weight)[0], y], dim=1)
        return list(y.split([part.shape[-1] for part in parts], dim=-1)), inputs

    @staticmethod
    def _mix(inputs: Inputs, state: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Sinks are the beginning of a text; each of several documents starts from the state behind them."""
        front, starts_BT, rows = layout.num_in_front, layout.starts_BT, slice(None)
        if front == 0 or starts_BT is None:
            return gated_delta_rule(inputs, state, starts_BT)
        o_front, state = gated_delta_rule(_part(inputs, rows, slice(front)), state)
        o_text, state = gated_delta_rule(_part(inputs, rows, slice(front, None)), state, starts_BT)
        return torch.cat([o_front, o_text], dim=1), state


def _l2_norm(x: Tensor) -> Tensor:
    """Of length 1 over the last dim, computed in at least float32."""
    wide = _at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _settings(config: SpikingBrainConfig) -> dict[str, Any]:
    return with_defaults(f"kinds.{_NAME}", config.kinds.get(_NAME), _DEFAULTS)


def _check(config: SpikingBrainConfig) -> None:
    settings, heads = _settings(config), config.num_attention_heads
    groups = settings["num_query_groups"] or config.num_key_value_heads
    if heads % groups != 0:
        raise ValueError(
            f"num_attention_heads {heads} must be a multiple of num_query_groups of kinds.{_NAME} {groups}."
        )
    check_known(f"activation of kinds.{_NAME}", settings["activation"], ("none", "silu"))


MIXERS.register(Mixer(_NAME, GatedDeltaRule, cache_layer=lambda config: StateLayer(), check=_check))

__all__ = ["GatedDeltaRule"]
