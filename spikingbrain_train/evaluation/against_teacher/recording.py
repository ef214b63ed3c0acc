"""A teacher is loaded, recorded and let go, before its student is in memory or beside it for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spikingbrain_train.data.indexed import check_same_tokenizer
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.evaluation.against_teacher.plan import TeacherPlan
from spikingbrain_train.evaluation.against_teacher.prompts import held_out_prompts
from spikingbrain_train.evaluation.against_teacher.teacher_record import TeacherRecord, record_teacher
from spikingbrain_train.evaluation.checkpoint_model import open_checkpoint
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.language_model import LanguageModel, ShowActivity
from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.parallel.agreement import on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import activity


def record_of_folder(
    plan: TeacherPlan,
    load: Callable[[], PreTrainedModel],
    tokenizer: Path,
    groups: ProcessGroups | None,
    show: ShowActivity | None = None,
) -> TeacherRecord:
    """Of a Hugging Face folder, which the main process alone loads; every rank gets the record.

    Args:
        plan: what is compared.
        load: gives transformers' model, in evaluation mode.
        tokenizer: of its text.
        groups: of the ranks; None for one process without any.
        show: shows what runs.

    Raises:
        SpikingBrainError: on every rank; what loading, the tokenizer or the data raise.
    """
    made: list[TeacherRecord | None] = []

    def record() -> None:
        teacher = HuggingFaceLanguageModel(load(), TextTokenizer(tokenizer), show=show)
        made.append(_record(plan, teacher))

    if groups is None:
        record()
    else:
        on_main_process(record, groups)
        made = made or [None]
        if groups.world_size > 1:
            torch.distributed.broadcast_object_list(made, src=0, device=groups.device)
    assert made[0] is not None
    return made[0]


def record_of_checkpoint(
    plan: TeacherPlan,
    request: CheckpointRequest,
    tokenizer: Path,
    groups: ProcessGroups,
    show: ShowActivity | None = None,
) -> TeacherRecord:
    """Of a Megatron checkpoint, in the topology that the ranks have joined for.

    Args:
        plan: what is compared.
        request: for the checkpoint, as :func:`~.checkpoint_request.for_reading` makes it.
        tokenizer: of its text.
        groups: of the ranks.
        show: shows what runs.

    Raises:
        SpikingBrainError: on every rank.
    """
    opened = open_checkpoint(request, groups)
    return _record(plan, MegatronLanguageModel(opened.model, groups, TextTokenizer(tokenizer), show=show))


def _record(plan: TeacherPlan, teacher: LanguageModel) -> TeacherRecord:
    with activity("opening the data", shown=teacher.is_main_process):
        made_with = load_tokenizer(teacher.tokenizer.path)
        for prefix in plan.data:
            check_same_tokenizer(prefix, made_with)
        prompts = held_out_prompts(plan.data, plan.prompts, plan.prompt_tokens, teacher.vocab_size)
    return record_teacher(teacher, prompts, plan.new_tokens)
