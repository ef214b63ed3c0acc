"""The decoder of ``gla_swa`` exports of vLLM's layers, which split it over tensor-parallel ranks.

What gated linear attention computes and how positions turn queries and keys is the export's own code
(``ops_gla_swa.py``, ``rotary_gla_swa.py``), which transformers loads with ``trust_remote_code``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase

# Importing it registers torch.ops.vllm.linear_attention, which calls `_forward` of the layer of that name.
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from vllm_spikingbrain.batch import Requests, mix_requests
from vllm_spikingbrain.settings import check


def code_of_export(vllm_config: VllmConfig, name: str) -> Any:
    """Something of the export's modelling code, such as ``ops_gla_swa.gated_linear_attention``.

    Raises:
        ValueError: the folder has no such file.
    """
    model = vllm_config.model_config
    try:
        return get_class_from_dynamic_module(name, model.model, code_revision=model.code_revision)
    except OSError as error:
        raise ValueError(
            f"{model.model} brings no {name.partition('.')[0]}.py; export it again with spikingbrain-export"
        ) from error


def state_shape(vllm_config: VllmConfig) -> tuple[int, int, int]:
    """[G, K, V] of a rank's state of one request in one layer."""
    config = vllm_config.model_config.hf_config
    groups = config.linear_num_key_value_heads // vllm_config.parallel_config.tensor_parallel_size
    return groups, config.head_dim, config.head_dim


class GLAswaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any, prefix: str, quant_config: Any) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Projections(nn.Module):
    """Queries, keys, values and output, with norms on queries and keys if there are any."""

    def __init__(
        self, config: Any, vllm_config: VllmConfig, prefix: str, num_groups: int, qk_norm: bool
    ) -> None:
        super().__init__()
        size, quant_config = get_tensor_model_parallel_world_size(), vllm_config.quant_config
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // size
        self.num_groups = num_groups // size
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            num_groups,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, K], keys and values [N, G, K] of this rank."""
        qkv, _ = self.qkv_proj(x)
        q, k, v = (
            part.reshape(x.shape[0], -1, self.head_dim)
            for part in qkv.split(
                [n * self.head_dim for n in (self.num_heads, self.num_groups, self.num_groups)], -1
            )
        )
        return self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v


class SoftmaxAttention(Projections):
    """Softmax attention with rotary positions, over all tokens or a window (SpikingBrain, eq. 1 and 2)."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, window: int | None) -> None:
        super().__init__(config, vllm_config, prefix, config.num_key_value_heads, config.qk_norm)
        cache_config = vllm_config.cache_config
        if window is None:
            # Attention would take the window that vLLM reads from config.json for all layers.
            cache_config = copy.copy(cache_config)
            cache_config.sliding_window = None
        self.apply_rotary = code_of_export(vllm_config, "rotary_gla_swa.apply_rotary")
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5 * config.rotary_positions().attention_factor ** 2,
            num_kv_heads=self.num_groups,
            cache_config=cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x)
        q, k = (self.apply_rotary(y.transpose(0, 1)[None], *rotary)[0].transpose(0, 1) for y in (q, k))
        o = self.attn(*(y.reshape(x.shape[0], -1) for y in (q, k, v)))
        return self.o_proj(o)[0]


class GatedLinearAttention(Projections, MambaBase):
    """Gated linear attention (SpikingBrain, eq. 10-11); vLLM keeps its state among those of Mamba layers."""

    kv_cache: tuple[Tensor, ...]
    """States [S, G, K, V], float32; vLLM sets it."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        groups = config.linear_num_key_value_heads
        super().__init__(config, vllm_config, prefix, groups, config.qk_norm or config.linear_qk_norm)
        self.prefix = prefix
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.state_shape = state_shape(vllm_config)
        self.mix = code_of_export(vllm_config, "ops_gla_swa.gated_linear_attention")
        quant_config = vllm_config.quant_config
        self.gk_proj: Iterable[nn.Module] = nn.ModuleList(
            [
                ReplicatedLinear(
                    config.hidden_size,
                    config.gate_low_rank_dim,
                    bias=False,
                    quant_config=quant_config,
                    prefix=f"{prefix}.gk_proj.0",
                ),
                ColumnParallelLinear(
                    config.gate_low_rank_dim,
                    groups * config.head_dim,
                    bias=True,
                    quant_config=quant_config,
                    prefix=f"{prefix}.gk_proj.1",
                ),
            ]
        )
        self.g_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.g_proj = None
        if config.linear_output_gate:
            self.g_proj = ColumnParallelLinear(
                config.hidden_size,
                config.num_attention_heads * config.head_dim,
                bias=True,
                quant_config=quant_config,
                prefix=f"{prefix}.g_proj",
            )
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"there are two layers {prefix}")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        return (self.state_shape,)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        return (torch.float32,)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        output = torch.zeros_like(x)
        torch.ops.vllm.linear_attention(x, output, positions, self.prefix)
        return output

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """What torch.ops.vllm.linear_attention calls, outside of compiled code."""
        of = self._requests()
        if of is None:  # vLLM measures memory: there are no states yet
            return
        num_tokens = int(self._metadata.num_decode_tokens + self._metadata.num_prefill_tokens)
        x = hidden_states[:num_tokens]
        q, k, v = self.project(x)
        down, up = self.gk_proj
        logit, _ = up(down(x)[0])
        log_gate = (F.logsigmoid(logit.float()) / self.gate_logit_normalizer).view_as(k)
        o = mix_requests(self.mix, F.relu(q), F.relu(k), v, log_gate, self.kv_cache[0], of)
        o = self.g_norm(o.contiguous()).flatten(1)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)[0])
        output[:num_tokens] = self.o_proj(o)[0]

    @property
    def _metadata(self) -> Any:
        by_layer = get_forward_context().attn_metadata
        return None if by_layer is None else by_layer[self.prefix]

    def _requests(self) -> Requests | None:
        found = self._metadata
        if found is None:
            return None
        return Requests(
            found.state_indices_tensor,
            found.query_start_loc,
            found.seq_lens,
            found.num_decodes,
            found.num_prefills,
        )


class GLAswaBlock(nn.Module):
    """Norm, mixer, residual, norm, feed-forward, residual."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        kind = config.mixer_type(extract_layer_index(prefix))
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        if kind == "gla":
            self.attn: nn.Module = GatedLinearAttention(config, vllm_config, f"{prefix}.attn")
        else:
            window = config.attention_window if kind == "swa" else None
            self.attn = SoftmaxAttention(config, vllm_config, f"{prefix}.attn", window)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GLAswaMLP(config, f"{prefix}.mlp", vllm_config.quant_config)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.attn_norm(x), positions, rotary)
        return x + self.mlp(self.mlp_norm(x))


class GLAswaModel(nn.Module):
    """The decoder without its output projection."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.rotary = config.rotary_positions()
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GLAswaBlock(vllm_config, f"{prefix}.layers.{layer}") for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self.rotary.cos_sin(positions[None], x.dtype)
        for layer in self.layers:
            x = layer(x, positions, rotary)
        return self.norm(x)


class GLAswaForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The decoder with its output projection, as vLLM's registry takes it."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check(config, get_tensor_model_parallel_world_size())
        self.config = config
        self.model = GLAswaModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        return (state_shape(vllm_config),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters from an export's tensors.

        Raises:
            ValueError: a tensor that the model has no place for, or a parameter that got none.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if not self.config.attention_bias and name.endswith(
                ("q_proj.bias", "k_proj.bias", "v_proj.bias")
            ):
                continue  # zeros, for classes that always have them
            target, shard = packed(name)
            if target not in parameters:
                raise ValueError(f"vllm_spikingbrain has no place for the tensor {name} of this export")
            parameter = parameters[target]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor) if shard is None else load(parameter, tensor, shard)
            loaded.add(target)
        if (
            missing := parameters.keys()
            - loaded
            - {"lm_head.weight" if self.config.tie_word_embeddings else ""}
        ):
            raise ValueError(f"this export has no tensors for {', '.join(sorted(missing))}")
        return loaded


def packed(name: str) -> tuple[str, str | int | None]:
    """The parameter that a tensor of an export is part of, and which part."""
    for part, whole, shard in (
        ("q_proj", "qkv_proj", "q"),
        ("k_proj", "qkv_proj", "k"),
        ("v_proj", "qkv_proj", "v"),
        ("gate_proj", "gate_up_proj", 0),
        ("up_proj", "gate_up_proj", 1),
    ):
        if f".{part}." in name:
            return name.replace(f".{part}.", f".{whole}."), shard
    return name, None
