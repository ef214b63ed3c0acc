"""The gated delta rule by the Triton kernels of flash-linear-attention, for GPUs.

They are in ``fla.ops.gated_delta_rule``.
"""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.ops.gated_linear_attention.flash_linear_attention import on_device, summable


def fla_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTG: Tensor,
    beta_BTG: Tensor,
    initial_state_BGKV: Tensor | None,
    *,
    scale: float,
    output_final_state: bool,
    cu_seqlens: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, T, H, V] and final state [B, G, K, V] float32, or None unless asked for.

    With ``cu_seqlens`` [0, end of the first document, ..., T] B is 1 and the states are one a document.
    Log gates may be anything in [-inf, 0]. The kernels know one query head a state, so what heads of a group
    share is repeated from groups to heads. All heads of a group then end in the same state, of which the
    first is returned.
    """
    # Imported here: fla needs Triton, which only GPU machines have.
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    heads_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
    k, v, log_gate, beta = (
        x.repeat_interleave(heads_per_group, dim=2)
        for x in (k_BTGK, v_BTGV, summable(log_gate_BTG), beta_BTG)
    )
    initial_state = initial_state_BGKV
    if initial_state is not None:
        initial_state = initial_state.float().repeat_interleave(heads_per_group, dim=1)
    o, final_state = chunk_gated_delta_rule(
        q_BTHK,
        k,
        v,
        log_gate,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else on_device(cu_seqlens, q_BTHK.device),
    )
    return o, None if final_state is None else final_state[:, ::heads_per_group]
