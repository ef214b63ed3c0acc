"""A Megatron model on all of its ranks as evaluators see it: a checkpoint's, or that of a run in training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from spikingbrain_train.architecture.rotary import depends_on_length
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.require import require
from spikingbrain_train.evaluation.language_model import (
    Answer,
    LanguageModel,
    ShowActivity,
    padded_tokens,
    until_end,
)
from spikingbrain_train.evaluation.sampling import piece_length
from spikingbrain_train.evaluation.score_batches import BatchGroup, Row, ScoreRequest, batch_groups
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.incremental_decoding import (
    IncrementalDecoder,
    mixers_without_slices,
    mixers_without_step,
)
from spikingbrain_train.models.linears.whole_model import choose
from spikingbrain_train.models.output_head import vocab_parallel_logits
from spikingbrain_train.parallel.forward_passes import pass_forward
from spikingbrain_train.parallel.process_groups import ProcessGroups

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2048, 16384
"""Of a batch of one rank: more makes nothing faster."""
_LOGIT_BYTES = 256 << 20
"""Memory for the float32 logits of one chunk of positions."""


class MegatronLanguageModel(LanguageModel):
    """A model under any topology. Replicas (data-parallel ranks) share the texts.

    Experts that drop tokens (``model.moe.capacity_factor``) do so here, too: give the model of a checkpoint
    that was asked for with :func:`~.checkpoint_request.for_reading`, where scores shall not depend on the
    texts beside one.

    Args:
        model: this rank's pipeline stage.
        groups: process groups.
        tokenizer: of its text.
        tokens_per_batch: that a rank reads at a time; None chooses by the device.
        prefill_chunk: tokens of a prompt that a rank reads at a time in :meth:`generate`; None chooses.
            Memory for a longer prompt does not grow with it, but for keys and values of full attention.
        show: shows what runs; None shows it on standard error of the main process.
    """

    def __init__(
        self,
        model: HybridGPTModel | ModelChunks,
        groups: ProcessGroups,
        tokenizer: TextTokenizer,
        *,
        tokens_per_batch: int | None = None,
        prefill_chunk: int | None = None,
        show: ShowActivity | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            vocab_size=model.model_config.vocab_size,
            max_length=model.model_config.max_position_embeddings,
            is_main_process=groups.is_main_process,
            show=show,
        )
        self.model = model
        self.groups = groups
        self._asked_piece = prefill_chunk
        self._piece_length = piece_length(
            prefill_chunk, mixers_without_step(model.model_config, model.kernels), name="prefill_chunk"
        )
        self._without_slices = mixers_without_slices(model.model_config, model.kernels)
        self._tokens_per_batch = tokens_per_batch or (
            _TOKENS_ON_GPU if groups.accelerator.is_gpu else _TOKENS_ON_CPU
        )

    @property
    def _device(self) -> torch.device:
        return self.groups.device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        end_tokens: Collection[int] = (),
        what: str = "generating",
    ) -> list[list[int]]:
        """See :class:`~.language_model.LanguageModel`.

        Prompts are read in pieces, of which context-parallel ranks read a slice each, and every rank of a
        pipeline or tensor-parallel group all. Under sequence parallelism, and where a mixer does not decode
        in slices, nothing is remembered, because one token cannot be split: every token reads its whole text
        again, each rank its share.

        Raises:
            ConfigurationError: ``prefill_chunk`` was given and every token reads its text again.
        """
        self._check_ids(prompts)
        config = self.model.config
        with torch.no_grad(), self._evaluating():
            if config.sequence_parallel or config.context_parallel_size > 1 and self._without_slices:
                require(
                    self._asked_piece is None,
                    "prefill_chunk reads prompts in pieces, which ranks that split one token's text "
                    "(sequence_parallel, or context_parallel_size with a mixer that does not decode in "
                    "slices) cannot; leave it out, or read with context_parallel_size=1 and "
                    "sequence_parallel=false",
                )
                return self._generate_by_reading_again(prompts, max_new_tokens, end_tokens, what)
            return self._generate_by_step(prompts, max_new_tokens, end_tokens, what)

    def choose(self, choice: str | None) -> None:
        choose(self.model, self.model.model_config, choice)

    def _read(self, rows: Sequence[Row], answers: Tensor, answer: Answer, what: str) -> None:
        groups = self._batch_groups(rows)
        batches = sum(len(group.batches) for group in groups) // self.groups.data_parallel_size
        with self.activity(what, batches, "batches") as progress, self._evaluating():
            for group in groups:
                mine = group.batches[self.groups.data_parallel_rank :: self.groups.data_parallel_size]
                self._read_group(group, progress.over(mine), len(mine), answers, answer)
        self.groups.sum_from_last_stage(answers)

    def _batch_groups(self, rows: Sequence[Row]) -> list[BatchGroup]:
        config, sinks = self.model.config, self.model.model_config.num_sink_tokens
        tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
        slices = tensor * context if config.sequence_parallel else context

        def fitting(length: int) -> int:
            least = max(
                length + sinks, (sinks + 1) * context
            )  # some text beside the sinks in the first slice
            return -(-least // slices) * slices - sinks

        return batch_groups(
            rows,
            tokens_per_batch=self._tokens_per_batch,
            replicas=self.groups.data_parallel_size,
            fitting=fitting,
            # Padding would count as text where positions depend on how long a text is.
            exact=slices == 1 and depends_on_length(self.model.model_config.rope_scaling),
        )

    def _read_group(
        self, group: BatchGroup, batches: Iterator[list[Row]], count: int, answers: Tensor, answer: Answer
    ) -> None:
        layout = SequenceLayout(
            group.length,
            self.model.model_config.num_sink_tokens,
            self.groups.context_parallel_rank,
            self.groups.context_parallel_size,
        )
        text = layout.text_range()

        def forward_step(iterator: Iterator[list[Row]], stage: HybridGPTModel):
            batch = next(iterator)
            tokens = padded_tokens(batch, group.rows, group.length)[:, text.start : text.stop]
            hidden = stage(tokens.to(self._device), layout=layout, return_hidden_states=True)
            return hidden, partial(self._put, batch, layout, answers, answer)

        pass_forward(
            self.model.chunks,
            forward_step,
            batches,
            count,
            seq_length=group.length + layout.num_sink_tokens,
            micro_batch_size=group.rows,
            collect_non_loss_data=True,
        )

    def _put(
        self,
        batch: list[Row],
        layout: SequenceLayout,
        answers: Tensor,
        answer: Answer,
        hidden_TBD: Tensor,
        non_loss_data: bool = True,
    ) -> None:
        """Answers at the positions of ``batch`` that this rank holds, from its final hidden states."""
        if self.model.config.sequence_parallel:
            hidden_TBD = gather_from_sequence_parallel_region(hidden_TBD, group=self.model.pg_collection.tp)
        text, sinks = layout.text_range(), layout.local_sink_tokens
        asked = [
            (at - text.start + sinks, index, target, slot)
            for index, row in enumerate(batch)
            for at, target, slot in zip(row.positions, row.targets, row.slots, strict=True)
            if at in text
        ]
        if not asked:
            return
        position, index, target, slot = torch.tensor(asked, device=self._device).unbind(1)
        size = max(1, _LOGIT_BYTES // (4 * self.vocab_size))
        for first in range(0, len(asked), size):
            chunk = slice(first, first + size)
            hidden_ND = hidden_TBD[position[chunk], index[chunk]]
            logits_NV = vocab_parallel_logits(
                hidden_ND, self.model.output_weight(), self.vocab_size, self.model.pg_collection.tp
            )
            answers[slot[chunk]] = answer(logits_NV, target[chunk])

    def _generate_by_step(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_tokens: Collection[int], what: str
    ) -> list[list[int]]:
        rank, replicas = self.groups.data_parallel_rank, self.groups.data_parallel_size
        rows = [Row(tuple(prompt), slots=[slot]) for slot, prompt in enumerate(prompts)]
        groups = batch_groups(rows, tokens_per_batch=self._tokens_per_batch, replicas=replicas, exact=True)
        found = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=self._device)
        rounds = sum(len(group.batches) for group in groups) // replicas
        decoder = IncrementalDecoder(self.model)
        try:
            with self.activity(what, rounds * max_new_tokens, "steps") as progress:
                for group in groups:
                    for batch in group.batches[rank::replicas]:
                        decoder.begin()
                        read = padded_tokens(batch, group.rows, group.length).to(self._device)
                        ended = torch.zeros(group.rows, dtype=torch.bool, device=self._device)
                        ended[len(batch) :] = True
                        slots = [row.slots[0] for row in batch]
                        for step in range(max_new_tokens):
                            token_B = self._likeliest(decoder.read(read, self._piece_length), group.rows)
                            found[slots, step] = token_B[: len(batch)]
                            read = token_B.unsqueeze(1)
                            for end in end_tokens:
                                ended |= token_B == end
                            if end_tokens and self._all_ranks(ended):
                                progress.advance(max_new_tokens - step)
                                break
                            progress.advance()
        finally:
            decoder.release()
        if self.groups.context_parallel_rank:
            found.zero_()  # context-parallel ranks have all written the same
        torch.distributed.all_reduce(found, group=self.groups.collection.dp_cp)
        return [until_end(ids, end_tokens) for ids in found.tolist()]

    def _likeliest(self, logits_BV: Tensor | None, num_rows: int) -> Tensor:
        """[B] int64: the tokens that one rank chooses, on all that hold this model.

        Context-parallel ranks compute the same, but by themselves, and a kernel that adds in no fixed order
        could have them go on with different texts.
        """
        stages, collection = self.groups.pipeline_model_parallel_size, self.groups.collection
        if logits_BV is None:
            token_B = torch.zeros(num_rows, dtype=torch.long, device=self._device)
        else:
            token_B = logits_BV.argmax(-1)
            if self.groups.context_parallel_size > 1:
                _broadcast(token_B, 0, collection.cp)
        if stages > 1:
            _broadcast(token_B, stages - 1, collection.pp)
        return token_B

    def _all_ranks(self, ended_B: Tensor) -> bool:
        """Whether every text of all ranks has ended."""
        going_on = (~ended_B).any().int()
        torch.distributed.all_reduce(going_on, torch.distributed.ReduceOp.MAX)
        return not going_on.item()

    def _generate_by_reading_again(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_tokens: Collection[int], what: str
    ) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        with self.activity(what, max_new_tokens, "steps") as progress:
            for _ in range(max_new_tokens):
                going_on = [index for index, ids in enumerate(found) if not ids or ids[-1] not in end_tokens]
                if not going_on:
                    break
                requests = [ScoreRequest([*prompts[index], *found[index]], [0]) for index in going_on]
                tokens = self._answers(requests, _argmax, 1, "reading").flatten().tolist()
                for index, token in zip(going_on, tokens, strict=True):
                    found[index].append(int(token))
                progress.advance()
        return found

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def _argmax(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.argmax(-1, keepdim=True).float()


def _broadcast(x: Tensor, rank: int, group: torch.distributed.ProcessGroup) -> None:
    """From ``rank`` of the group."""
    torch.distributed.broadcast(x, src=torch.distributed.get_global_rank(group, rank), group=group)
