"""Sequence mixing as functions of tensors: gated linear attention and causal (windowed) softmax attention.

Part of the modelling code of a `gla_swa` checkpoint (see modeling_gla_swa.py); needs torch only.

Shapes: B batch, T new tokens, S keys, H query heads, G key/value groups, R = H // G heads of a group (head h
reads group h // R), K key dim, V value dim, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64
QUERY_BLOCK_SIZE = 512


def gated_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    state_BGKV: Tensor | None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention (SpikingBrain, arXiv 2509.05276, eq. 10-11).

    S_t = diag(exp(log_gate_t)) S_{t-1} + k_t^T v_t and o_t = K^-0.5 q_t S_t.

    The heads of a group share k, v and gate, so one state per group is enough. One token takes the
    recurrence; several take flash-linear-attention's kernel on CUDA in half precision, and the chunked form
    otherwise. In float32 the chunked form is kept on CUDA too: the kernel would round its products to TF32.

    Args:
        log_gate_BTGK: log decay, any values in [-inf, 0].
        state_BGKV: state before the first token; None means zeros.
        starts_BT: bool, [B or 1, T], True where the state starts anew, at `state_BGKV`; None means nowhere.

    Returns:
        Outputs [B, T, H, V] in q's dtype, and the state after the last token, float32 (float64 for float64
        inputs); where the state starts anew at another than zeros, that one.
    """
    if starts_BT is not None and state_BGKV is not None:
        o_BTHV, _ = gated_linear_attention(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, None, starts_BT)
        first = _of_first_state(q_BTHK, log_gate_BTGK, state_BGKV, starts_BT)
        return o_BTHV + first.to(o_BTHV.dtype), state_BGKV
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    if q_BTHK.shape[1] == 1:
        return recurrent_step(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, state_BGKV)
    kernel = _chunk_gla_kernel() if _half_precision_on_cuda(q_BTHK) else None
    if kernel is not None:
        return gated_linear_attention_by_kernel(
            kernel, q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, state_BGKV, starts_BT
        )
    if starts_BT is not None:
        # Nothing is left of the state before: exp(-inf) = 0.
        log_gate_BTGK = log_gate_BTGK.masked_fill(starts_BT[..., None, None], -torch.inf)
    return chunked_gated_linear_attention(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, state_BGKV)


def _of_first_state(q_BTHK: Tensor, log_gate_BTGK: Tensor, state_BGKV: Tensor, starts_BT: Tensor) -> Tensor:
    """What the state in front of its document adds to each token's output, [B, T, H, V] in the state's dtype.

    A recurrence is linear in its first state: q_t times all decays since the document began, times the state.
    Sums of log gates over documents are differences of sums over the row, in float64 so that nothing cancels.
    """
    B, T, H, K = q_BTHK.shape
    G = log_gate_BTGK.shape[2]
    sums = F.pad(log_gate_BTGK.to(torch.float64).cumsum(1), (0, 0, 0, 0, 1, 0))
    index = torch.arange(T, device=q_BTHK.device)
    first_BT = torch.where(starts_BT, index, 0).cummax(-1).values.expand(B, T)
    before = sums.gather(1, first_BT[:, :, None, None].expand(B, T, G, K))
    decay_BTGK = (sums[:, 1:] - before).exp().to(state_BGKV.dtype)
    q_BTGRK = q_BTHK.view(B, T, G, H // G, K).to(state_BGKV.dtype) * K**-0.5 * decay_BTGK.unsqueeze(3)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        return torch.einsum("btgrk,bgkv->btgrv", q_BTGRK, state_BGKV).flatten(2, 3)


def lightning_log_decays(num_groups: int, layer_idx: int, num_layers: int) -> Tensor:
    """Logarithms of Lightning attention's decays (arXiv 2501.08313), [G] float32."""
    slope = 2.0 ** (-8 * torch.arange(1, num_groups + 1) / num_groups)
    return -slope * (1 - layer_idx / max(num_layers - 1, 1) + 1e-5)


def recurrent_step(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTGK: Tensor, state_BGKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step (T = 1) of the recurrence. q is scaled already; otherwise as `gated_linear_attention`."""
    B, _, H, K = q_BTHK.shape
    G, dtype = k_BTGK.shape[2], _state_dtype(q_BTHK)
    q_BGRK = q_BTHK.view(B, G, H // G, K).to(dtype)
    k_BGK, v_BGV, log_gate_BGK = (x[:, 0].to(dtype) for x in (k_BTGK, v_BTGV, log_gate_BTGK))
    new_BGKV = k_BGK.unsqueeze(-1) * v_BGV.unsqueeze(-2)
    if state_BGKV is not None:
        new_BGKV = new_BGKV + state_BGKV * log_gate_BGK.exp().unsqueeze(-1)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        o_BGRV = q_BGRK @ new_BGKV
    return o_BGRV.reshape(B, 1, H, -1).to(q_BTHK.dtype), new_BGKV


def chunked_gated_linear_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTGK: Tensor, state_BGKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The parallel form: attention inside chunks of tokens, states between them; O(T) memory and work.

    Two tokens s <= t of a chunk interact through exp(sum of the log gates s+1 .. t). Factoring that into
    exp(+) at s and exp(-) at t overflows under strong decay. Instead, a chunk is halved again and again: for
    t in a right half and s in its left half, the sum splits at the border into one part for t and one for s,
    both <= 0. All sums are made by adding non-positive numbers, never by subtracting, so nothing overflows or
    cancels, whatever the gates.

    q is scaled already; arguments and results otherwise as `gated_linear_attention`.
    """
    B, T, H, K = q_BTHK.shape
    G, V = k_BTGK.shape[2], v_BTGV.shape[-1]
    R, dtype = H // G, _state_dtype(q_BTHK)
    C = min(CHUNK_SIZE, 1 << (T - 1).bit_length())
    N = -(-T // C)

    def chunks(x: Tensor) -> Tensor:
        # Zero q, k and v and a zero log gate after the text change neither outputs nor the final state.
        x = F.pad(x, (0, 0, 0, 0, 0, N * C - T)).to(dtype)
        return x.reshape(B, N, C, G, -1, x.shape[-1]).permute(0, 3, 1, 2, 4, 5)

    with torch.autocast(q_BTHK.device.type, enabled=False):
        q = chunks(q_BTHK)  # [B, G, N, C, R, K]
        # [B, G, N, C, K or V]
        k, v, log_gate = (chunks(x).squeeze(-2) for x in (k_BTGK, v_BTGV, log_gate_BTGK))
        scores, decay_from_start, decay_to_end, decay_total = _within_chunk(q, k, log_gate)

        update_BGNKV = (k * decay_to_end).transpose(-1, -2) @ v
        states = []
        state = torch.zeros(B, G, K, V, dtype=dtype, device=q.device) if state_BGKV is None else state_BGKV
        for n in range(N):
            states.append(state)
            state = state * decay_total[:, :, n].transpose(-1, -2) + update_BGNKV[:, :, n]
        q_decayed = (q * decay_from_start.unsqueeze(-2)).flatten(-3, -2)
        o = scores @ v + q_decayed @ torch.stack(states, dim=2)  # [B, G, N, C * R, V]
    o_BTHV = o.view(B, G, N, C, R, V).permute(0, 2, 3, 1, 4, 5).reshape(B, N * C, H, V)[:, :T]
    return o_BTHV.to(q_BTHK.dtype), state


def _within_chunk(q: Tensor, k: Tensor, log_gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and decays inside each chunk, merging blocks of m = 1, 2, 4 ... tokens into blocks of 2m.

    Args:
        q: [B, G, N, C, R, K] with C a power of two.
        k, log_gate: [B, G, N, C, K].

    Returns:
        Scores of (token, head) against token, causal: [B, G, N, C * R, C]; the decays from the chunk's start
        to each token (its own gate included) and from each token to the chunk's end: [B, G, N, C, K]; and
        over the chunk: [B, G, N, 1, K].
    """
    B, G, N, C, R, K = q.shape
    scores = (q * k.unsqueeze(-2)).sum(-1, keepdim=True)  # [..., blocks, m * R, m] with m = 1
    # Log decays within blocks of m tokens: from the block's start to each token, from each token to the
    # block's end.
    from_start, to_end = log_gate, torch.zeros_like(log_gate)
    total = log_gate
    m = 1
    while m < C:
        pairs = C // (2 * m)
        halves = (B, G, N, pairs, 2, m, K)
        left_to_end = to_end.view(halves)[..., 0, :, :]
        right_from_start = from_start.view(halves)[..., 1, :, :]
        q_right = q.view(B, G, N, pairs, 2, m, R, K)[..., 1, :, :, :] * right_from_start.exp().unsqueeze(-2)
        k_left = k.view(halves)[..., 0, :, :] * left_to_end.exp()
        across = q_right.flatten(-3, -2) @ k_left.transpose(-1, -2)
        left, right = scores.view(B, G, N, pairs, 2, m * R, m).unbind(-3)
        scores = torch.cat(
            [torch.cat([left, torch.zeros_like(across)], dim=-1), torch.cat([across, right], dim=-1)], dim=-2
        )
        total_left, total_right = total.view(B, G, N, pairs, 2, 1, K).unbind(-3)
        left_from_start, right_to_end = (
            from_start.view(halves)[..., 0, :, :],
            to_end.view(halves)[..., 1, :, :],
        )
        from_start = torch.cat([left_from_start, right_from_start + total_left], dim=-2).view_as(log_gate)
        to_end = torch.cat([left_to_end + total_right, right_to_end], dim=-2).view_as(log_gate)
        total = (total_left + total_right).view(B, G, N, pairs, K)
        m *= 2
    return scores.view(B, G, N, C * R, C), from_start.exp(), to_end.exp(), total.view(B, G, N, 1, K).exp()


def gated_linear_attention_by_kernel(
    kernel: Callable,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    state_BGKV: Tensor | None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same through a kernel with the signature of `fla.ops.gla.chunk_gla`: k, v, gate for every head.

    Documents are given to it as one row of sequences.
    """
    B, T = q_BTHK.shape[:2]
    lengths = {}
    if starts_BT is not None:
        first = F.pad(starts_BT.expand(B, T)[:, 1:], (1, 0), value=True).flatten()
        bounds = F.pad(first.nonzero().squeeze(-1), (0, 1), value=B * T)
        lengths = {"cu_seqlens": bounds}
        q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK = (
            x.reshape(1, B * T, *x.shape[2:]) for x in (q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK)
        )
    heads_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
    k, v, log_gate = (x.repeat_interleave(heads_per_group, dim=2) for x in (k_BTGK, v_BTGV, log_gate_BTGK))
    state = None if state_BGKV is None else state_BGKV.repeat_interleave(heads_per_group, dim=1)
    o_BTHV, state = kernel(
        q_BTHK,
        k.to(q_BTHK.dtype),
        v,
        log_gate.clamp(min=-100.0),  # it sums them: exp(-100) is nothing, and -inf would give NaN
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        **lengths,
    )
    if starts_BT is not None:
        ends_of_rows = T * torch.arange(1, B + 1, device=bounds.device)
        o_BTHV = o_BTHV.reshape(B, T, *o_BTHV.shape[2:])
        state = state[torch.searchsorted(bounds, ends_of_rows) - 1]
    return o_BTHV, state[:, ::heads_per_group].contiguous()


@functools.lru_cache
def _chunk_gla_kernel() -> Callable | None:
    try:
        return importlib.import_module("fla.ops.gla").chunk_gla
    except ImportError:
        return None


def _half_precision_on_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    window: int | None,
    valid_BS: Tensor | None = None,
    dropout: float = 0.0,
    text_index_BS: Tensor | None = None,
    document_BS: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention in which query t sees the last `window` keys up to its own (SpikingBrain, eq. 1-2).

    The queries are the last T of the S tokens whose keys are given. No mask larger than `QUERY_BLOCK_SIZE` x
    (window + `QUERY_BLOCK_SIZE`) is built (`QUERY_BLOCK_SIZE` x S without a window), and memory and work are
    O(T * window); padding inside the text adds to them.

    Args:
        window: keys that a query sees, its own included; None means all.
        valid_BS: bool, False where a key is padding; None means that all are text.
        dropout: probability of dropping an attention weight.
        text_index_BS: number of text tokens up to each key, its own included, where the window counts those;
            None means that it counts all keys.
        document_BS: number of each token's document, [B or 1, S]; a query sees its own document only. None
            means one document.

    Returns:
        [B, H, T, V]. Where a query sees no valid key, it attends to itself.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1], k_BGSK.shape[2]
    if T == 1 and document_BS is None and (window is None or window >= S):
        # One query sees every key: the heads of a group can stand in as queries, without repeating keys.
        mask = None if valid_BS is None else _self_visible(valid_BS[:, None, None, :], S - 1)
        if sinks is not None:
            k_BGSK, v_BGSV, mask = _with_sinks(k_BGSK, v_BGSV, mask, sinks)
        q_BGRK = q_BHTK.view(B, G, H // G, K)
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSV, mask, dropout).reshape(B, H, 1, -1)

    k_BHSK = k_BGSK.repeat_interleave(H // G, dim=1)
    v_BHSV = v_BGSV.repeat_interleave(H // G, dim=1)
    sinks_of_heads = None if sinks is None else tuple(x.repeat_interleave(H // G, dim=1) for x in sinks)
    sees_all = valid_BS is None and document_BS is None and (window is None or window >= S)
    if T == S and sees_all and sinks is None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, dropout_p=dropout, is_causal=True)

    outputs = []
    for start in range(0, T, QUERY_BLOCK_SIZE):
        stop = min(start + QUERY_BLOCK_SIZE, T)
        first = S - T + start  # index among the keys of the block's first query
        low = 0 if window is None else max(0, first - window + 1)
        if window is not None and text_index_BS is not None:
            out_of_sight = text_index_BS <= text_index_BS[:, first : first + 1] - window
            low = int(out_of_sight.sum(-1).min())
        high = S - T + stop
        query = torch.arange(first, high, device=q_BHTK.device)[:, None]
        key = torch.arange(low, high, device=q_BHTK.device)[None, :]
        mask = key <= query
        if window is not None and text_index_BS is not None:
            query_index, key_index = text_index_BS[:, first:high], text_index_BS[:, low:high]
            mask = mask & (key_index[:, None, None, :] > query_index[:, None, :, None] - window)
        elif window is not None:
            mask = mask & (key > query - window)
        if document_BS is not None:
            query_document, key_document = document_BS[:, first:high], document_BS[:, low:high]
            mask = mask & (key_document[:, None, None, :] == query_document[:, None, :, None])
        if valid_BS is not None:
            mask = (mask & valid_BS[:, None, None, low:high]) | (key == query)
        k, v = k_BHSK[:, :, low:high], v_BHSV[:, :, low:high]
        if sinks_of_heads is not None:
            k, v, mask = _with_sinks(k, v, mask, sinks_of_heads)
        outputs.append(F.scaled_dot_product_attention(q_BHTK[:, :, start:stop], k, v, mask, dropout))
    return torch.cat(outputs, dim=2)


def attention_among_all(q_BHNK: Tensor, k_BGNK: Tensor, v_BGNV: Tensor) -> Tensor:
    """Softmax attention in which every query sees every key, [B, H, N, V]: of sinks among themselves."""
    heads_per_group = q_BHNK.shape[1] // k_BGNK.shape[1]
    k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_BGNK, v_BGNV))
    return F.scaled_dot_product_attention(q_BHNK, k, v)


def _with_sinks(
    k: Tensor, v: Tensor, mask: Tensor | None, sinks: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with sinks in front, which are visible to all."""
    k_sinks, v_sinks = sinks
    mask = None if mask is None else F.pad(mask, (k_sinks.shape[2], 0), value=True)
    return torch.cat([k_sinks, k], dim=2), torch.cat([v_sinks, v], dim=2), mask


def _self_visible(mask: Tensor, position: int) -> Tensor:
    """`mask` with the key at `position` visible: a softmax over no key at all would be NaN."""
    mask = mask.clone()
    mask[..., position] = True
    return mask
