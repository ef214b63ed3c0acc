"""Text from a Megatron checkpoint, token by token on all of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from spikingbrain_train.architecture.layers import rotary_limit
from spikingbrain_train.config.require import require
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.chat_prompts import ChatPrompt
from spikingbrain_train.evaluation.checkpoint_model import CheckpointModel
from spikingbrain_train.evaluation.generation import Generation, TimedStreamer
from spikingbrain_train.evaluation.sampling import Sampling, check_prompt_length, piece_length
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.models.incremental_decoding import (
    IncrementalDecoder,
    mixers_without_slices,
    mixers_without_step,
)
from spikingbrain_train.models.mixers.decoding import CacheSize


class CheckpointGenerator:
    """Continues prompts, one after the other. All ranks make and call it together.

    Args:
        opened: a checkpoint that was asked for with :func:`~.checkpoint_request.for_decoding`.
        tokenizer: of its text.

    Raises:
        ConfigurationError: context-parallel ranks, and a mixer that does not decode in slices.
    """

    def __init__(self, opened: CheckpointModel, tokenizer: TextTokenizer) -> None:
        self.mixers_without_step = mixers_without_step(opened.request.model, opened.kernels)
        """Names of the kinds that read their whole input again for every token."""
        slices = opened.request.parallel.context_parallel_size
        without_slices = mixers_without_slices(opened.request.model, opened.kernels) if slices > 1 else []
        require(
            not without_slices,
            f"parallel.context_parallel_size={slices} splits a prompt into slices, but "
            f"{', '.join(without_slices)} reads whole texts alone; set it to 1 and spread the model over "
            "tensor, pipeline or expert ranks",
        )
        self._decoder = IncrementalDecoder(opened.model)
        self._groups = opened.groups
        self._positions = rotary_limit(opened.request.model)
        self._vocab_size = opened.request.model.vocab_size
        self._tokenizer = tokenizer
        stages = self._groups.pipeline_model_parallel_size
        self._chooser = self._groups.world_size // stages * (stages - 1)
        """The first rank of the last pipeline stage: what it draws is what all others read on with."""

    def generate(
        self, prompt: str | ChatPrompt, sampling: Sampling, show: Callable[[str], None]
    ) -> Generation:
        """Continue ``prompt``; its random numbers are those of the seed, whatever was generated before.

        Args:
            prompt: text, at least one token; or a chat, whose answer ends where the template ends it.
            sampling: how.
            show: called on the main process with pieces of text, the prompt first.

        Raises:
            ConfigurationError: the prompt has no token, one that the model does not know, or more of them
                than it has positions.
        """
        ends = self._tokenizer.end_tokens
        if isinstance(prompt, ChatPrompt):
            ids, ends = self._tokenizer.encode(prompt.text, special_tokens=False), ends | prompt.ends
        else:
            ids = self._tokenizer.encode(prompt)
        if not ids:
            raise ConfigurationError("--prompt is empty; give at least one word to go on from")
        if max(ids) >= self._vocab_size:
            raise ConfigurationError(
                f"the tokenizer {self._tokenizer.path} gives --prompt the id {max(ids)}, but the model knows "
                f"{self._vocab_size}; name the tokenizer of its data with --tokenizer"
            )
        check_prompt_length(len(ids), self._positions)
        # One token is no prompt to cut, whatever its mixers are.
        asked = sampling.prefill_chunk if len(ids) > 1 else None
        of_piece = piece_length(asked, self.mixers_without_step)
        torch.manual_seed(sampling.seed)
        streamer = TimedStreamer(self._tokenizer, show if self._groups.is_main_process else lambda text: None)
        streamer.put(torch.tensor(ids))
        self._decoder.begin()
        given, read = len(ids), torch.tensor([ids], device=self._groups.device)
        while len(ids) - given < sampling.max_new_tokens:
            token = self._choose(self._decoder.read(read, of_piece), sampling)
            ids.append(int(token))
            streamer.put(token.cpu())
            if ids[-1] in ends:
                break
            read = token.view(1, 1)
        streamer.end()
        return Generation(
            prompt_tokens=given,
            new_tokens=len(ids) - given,
            tokens_per_second=streamer.tokens_per_second,
            cache=self._cache_size(),
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
        )

    def _choose(self, logits_BV: Tensor | None, sampling: Sampling) -> Tensor:
        """The next token [1], the same on every rank."""
        token = torch.zeros(1, dtype=torch.long, device=self._groups.device)
        if self._groups.rank == self._chooser:
            assert logits_BV is not None
            token = next_token(logits_BV, sampling).view(1)
        if self._groups.world_size > 1:
            torch.distributed.broadcast(token, src=self._chooser)
        return token

    def _cache_size(self) -> CacheSize:
        """Of one copy of the model, over its tensor and pipeline ranks."""
        numbers = torch.tensor(self._decoder.cache_size().numbers(), device=self._groups.device)
        torch.distributed.all_reduce(numbers, group=self._groups.collection.mp)
        return CacheSize(*numbers.tolist())


def next_token(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Choose as ``generate`` of transformers does: greedily, or from what temperature and top_p leave.

    Args:
        logits_BV: [B, vocabulary] float32.
        sampling: how; draws come from torch's global generator.

    Returns:
        [B] int64.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    nothing: Any = None  # the warpers do not look at the text so far
    scores = TemperatureLogitsWarper(sampling.temperature)(nothing, logits_BV)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(nothing, scores)
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
