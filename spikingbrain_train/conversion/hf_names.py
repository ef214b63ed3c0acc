"""How each Hugging Face family spells the tensors that the mapping table asks for: role -> tensor name."""

from __future__ import annotations

from collections.abc import Mapping

LLAMA_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "q_weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role names of Llama, Qwen2, Qwen2.5 and Qwen3, which spell them alike."""

GLA_SWA_NAMES: Mapping[str, str] = {
    "embedding": "model.embeddings.weight",
    "input_norm": "model.layers.{layer}.attn_norm.weight",
    "q_weight": "model.layers.{layer}.attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.attn.o_proj.weight",
    "gate_down_weight": "model.layers.{layer}.attn.gk_proj.0.weight",
    "gate_up_weight": "model.layers.{layer}.attn.gk_proj.1.weight",
    "gate_up_bias": "model.layers.{layer}.attn.gk_proj.1.bias",
    "out_norm": "model.layers.{layer}.attn.g_norm.weight",
    "mlp_norm": "model.layers.{layer}.mlp_norm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role names of the published SpikingBrain-7B checkpoint; q_norm and k_norm exist only in conversions of
Qwen3."""
