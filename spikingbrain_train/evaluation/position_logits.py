"""Float32 logits of a Hugging Face model at some positions, without those of all positions at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

LOGIT_BYTES = 256 << 20
"""Memory for the float32 logits of one chunk of positions."""


class PositionLogits:
    """Float32 logits of some positions of a batch, a chunk at a time.

    The decoder runs once; the output embedding is applied to the positions that are asked for. Models that do
    more to their logits (scaling, soft-capping) are found out on a few tokens, and run whole.

    Args:
        model: any causal language model of transformers.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self._vocab_size = int(model.config.vocab_size)
        probe = torch.arange(8, device=model.device).remainder(self._vocab_size).unsqueeze(0)
        logits = model(input_ids=probe, use_cache=False).logits
        self._by_head = self._head is not None and torch.equal(
            self._by_output_embedding(self._hidden(probe)).float(), logits.float()
        )

    def __call__(
        self, tokens_BT: Tensor, rows_N: Tensor, positions_N: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of N, logits [n, vocab_size] float32) until all N are there.

        Args:
            tokens_BT: [B, T] int64; padding, if any, stands behind the text.
            rows_N: [N] int64, indices into B.
            positions_N: [N] int64, indices into T.
        """
        if self._by_head:
            of_positions = self._hidden(tokens_BT)[rows_N, positions_N]
        else:
            of_positions = self._model(input_ids=tokens_BT, use_cache=False).logits[rows_N, positions_N]
        size = max(1, LOGIT_BYTES // (4 * self._vocab_size))
        for first in range(0, len(rows_N), size):
            chunk = slice(first, first + size)
            part = of_positions[chunk]
            yield chunk, (self._by_output_embedding(part) if self._by_head else part).float()

    def _by_output_embedding(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        # Decoders of Mamba return float32, whatever number format their weights have (residual_in_fp32).
        logits: Tensor = self._head(hidden.to(self._head.weight.dtype))
        return logits

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        return self._model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
