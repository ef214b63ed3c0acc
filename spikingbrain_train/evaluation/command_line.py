"""Arguments of spikingbrain-evaluate and spikingbrain-generate, understood before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.config.plugins import add_plugins_argument, load_plugins, plugins_of
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation import checkpoint_commands
from spikingbrain_train.evaluation.chat_prompts import (
    ChatPrompt,
    add_chat_options,
    chat_prompt,
    check_chat_options,
)
from spikingbrain_train.evaluation.checkpoint_request import without_settings
from spikingbrain_train.evaluation.folder_model import load_folder
from spikingbrain_train.evaluation.measurement import finish_report
from spikingbrain_train.evaluation.model_arguments import (
    NUMBER_FORMATS,
    add_device,
    add_number_format,
    add_trust,
)
from spikingbrain_train.evaluation.model_folder import (
    check_model_folder,
    check_output_file,
    is_megatron_checkpoint,
)
from spikingbrain_train.evaluation.output import show_text, write_result
from spikingbrain_train.evaluation.probe_options import add_probe_options, probes_of
from spikingbrain_train.evaluation.sampling import Sampling
from spikingbrain_train.evaluation.task_options import add_task_options, tasks_of
from spikingbrain_train.evaluation.teacher_options import add_teacher_options, teacher_of
from spikingbrain_train.planning.file_checks import check_prefix
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.picture import format_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spikingbrain_train.evaluation.result import Perplexity

_EVALUATE_DESCRIPTION = """\
Measure the held-out cross entropy and perplexity (--data), multiple-choice tasks (--tasks), what is found
again in long texts (--probes) and how far generated text is from that of the dense source (--teacher).

The model is a Hugging Face folder (a dense source, or what spikingbrain-export wrote) or a Megatron
checkpoint of any form (what spikingbrain-convert or a run wrote, in whatever topology). The windows are those
that a run evaluates on with the same stage.seq_length.
"""

_EVALUATE_EXAMPLES = """\
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
      --permutations --output tasks.json

  # what it finds again in long texts, as a table and a picture
  spikingbrain-evaluate --model outputs/smollm2/cpt --probes passkey,needle,associative_recall \\
      --probe-lengths 1k,4k,16k --output probes.json --plot probes.png

  # whether it writes what its dense source writes
  spikingbrain-evaluate --model outputs/smollm2/cpt --data outputs/smollm2/data/text_valid \\
      --teacher models/SmolLM2-135M-Instruct --output teacher.json --plot teacher.png

  # an exported hybrid, whose folder brings its own modelling code
  spikingbrain-evaluate --model outputs/smollm2/export --data outputs/smollm2/data/text_valid \\
      --seq-length 1024 --trust-remote-code
"""

_GENERATE_DESCRIPTION = """\
Continue prompts with a Hugging Face folder or a Megatron checkpoint of any form, and say how fast that was
and how much memory the text took: a hybrid keeps recurrent states of constant size and the last tokens of its
windows.
"""

_GENERATE_EXAMPLES = """\
examples:
  spikingbrain-generate --model outputs/smollm2/cpt --prompt "The for statement"

  # the likeliest token each time, of two texts
  spikingbrain-generate --model outputs/smollm2/cpt --prompt "The for statement" --prompt "A class" \\
      --temperature 0 --max-new-tokens 64

  # what a user says to a chat model; the answer ends where the tokenizer's chat template ends it
  spikingbrain-generate --model outputs/smollm2/sft --chat --prompt "What is a spike?"

  # an exported hybrid, whose folder brings its own modelling code
  spikingbrain-generate --model outputs/smollm2/export --prompt "The for statement" --trust-remote-code

  # a checkpoint over two devices
  spikingbrain-generate --nproc-per-node 2 --model outputs/big --prompt "The for statement" --parallel pp2
"""


def evaluate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-evaluate."""
    parser = inference_parser(_EVALUATE_DESCRIPTION, _EVALUATE_EXAMPLES)
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
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw probes and comparison: .png, .svg or .pdf"
    )
    return parser


def generate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-generate."""
    parser = inference_parser(_GENERATE_DESCRIPTION, _GENERATE_EXAMPLES)
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to go on from; give it again for another text",
    )
    add_chat_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="choose among the likeliest tokens that together have probability P (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default: %(default)s)")
    return parser


@dataclass(frozen=True)
class Elsewhere:
    """Ranks that do what a command line asks for, instead of this process."""

    world_size: int
    start: Callable[[], None]
    """Starts them and waits for their end."""


def evaluate(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-evaluate."""
    run_inference(evaluate_parser(), _prepare_evaluation, arguments, elsewhere)


def generate(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-generate."""
    run_inference(generate_parser(), _prepare_generation, arguments, elsewhere)


def inference_parser(description: str, epilog: str, *, output_file: bool = True) -> argparse.ArgumentParser:
    """The flags of every command that runs a model of any form.

    Args:
        description: what the command is for.
        epilog: examples.
        output_file: whether ``--output`` is a JSON file, and so added here.
    """
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folder with safetensors, or Megatron checkpoint: a run's folder or its "
        "checkpoints (the newest is taken), or one iter_* folder",
    )
    if output_file:
        parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    add_number_format(parser, (*NUMBER_FORMATS, "float16"))
    add_device(parser)
    add_trust(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer folder or sentencepiece .model file (default: that of the model's folder)",
    )
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="SETTING",
        help="how a Megatron checkpoint is spread over the ranks of --nproc-per-node (or torchrun): a layout "
        "of conf/parallel (tp2_pp2), settings (context_parallel_size=2), or both (default: all of it on "
        "every rank)",
    )
    add_plugins_argument(parser)
    return parser


def run_inference(
    parser: argparse.ArgumentParser,
    prepare: Callable[[argparse.Namespace], Callable[[], None]],
    arguments: Sequence[str] | None,
    elsewhere: Elsewhere | None,
) -> None:
    """Let ``prepare`` refuse what can be refused without torch; what it returns does the rest."""
    with user_errors(same_on_all_ranks=True):
        words, settings = without_settings(sys.argv[1:] if arguments is None else arguments)
        parsed = parser.parse_args(words)
        parsed.parallel = [*parsed.parallel, *settings]
        load_plugins(plugins_of(vars(parsed), "the command line"))
        parsed.world_size = Launch.from_environment().world_size
        if elsewhere is not None:
            parsed.world_size = elsewhere.world_size
        action = prepare(parsed)
    if elsewhere is not None:
        action = elsewhere.start
    with user_errors():
        action()
        sys.stdout.flush()


def _prepare_evaluation(arguments: argparse.Namespace) -> Callable[[], None]:
    for name in ("seq_length", "max_windows", "micro_batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if value is not None and value >= 2**31:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give less than 2**31")
    asked = (tasks_of(arguments), probes_of(arguments), teacher_of(arguments))
    arguments.measurements = [each for each in asked if each is not None]
    _check_picture(arguments)
    if not arguments.data and not arguments.measurements:
        raise ConfigurationError(
            "there is nothing to measure; name held-out datasets with --data, tasks with --tasks, or probes "
            "with --probes"
        )
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
    return partial(_evaluate, arguments)


def _check_picture(arguments: argparse.Namespace) -> None:
    if arguments.plot is None:
        return
    if not any(each.is_drawn for each in arguments.measurements):
        raise ConfigurationError(
            f"--plot {arguments.plot} would be empty; name what it draws with --probes or --teacher"
        )
    format_of(arguments.plot, "--plot")
    check_output_file(arguments.plot, "--plot")


def _evaluate(arguments: argparse.Namespace) -> None:
    for measurement in arguments.measurements:
        measurement.prepare(None)
    model = _load_model(arguments)
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
        asked = HuggingFaceLanguageModel(model, tokenizer)
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


def _prepare_generation(arguments: argparse.Namespace) -> Callable[[], None]:
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    check_chat_options(arguments)
    if not all(arguments.prompt):
        raise ConfigurationError("--prompt is empty; give at least one word to go on from")
    check_output_file(arguments.output, "--output")
    if check_model_files(arguments):
        return checkpoint_commands.prepare_generation(arguments, sampling)
    return partial(_generate, arguments, sampling)


def _generate(arguments: argparse.Namespace, sampling: Sampling) -> None:
    with activity("importing torch and transformers"):
        from spikingbrain_train.evaluation.generation import generate_text
        from spikingbrain_train.evaluation.pretrained import load_text_tokenizer

    model = _load_model(arguments)
    tokenizer = load_text_tokenizer(arguments.tokenizer or arguments.model)
    generations = []
    prompts: list[str | ChatPrompt] = list(arguments.prompt)
    if arguments.chat:
        path = arguments.tokenizer or arguments.model
        prompts = [chat_prompt(tokenizer, path, prompt, arguments.system) for prompt in arguments.prompt]
    for prompt in prompts:
        generation = generate_text(model, tokenizer, prompt, sampling, show_text)
        print(generation.describe())
        generations.append(asdict(generation))
    if arguments.output is not None:
        write_result(arguments.output, generations if len(generations) > 1 else generations[0])


def check_model_files(arguments: argparse.Namespace) -> bool:
    """Whether the model is a Megatron checkpoint. Refuses what lies there and cannot be used."""
    if arguments.tokenizer is not None and not arguments.tokenizer.exists():
        raise DataError(
            f"--tokenizer {arguments.tokenizer} does not exist; name a Hugging Face tokenizer folder or a "
            "sentencepiece .model file"
        )
    if is_megatron_checkpoint(arguments.model):
        return True
    check_model_folder(arguments.model, arguments.trust_remote_code)
    if arguments.parallel:
        raise ConfigurationError(
            f"--parallel {' '.join(arguments.parallel)} spreads a Megatron checkpoint, but {arguments.model} "
            "is a Hugging Face folder; leave it out, or import the folder with spikingbrain-convert"
        )
    if arguments.world_size > 1:
        raise ConfigurationError(
            f"{arguments.model} is a Hugging Face folder, which one process loads, not several; leave "
            "--nproc-per-node or torchrun out, or import the folder with spikingbrain-convert"
        )
    return False


def _load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    return load_folder(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
