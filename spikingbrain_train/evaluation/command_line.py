"""Arguments of spikingbrain-evaluate, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation import checkpoint_commands
from spikingbrain_train.evaluation.folder_adapters import (
    FolderAdapters,
    add_adapters_option,
    check_adapters_option,
    routed_folders,
)
from spikingbrain_train.evaluation.inference_command_line import (
    Elsewhere,
    check_model_files,
    inference_parser,
    load_model,
    run_inference,
)
from spikingbrain_train.evaluation.measurement import finish_report
from spikingbrain_train.evaluation.model_folder import (
    check_output_file,
)
from spikingbrain_train.evaluation.probe_options import add_probe_options, probes_of
from spikingbrain_train.evaluation.routed_prompts import add_routed_option, routed_prompts
from spikingbrain_train.evaluation.routed_texts import routed_of
from spikingbrain_train.evaluation.task_options import add_task_options, tasks_of
from spikingbrain_train.evaluation.teacher_options import add_teacher_options, teacher_of
from spikingbrain_train.planning.file_checks import check_prefix
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.formats import format_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spikingbrain_train.evaluation.result import Perplexity

_DESCRIPTION = """\
Measure the held-out cross entropy and perplexity (--data), multiple-choice tasks (--tasks), what is found
again in long texts (--probes), how far generated text is from that of the dense source (--teacher), and texts
that each have an adapter of their own (--routed).

The model is a Hugging Face folder (a dense source, or what spikingbrain-export wrote) or a Megatron
checkpoint of any form (what spikingbrain-convert or a run wrote, in whatever topology). The windows are those
that a run evaluates on with the same stage.seq_length.
"""

_EXAMPLES = """\
examples:
  # a dense model on all held-out tokens, in windows of 1024
  spikingbrain-evaluate --model models/SmolLM2-135M-Instruct --data outputs/smollm2/data/text_valid \\
      --seq-length 1024

  # the newest checkpoint of a run, as it is
  spikingbrain-evaluate --model outputs/smollm2/cpt --data outputs/smollm2/data/text_valid --seq-length 1024

  # a checkpoint too big for one device: degrees as to train (conf/parallel, or name=value)
  spikingbrain-evaluate --nproc-per-node 4 --model outputs/big/checkpoints/iter_0002000 \\
      --data data/wiki_valid data/code_valid --seq-length 8192 --parallel tp2_pp2

  # multiple choice on local files, and how much of it is a liking for a letter
  spikingbrain-evaluate --model outputs/smollm2/cpt --tasks mmlu,arc_challenge,piqa --task-data data/tasks \\
      --permutations --output tasks.json --plot tasks.png

  # what it finds again in long texts, as a table and a picture
  spikingbrain-evaluate --model outputs/smollm2/cpt --probes passkey,needle,associative_recall \\
      --probe-lengths 1k,4k,16k --output probes.json --plot probes.png

  # whether it writes what its dense source writes
  spikingbrain-evaluate --model outputs/smollm2/cpt --data outputs/smollm2/data/text_valid \\
      --teacher models/SmolLM2-135M-Instruct --output teacher.json --plot teacher.png

  # texts for which spikingbrain-bricks route has chosen adapters of the checkpoint
  spikingbrain-evaluate --model outputs/attached --routed choices.json --output routed.json

  # an exported hybrid, whose folder brings its own modelling code
  spikingbrain-evaluate --model outputs/smollm2/export --data outputs/smollm2/data/text_valid \\
      --seq-length 1024 --trust-remote-code
"""


def evaluate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-evaluate."""
    parser = inference_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="held-out indexed datasets, without .bin/.idx, to measure the cross entropy on; of those with a "
        "loss mask (docs/sft.md) on the answers, each example whole",
    )
    parser.add_argument(
        "--seq-length", type=int, default=2048, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="use the first N windows (default: all)")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="windows that a rank processes at a time, for a Megatron checkpoint (default: 1); no number "
        "depends on it but that of experts with a capacity",
    )
    parser.add_argument(
        "--reset-at-documents",
        choices=("true", "false"),
        help="keep the documents of a window apart, for a Megatron checkpoint (default: as the run that "
        "wrote it)",
    )
    add_task_options(parser)
    add_probe_options(parser)
    add_teacher_options(parser)
    routed = parser.add_argument_group(
        "adapters chosen for each text",
        "cross entropy with the adapter that was chosen, with the best of those that were, and without any",
    )
    add_routed_option(routed, "measure")
    add_adapters_option(routed)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw tasks, probes and comparison: .png, .svg or .pdf"
    )
    return parser


def evaluate(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-evaluate."""
    run_inference(evaluate_parser(), _prepare_evaluation, arguments, elsewhere)


def check_evaluation_options(arguments: argparse.Namespace) -> None:
    """What is wrong with the flags, as far as files that are here tell.

    Raises:
        SpikingBrainError: naming the flag.
    """
    _check_numbers(arguments)
    asked = [arguments.tasks, arguments.probes, arguments.teacher]
    if arguments.task_data is None or arguments.task_data.is_dir():
        tasks_of(arguments)
    if arguments.probe_text is None or arguments.probe_text.is_file():
        probes_of(arguments)
    if arguments.teacher is None:
        teacher_of(arguments)
    check_adapters_option(arguments)
    if arguments.routed is None or arguments.routed.is_file():
        routed_of(arguments)
    is_drawn = any(each is not None for each in asked)
    _check_picture(arguments, is_drawn)
    _check_something(arguments, is_drawn or arguments.routed is not None)


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("seq_length", "max_windows", "micro_batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if value is not None and value >= 2**31:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give less than 2**31")


def _check_something(arguments: argparse.Namespace, is_measured: bool) -> None:
    if not arguments.data and not is_measured:
        raise ConfigurationError(
            "there is nothing to measure; name held-out datasets with --data, tasks with --tasks, probes "
            "with --probes, or routed texts with --routed"
        )


def _prepare_evaluation(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_numbers(arguments)
    drawn = [tasks_of(arguments), probes_of(arguments), teacher_of(arguments)]
    # Adapters last: the others measure the model as it is.
    arguments.measurements = [each for each in (*drawn, routed_of(arguments)) if each is not None]
    check_adapters_option(arguments)
    _check_picture(arguments, any(each is not None for each in drawn))
    _check_something(arguments, bool(arguments.measurements))
    check_output_file(arguments.output, "--output")
    is_checkpoint = check_model_files(arguments)
    for prefix in arguments.data:
        check_prefix("--data", prefix)
    if is_checkpoint:
        return checkpoint_commands.prepare_evaluation(arguments)
    for name in ("micro_batch_size", "reset_at_documents"):
        if getattr(arguments, name) is not None:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} is for Megatron checkpoints, but {arguments.model} is a Hugging "
                "Face folder; leave it out"
            )
    choices = [] if arguments.routed is None else routed_prompts(arguments.routed)[1]
    return partial(_evaluate, arguments, routed_folders(arguments, choices))


def _check_picture(arguments: argparse.Namespace, is_measured: bool) -> None:
    if arguments.plot is None:
        return
    if not is_measured:
        raise ConfigurationError(
            f"--plot {arguments.plot} would be empty; name what it draws with --tasks, --probes or --teacher"
        )
    format_of(arguments.plot, "--plot")
    if arguments.output is not None and arguments.plot.resolve() == arguments.output.resolve():
        raise ConfigurationError(
            f"--plot and --output both name {arguments.plot}; give the picture a file of its own"
        )
    check_output_file(arguments.plot, "--plot")


def _evaluate(arguments: argparse.Namespace, folders: Mapping[str, Path]) -> None:
    for measurement in arguments.measurements:
        measurement.prepare(None)
    model = load_model(arguments)
    dtype = _dtype_name(model.dtype)
    words = f"{arguments.model} ({type(model).__name__}, {dtype})"
    numbers: dict[str, Any] = {"model": str(arguments.model), "dtype": dtype}
    if arguments.data:
        measured = _cross_entropy(model, arguments)
        print(measured.describe(words))
        numbers = measured.as_json(**numbers)
    else:
        print(f"model          {words}")
    parts = []
    if arguments.measurements:
        from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

        tokenizer = TextTokenizer(arguments.tokenizer or arguments.model)
        adapters = FolderAdapters(model, folders) if folders else None
        if adapters is not None:
            adapters.choose(None)  # until texts come that one was chosen for
        asked = HuggingFaceLanguageModel(model, tokenizer, adapters=adapters)
        parts = [measurement.measure(asked) for measurement in arguments.measurements]
    finish_report(numbers, parts, output=arguments.output, picture=arguments.plot)


def _cross_entropy(model: PreTrainedModel, arguments: argparse.Namespace) -> Perplexity:
    with activity("opening the data"):
        from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

        ignore_megatron_warnings()  # before megatron-core, which comes with the loss
        from spikingbrain_train.data.held_out import open_held_out
        from spikingbrain_train.data.indexed import check_same_tokenizer
        from spikingbrain_train.data.tokenizers import load_tokenizer
        from spikingbrain_train.evaluation.held_out_windows import describe_datasets
        from spikingbrain_train.evaluation.perplexity import measure_perplexity

        tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
        for prefix in arguments.data:
            check_same_tokenizer(prefix, tokenizer)
        dataset = open_held_out(
            arguments.data, arguments.seq_length, arguments.max_windows, model.config.vocab_size, alone=True
        )
    datasets = describe_datasets(dataset, arguments.data)
    return measure_perplexity(model, dataset, datasets, progress=True)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
