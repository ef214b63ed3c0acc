"""Rules that several kinds of mixers share about the ranks that split them."""

from __future__ import annotations

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import LinearAttentionContextParallel, ParallelConfig
from spikingbrain_train.config.require import divisors, either, require


def check_heads_over_context(
    model: ModelConfig, parallel: ParallelConfig, asks: str, instead: str = ""
) -> None:
    """Ulysses gives whole heads to the context-parallel ranks.

    Args:
        model: the network.
        parallel: degrees that split it.
        asks: what uses Ulysses, for the sentence.
        instead: another method, for the sentence: ``sliding_window_attention=halo, ``.

    Raises:
        ConfigurationError: the heads do not divide, and padding is switched off.
    """
    context, method = parallel.context_parallel_size, parallel.context_parallel
    heads = model.num_attention_heads // parallel.tensor_model_parallel_size
    require(
        method.head_padding or heads % context == 0,
        f"parallel.context_parallel_size={context} does not divide the {heads} query heads of a "
        f"tensor-parallel rank, as {asks} needs with parallel.context_parallel.head_padding=false; "
        f"set head_padding=true, {instead}or a context degree of {either(divisors(heads))}",
    )


def check_linear_attention_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Heads of any recurrence against context-parallel ranks. Raises ConfigurationError."""
    if parallel.context_parallel.gated_linear_attention is LinearAttentionContextParallel.ulysses:
        asks = "parallel.context_parallel.gated_linear_attention=ulysses"
        check_heads_over_context(model, parallel, asks, "gated_linear_attention=allgather, ")
