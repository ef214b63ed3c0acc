"""The gated delta rule by the Triton kernels of flash-linear-attention, for GPUs.

They are in ``fla.ops.gated_delta_rule``. Releases that the call was written against: ``fla`` in
architecture/backends/releases.py.
"""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.ops.gated_linear_attention.flash_linear_attention import bounds_on_device, summable
from spikingbrain_train.ops.grouped_states import run_by_heads


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
    Log gates may be anything in [-inf, 0].
    """
    # Imported here: fla needs Triton, which only GPU machines have.
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return run_by_heads(
        chunk_gated_delta_rule,
        q_BTHK,
        (k_BTGK, v_BTGV, summable(log_gate_BTG), beta_BTG),
        initial_state_BGKV,
        scale=scale,
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else bounds_on_device(cu_seqlens, q_BTHK.device),
    )
