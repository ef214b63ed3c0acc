"""Backends of the order of tokens around experts: megatron-core's token dispatcher calls them."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backend, Backends, Machine
from spikingbrain_train.config.parallel import AcceleratorKind


@dataclass(frozen=True)
class TokenPermutationCall:
    """What decides who can sort tokens by experts."""

    platform: AcceleratorKind
    replicates_experts: bool = False
    """Whether tokens of busy experts stay out of it (``parallel.replicate_expert_load``)."""


_FUNCTIONS = ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs")


def _limit(call: TokenPermutationCall) -> str | None:
    # Of no tokens Transformer Engine returns no tokens, where all were there before.
    if call.replicates_experts:
        return "cannot leave all tokens of a rank out, as parallel.replicate_expert_load may"
    return None


def _limit_here(call: TokenPermutationCall, machine: Machine) -> str | None:
    names = (f"fused_{name}" for name in (*_FUNCTIONS, "unpermute"))
    if all(machine.defines(f"megatron.core.extensions.transformer_engine:{name}") for name in names):
        return None
    return "needs Transformer Engine 2.1 or later, with moe_permute_with_probs"


def _preference(call: TokenPermutationCall, on_gpu: bool) -> tuple[str, ...]:
    on_nvidia = on_gpu and call.platform is AcceleratorKind.cuda
    return ("transformer_engine", "megatron") if on_nvidia else ("megatron",)


TOKEN_PERMUTATION: Backends[TokenPermutationCall] = Backends(
    "token_permutation",
    (
        Backend("transformer_engine", "transformer_engine", gpu=True, limit=_limit, limit_here=_limit_here),
        Backend("megatron"),
    ),
    _preference,
)
