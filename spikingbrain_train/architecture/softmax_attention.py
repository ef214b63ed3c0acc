"""Full and sliding-window softmax attention with rotary positions (arXiv 2509.05276, eq. 1-2)."""

from __future__ import annotations

from spikingbrain_train.architecture.backends.softmax_attention import (
    SOFTMAX_ATTENTION,
    SoftmaxAttentionCall,
)
from spikingbrain_train.architecture.context_traffic import ContextTraffic, halo_traffic, ulysses_traffic
from spikingbrain_train.architecture.linear_transforms import keeps_its_input
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind, attention_weights
from spikingbrain_train.architecture.rotary import all_rotary_settings, check_rotary, rotary_settings
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.sizes import (
    FP32,
    bytes_per_element,
    heads_and_groups,
    rank_tokens,
    torch_name,
    ulysses_heads_and_groups,
    visible_keys,
)
from spikingbrain_train.architecture.split_checks import check_heads_over_context
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, SlidingWindowContextParallel
from spikingbrain_train.config.run import RunConfig

_OF_VECTORS = {"quantization.keys_and_values", "spiking.queries"}


class SoftmaxAttentionKind(MixerKind):
    """Causal softmax attention over everything before a token."""

    name = "full"
    words = "full-attention layers"
    spec = "spikingbrain_train.models.mixers.softmax_attention:spec"
    family = "softmax"
    is_of_the_source = True
    leads = True
    backends = SOFTMAX_ATTENTION
    export_module = "spikingbrain_train.hf.softmax_attention_spikingbrain"
    hf_layers = {
        "llama": "attention",
        "qwen3_moe": "attention",
        "gla_swa": "full_attention",
        "spikingbrain": "full_attention",
    }

    def window(self, model: ModelConfig) -> int | None:
        """Keys (the current token included) that a query sees; None is all before it."""
        return None

    def uses_ulysses(self, parallel: ParallelConfig) -> bool:
        """Whether context-parallel ranks take whole sequences of a share of the heads."""
        return parallel.context_parallel_size > 1

    def check(self, model: ModelConfig) -> None:
        check_rotary(model)

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        check_heads_over_context(model, parallel, "full attention")

    def all_settings(self, model: ModelConfig) -> set[str]:
        return all_rotary_settings(model) | _OF_VECTORS

    def settings(self, model: ModelConfig) -> set[str]:
        return rotary_settings(model) | _OF_VECTORS

    def describe(self, model: ModelConfig) -> str | None:
        options = (
            ("INT8 keys and values", model.quantization.keys_and_values),
            ("spiking queries", model.spiking.queries),
        )
        return ", ".join(words for words, on in options if on) or None

    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        return attention_weights(model, group)

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Scores and weighted values: 2 H d FLOPs each per visible key; sinks are keys of every token."""
        sinks = model.num_sink_tokens
        keys = visible_keys(seq_length, self.window(model)) + sinks + sinks * sinks / seq_length
        return 4.0 * model.num_attention_heads * model.kv_channels * keys

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> SoftmaxAttentionCall:
        window = self.window(model)
        return SoftmaxAttentionCall(
            dtype=torch_name(config.precision),
            key_dim=model.kv_channels,
            value_dim=model.kv_channels,
            num_text_keys=layout.num_text_keys(None if self.uses_ulysses(config.parallel) else window),
            window=window,
            num_sink_tokens=0 if layout.sinks_are_padding else layout.num_sink_tokens,
            has_documents=has_documents,
        )

    def activation_bytes(self, config: RunConfig) -> float:
        model, parallel = config.model, config.parallel
        heads, groups = heads_and_groups(config)
        width = model.kv_channels * bytes_per_element(config.precision)
        uses_ulysses = self.uses_ulysses(parallel)
        if parallel.context_parallel_size == 1:
            # The fused projection, of which values are a view; queries and keys after rotation; the output.
            kept: float = (heads + 2 * groups) + (heads + groups) + heads
        elif uses_ulysses:
            # Queries, keys and values of whole sequences, the output there, and the output that came back.
            share, of_groups = ulysses_heads_and_groups(config)
            kept = (share + 2 * of_groups) + share + heads
        else:
            # Queries; keys and values with those of the halo and the sinks; the output.
            more = (model.sliding_window + model.num_sink_tokens) * config.stage.micro_batch_size
            kept = heads + 2 * groups * (1 + more / rank_tokens(config)) + heads
            if model.num_sink_tokens:
                kept += 2 * groups  # of the first rank: what the sinks see
        if model.quantization.keys_and_values and parallel.context_parallel_size == 1:
            # Values as INT8 numbers hold them, no view; norms still need the fused projection.
            kept += groups - (0 if model.qk_layernorm else heads + 2 * groups)
        if model.num_sink_tokens and not uses_ulysses:
            kept += heads  # of the first rank: the text's output, and once more behind that of the sinks
        if model.qk_layernorm:
            kept += heads  # queries before their norm
        kept += 4  # cosines and sines in the activations' dtype, of queries and of keys
        is_copied = keeps_its_input(model, "attention_output") and not model.num_sink_tokens
        if is_copied or model.attn_sub_norm:
            kept += heads  # the output, normed or transformed
        return kept * width + heads * FP32  # one sum of exponentials a head

    def context_traffic(self, config: RunConfig) -> ContextTraffic:
        window = self.window(config.model)
        if window is None or self.uses_ulysses(config.parallel):
            return ulysses_traffic(config, per_group=2)
        return halo_traffic(config, window)


class SlidingWindowAttentionKind(SoftmaxAttentionKind):
    """Causal softmax attention over the last ``model.sliding_window`` tokens."""

    name = "swa"
    words = "sliding-window layers"
    is_of_the_source = False
    export_module = SoftmaxAttentionKind.export_module
    hf_layers = dict.fromkeys(("llama", "gla_swa", "spikingbrain"), "sliding_attention")

    def window(self, model: ModelConfig) -> int | None:
        return model.sliding_window

    def uses_ulysses(self, parallel: ParallelConfig) -> bool:
        method = parallel.context_parallel.sliding_window_attention
        return super().uses_ulysses(parallel) and method is SlidingWindowContextParallel.ulysses

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        if parallel.context_parallel.sliding_window_attention is SlidingWindowContextParallel.ulysses:
            asks = "parallel.context_parallel.sliding_window_attention=ulysses"
            check_heads_over_context(model, parallel, asks, "sliding_window_attention=halo, ")

    def all_settings(self, model: ModelConfig) -> set[str]:
        return super().all_settings(model) | {"sliding_window"}

    def settings(self, model: ModelConfig) -> set[str]:
        return super().settings(model) | {"sliding_window"}

    def describe(self, model: ModelConfig) -> str | None:
        return ", ".join(filter(None, (f"window {model.sliding_window}", super().describe(model))))


FULL = MIXERS.register(SoftmaxAttentionKind())
WINDOW = MIXERS.register(SlidingWindowAttentionKind())
