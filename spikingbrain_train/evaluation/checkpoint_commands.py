"""spikingbrain-evaluate and -generate of a Megatron checkpoint: what is refused first, and what then runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.architecture.linear_transforms import choices_of
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.chat_prompts import ChatPrompt
from spikingbrain_train.evaluation.checkpoint_request import (
    CheckpointRequest,
    for_decoding,
    for_reading,
    request_checkpoint,
)
from spikingbrain_train.evaluation.measurement import Part, finish_report
from spikingbrain_train.evaluation.output import show_text, write_result
from spikingbrain_train.evaluation.routed_prompts import check_choices, routed_prompts
from spikingbrain_train.evaluation.sampling import Sampling
from spikingbrain_train.planning.parallel_checks import check_sequence_split
from spikingbrain_train.reporting.activity import activity

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.checkpoint_model import CheckpointModel


def prepare_evaluation(arguments: argparse.Namespace) -> Callable[[], None]:
    """What measures the checkpoint that ``--model`` names.

    Args:
        arguments: of spikingbrain-evaluate.

    Raises:
        ConfigurationError, CheckpointError: what can be said against them without torch.
    """
    request = _request(arguments)
    if arguments.data:
        _check_windows(arguments.seq_length, request)
    if arguments.measurements:
        _require_tokenizer(arguments, request)
    if arguments.routed is not None:
        _check_choices(arguments, routed_prompts(arguments.routed)[1], request)
    return partial(_evaluate, request, arguments)


def prepare_generation(arguments: argparse.Namespace, sampling: Sampling) -> Callable[[], None]:
    """What continues prompts with the checkpoint that ``--model`` names; see :func:`prepare_evaluation`."""
    request = for_decoding(_request(arguments), arguments.world_size)
    if arguments.routed is not None:
        _check_choices(arguments, arguments.choices, request)
    return partial(_generate, request, _require_tokenizer(arguments, request), arguments, sampling)


def _check_choices(arguments: argparse.Namespace, choices: Sequence[str], request: CheckpointRequest) -> None:
    if arguments.adapters is not None:
        raise ConfigurationError(
            f"--adapters stand beside a Hugging Face folder, but {arguments.model} is a Megatron checkpoint, "
            "which has its own; leave it out, or attach them with spikingbrain-bricks attach"
        )
    where = f"the adapters of {arguments.model}"
    check_choices(arguments.routed, choices, choices_of(request.model), where)


def _require_tokenizer(arguments: argparse.Namespace, request: CheckpointRequest) -> Path:
    tokenizer = arguments.tokenizer or request.tokenizer
    if tokenizer is None:
        raise DataError(
            f"{request.checkpoint} carries no tokenizer; name the one that its data were made with: "
            "--tokenizer FOLDER"
        )
    return Path(tokenizer)


def _request(arguments: argparse.Namespace) -> CheckpointRequest:
    return request_checkpoint(
        arguments.model,
        settings=arguments.parallel,
        device=arguments.device,
        dtype=arguments.dtype,
        world_size=arguments.world_size,
    )


def _check_windows(seq_length: int, request: CheckpointRequest) -> None:
    try:
        check_sequence_split(seq_length, request.model, request.parallel)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("stage.seq_length=", "--seq-length ")) from None


def _evaluate(request: CheckpointRequest, arguments: argparse.Namespace) -> None:
    _import_torch()
    from spikingbrain_train.evaluation.checkpoint_model import joined_ranks, open_checkpoint

    with joined_ranks(request) as groups:
        for measurement in arguments.measurements:
            measurement.prepare(groups)
        opened = open_checkpoint(request, groups)
        numbers: dict[str, Any] = {"model": str(request.checkpoint), "dtype": opened.dtype}
        if arguments.data:
            numbers = _cross_entropy(opened, arguments)
        elif groups.is_main_process:
            print(f"model          {request.checkpoint} ({_form(opened)})")
        if arguments.measurements and (to_read := for_reading(request)) != request:
            del opened  # never two in memory
            opened = open_checkpoint(to_read, groups)
        parts = _measure(opened, arguments)
        if groups.is_main_process:
            finish_report(numbers, parts, output=arguments.output, picture=arguments.plot)


def _cross_entropy(opened: CheckpointModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out cross entropy and what it was measured with, for the report; printed on the main process."""
    from spikingbrain_train.evaluation.checkpoint_evaluation import measure_checkpoint

    request = opened.request
    tokenizer = arguments.tokenizer or request.tokenizer
    if tokenizer is None:
        _note(
            f"{request.checkpoint} carries no tokenizer, so nobody checks that --data was made with its own; "
            "name it with --tokenizer"
        )
    reset = request.run is not None and request.run.data.reset_at_documents
    if arguments.reset_at_documents is not None:
        reset = arguments.reset_at_documents == "true"
    measured = measure_checkpoint(
        opened,
        arguments.data,
        seq_length=arguments.seq_length,
        max_windows=arguments.max_windows,
        micro_batch_size=arguments.micro_batch_size or 1,
        reset_at_documents=reset,
        tokenizer=tokenizer,
    )
    if not opened.groups.is_main_process:
        return {}
    kept_apart = ", documents kept apart" if reset else ""
    print(measured.describe(f"{request.checkpoint} ({_form(opened, kept_apart)})"))
    return measured.as_json(model=str(request.checkpoint), dtype=opened.dtype, reset_at_documents=reset)


def _measure(opened: CheckpointModel, arguments: argparse.Namespace) -> list[Part]:
    if not arguments.measurements:
        return []
    from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    tokenizer = TextTokenizer(_require_tokenizer(arguments, opened.request))
    model = MegatronLanguageModel(opened.model, opened.groups, tokenizer)
    return [measurement.measure(model) for measurement in arguments.measurements]


def _form(opened: CheckpointModel, more: str = "") -> str:
    ranks = "" if opened.groups.world_size == 1 else f"; {opened.groups.describe()}"
    return f"Megatron, {opened.dtype}{more}{ranks}"


def _generate(
    request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace, sampling: Sampling
) -> None:
    _import_torch()
    from spikingbrain_train.evaluation.checkpoint_generation import CheckpointGenerator
    from spikingbrain_train.evaluation.checkpoint_model import checkpoint_model
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    of_prompts = TextTokenizer(tokenizer)
    generations = []
    prompts: list[str | ChatPrompt] = list(arguments.prompt)
    if arguments.chat:
        prompts = [of_prompts.chat_prompt(prompt, arguments.system) for prompt in arguments.prompt]
    with checkpoint_model(request) as opened:
        generator = CheckpointGenerator(opened, of_prompts)
        if generator.mixers_without_step:
            _note(
                f"{', '.join(generator.mixers_without_step)} has no decoding step: its layers read the whole "
                "text again for every token"
            )
        for prompt, choice in zip(prompts, arguments.choices, strict=True):
            if choice is not None:
                opened.choose(choice)
            generation = generator.generate(prompt, sampling, show_text)
            if opened.groups.is_main_process:
                print(generation.describe() + ("" if choice is None else f"; with {choice}"))
            generations.append(asdict(generation) | ({} if choice is None else {"chosen": choice}))
        if opened.groups.is_main_process and arguments.output is not None:
            write_result(arguments.output, generations if len(generations) > 1 else generations[0])


def _import_torch() -> None:
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    with activity("importing torch and megatron-core", shown=_is_main_process()):
        ignore_megatron_warnings()
        import megatron.core.models.gpt  # noqa: F401  (the slow part)


def _note(text: str) -> None:
    if _is_main_process():
        print(f"note: {text}", file=sys.stderr, flush=True)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
