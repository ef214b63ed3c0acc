"""Flags of spikingbrain-evaluate that hold a student against its teacher."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.against_teacher.plan import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    TeacherPlan,
)
from spikingbrain_train.evaluation.checkpoint_request import for_reading, request_checkpoint
from spikingbrain_train.evaluation.folder_model import load_folder
from spikingbrain_train.evaluation.measurement import Measurement, Part
from spikingbrain_train.evaluation.model_folder import check_model_folder, is_megatron_checkpoint
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import load_config_json

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.against_teacher.teacher_record import TeacherRecord
    from spikingbrain_train.evaluation.language_model import LanguageModel
    from spikingbrain_train.parallel.process_groups import ProcessGroups

_DEFAULTS = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}


def add_teacher_options(parser: argparse.ArgumentParser) -> None:
    """Add them, in a group of their own."""
    group = parser.add_argument_group(
        "generation against the teacher",
        "whether the model goes on from prompts of --data as its teacher does, and how far it is from the "
        "teacher along the teacher's text; the teacher is read first and let go, then the model",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="the dense source: Hugging Face folder or Megatron checkpoint",
    )
    group.add_argument(
        "--teacher-prompts",
        type=int,
        metavar="N",
        help=f"windows of held-out text, evenly spread over it (default: {PROMPTS})",
    )
    group.add_argument(
        "--teacher-prompt-tokens",
        type=int,
        metavar="N",
        help=f"tokens of each (default: {PROMPT_TOKENS})",
    )
    group.add_argument(
        "--teacher-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens that both write behind it (default: {NEW_TOKENS})",
    )


def teacher_of(arguments: argparse.Namespace) -> TeacherMeasurement | None:
    """What the flags ask for, None without ``--teacher``.

    Raises:
        ConfigurationError: a value that does not fit, or a flag that nothing reads.
        CheckpointError: the teacher is no model.
    """
    given = {
        name: value for name in _DEFAULTS if (value := getattr(arguments, f"teacher_{name}")) is not None
    }
    if arguments.teacher is None:
        for name in given:
            flag = f"--teacher-{name.replace('_', '-')}"
            raise ConfigurationError(f"{flag} is read with --teacher only; name one, or leave it out")
        return None
    if not arguments.data:
        raise ConfigurationError(
            f"--teacher {arguments.teacher} needs prompts; name held-out datasets with --data"
        )
    plan = TeacherPlan(arguments.teacher, tuple(arguments.data), **{**_DEFAULTS, **given})
    plan.check("--teacher-")
    return TeacherMeasurement(plan, arguments)


class TeacherMeasurement(Measurement):
    """The part ``against_teacher`` of a report.

    Args:
        plan: what is compared.
        arguments: which say where and how models are loaded.
    """

    def __init__(self, plan: TeacherPlan, arguments: argparse.Namespace) -> None:
        self.plan = plan
        self._arguments = arguments
        self._is_checkpoint = is_megatron_checkpoint(plan.teacher, "--teacher")
        self._record: TeacherRecord | None = None
        self._tokenizer: Path = plan.teacher if arguments.tokenizer is None else arguments.tokenizer
        if self._is_checkpoint:
            settings = [] if self._is_alone else arguments.parallel
            request = request_checkpoint(
                plan.teacher,
                settings=settings,
                device=arguments.device,
                dtype=arguments.dtype,
                world_size=arguments.world_size,
                flag="--teacher",
                is_teacher=True,
            )
            self._request = for_reading(request)
            tokenizer = arguments.tokenizer or request.tokenizer
            if tokenizer is None:
                raise DataError(
                    f"{request.checkpoint} carries no tokenizer; name the one that its data were made with: "
                    "--tokenizer FOLDER"
                )
            self._tokenizer = tokenizer
        else:
            check_model_folder(plan.teacher, arguments.trust_remote_code)
        _check_vocabularies(arguments.model, plan.teacher)

    @property
    def _is_alone(self) -> bool:
        """Whether the model is a Hugging Face folder, which has no ranks."""
        return not is_megatron_checkpoint(self._arguments.model)

    def prepare(self, groups: ProcessGroups | None) -> None:
        from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

        ignore_megatron_warnings()  # before megatron-core, which comes with both
        from spikingbrain_train.evaluation.against_teacher import recording
        from spikingbrain_train.evaluation.checkpoint_model import joined_ranks

        if not self._is_checkpoint:
            load = partial(
                load_folder,
                self.plan.teacher,
                device=self._arguments.device,
                dtype=self._arguments.dtype,
                trust_remote_code=self._arguments.trust_remote_code,
            )
            self._record = recording.record_of_folder(self.plan, load, self._tokenizer, groups)
        elif groups is not None:
            self._record = recording.record_of_checkpoint(self.plan, self._request, self._tokenizer, groups)
        else:
            with joined_ranks(self._request) as alone:
                self._record = recording.record_of_checkpoint(
                    self.plan, self._request, self._tokenizer, alone
                )

    def measure(self, model: LanguageModel) -> Part:
        from spikingbrain_train.evaluation.against_teacher.comparison import compare

        assert self._record is not None
        found, name = compare(model, self._record), str(self.plan.teacher)
        return Part("against_teacher", found.as_json(name), found.describe(name))


def _check_vocabularies(model: Path, teacher: Path) -> None:
    student, known = _vocab_size(model, "--model"), _vocab_size(teacher, "--teacher")
    if None not in (student, known) and student != known:
        raise ConfigurationError(
            f"--teacher {teacher} knows {known} token ids and --model {model} {student}; name the dense "
            "source of the model"
        )


def _vocab_size(folder: Path, flag: str) -> int | None:
    if is_megatron_checkpoint(folder, flag):
        return read_stored_model(resolve_checkpoint(folder, flag)).vocab_size
    return load_config_json(folder).get("vocab_size")
