"""A causal language model of transformers as evaluators see it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from spikingbrain_train.evaluation.folder_adapters import FolderAdapters
from spikingbrain_train.evaluation.language_model import (
    Answer,
    LanguageModel,
    ShowActivity,
    padded_tokens,
    until_end,
)
from spikingbrain_train.evaluation.position_logits import PositionLogits
from spikingbrain_train.evaluation.score_batches import Row, batch_groups
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2048, 16384
"""Of a batch: more makes nothing faster."""
_DEFAULT_LENGTH = 2048


class HuggingFaceLanguageModel(LanguageModel):
    """A model in one process.

    Args:
        model: any causal language model of transformers, in evaluation mode; :meth:`generate` replaces its
            generation_config.
        tokenizer: of its text.
        tokens_per_batch: that are read at a time; None chooses by the device.
        show: shows what runs; None shows it on standard error.
        adapters: beside its weights, of which :meth:`choose` takes one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TextTokenizer,
        *,
        tokens_per_batch: int | None = None,
        show: ShowActivity | None = None,
        adapters: FolderAdapters | None = None,
    ) -> None:
        config = model.config
        super().__init__(
            tokenizer,
            vocab_size=int(config.vocab_size),
            max_length=int(getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH),
            show=show,
        )
        self.model = model
        self._adapters = adapters
        self._logits = PositionLogits(model)
        self._tokens_per_batch = tokens_per_batch or (
            _TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS_ON_GPU
        )

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def choose(self, choice: str | None) -> None:
        if self._adapters is None:
            super().choose(choice)
        else:
            self._adapters.choose(choice)

    def _read(self, rows: Sequence[Row], answers: Tensor, answer: Answer, what: str) -> None:
        with self.activity(what, len(rows), "texts") as progress:
            for group in batch_groups(rows, tokens_per_batch=self._tokens_per_batch):
                for batch in group.batches:
                    tokens = padded_tokens(batch, len(batch), group.length).to(self._device)
                    where = [(index, at) for index, row in enumerate(batch) for at in row.positions]
                    index, position = torch.tensor(where, device=self._device).unbind(1)
                    targets = torch.tensor([t for row in batch for t in row.targets], device=self._device)
                    slots = torch.tensor([s for row in batch for s in row.slots], device=self._device)
                    for chunk, logits_NV in self._logits(tokens, index, position):
                        answers[slots[chunk]] = answer(logits_NV, targets[chunk])
                    progress.advance(len(batch))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        end_tokens: Collection[int] = (),
        what: str = "generating",
    ) -> list[list[int]]:
        self._check_ids(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        rows = [Row(tuple(prompt), slots=[slot]) for slot, prompt in enumerate(prompts)]
        # Replaced, not passed: generate() fills what a passed config leaves open with the model's own.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(end_tokens) or None,
            pad_token_id=min(end_tokens, default=0),
        )
        with self.activity(what, len(rows), "texts") as progress:
            for group in batch_groups(rows, tokens_per_batch=self._tokens_per_batch, exact=True):
                for batch in group.batches:
                    tokens = padded_tokens(batch, len(batch), group.length).to(self._device)
                    output = self.model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                    for row, ids in zip(batch, output[:, group.length :].tolist(), strict=True):
                        found[row.slots[0]] = until_end(ids, end_tokens)
                    progress.advance(len(batch))
        return found
