"""Arguments of spikingbrain-generate, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation import checkpoint_commands
from spikingbrain_train.evaluation.chat_prompts import (
    ChatPrompt,
    add_chat_options,
    chat_prompt,
    check_chat_options,
)
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
from spikingbrain_train.evaluation.model_folder import (
    check_output_file,
)
from spikingbrain_train.evaluation.output import show_text, write_result
from spikingbrain_train.evaluation.routed_prompts import add_routed_option, take_prompts
from spikingbrain_train.evaluation.sampling import AUTOMATIC_PIECE, Sampling
from spikingbrain_train.reporting.activity import activity

if TYPE_CHECKING:
    pass

_DESCRIPTION = """\
Continue prompts with a Hugging Face folder or a Megatron checkpoint of any form, and say how fast that was
and how much memory the text took: a hybrid keeps recurrent states of constant size and the last tokens of its
windows.
"""

_EXAMPLES = """\
examples:
  spikingbrain-generate --model outputs/smollm2/cpt --prompt "The for statement"

  # the likeliest token each time, of two texts
  spikingbrain-generate --model outputs/smollm2/cpt --prompt "The for statement" --prompt "A class" \\
      --temperature 0 --max-new-tokens 64

  # what a user says to a chat model; the answer ends where the tokenizer's chat template ends it
  spikingbrain-generate --model outputs/smollm2/sft --chat --prompt "What is a spike?"

  # a prompt of any length, read 1024 tokens at a time
  spikingbrain-generate --model outputs/smollm2/cpt --prompt "$(cat book.txt)" --prefill-chunk 1024

  # an exported hybrid, whose folder brings its own modelling code
  spikingbrain-generate --model outputs/smollm2/export --prompt "The for statement" --trust-remote-code

  # each prompt with the adapter that was chosen for it
  spikingbrain-generate --model outputs/attached --routed choices.json

  # the same with adapters beside a Hugging Face folder
  spikingbrain-generate --model models/base --routed choices.json \\
      --adapters code=adapters/code math=adapters/math

  # a checkpoint over two devices
  spikingbrain-generate --nproc-per-node 2 --model outputs/big --prompt "The for statement" --parallel pp2
"""


def generate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-generate."""
    parser = inference_parser(_DESCRIPTION, _EXAMPLES)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on from; give it again for another text",
    )
    add_routed_option(prompts, "or")
    add_adapters_option(parser)
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
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of the prompt that are read at a time, so that memory is for so many whatever the "
        "prompt's length; context-parallel ranks read so many each "
        f"(default: {AUTOMATIC_PIECE} where a prompt is longer)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default: %(default)s)")
    return parser


def generate(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-generate."""
    run_inference(generate_parser(), _prepare_generation, arguments, elsewhere)


def _prepare_generation(arguments: argparse.Namespace) -> Callable[[], None]:
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        prefill_chunk=arguments.prefill_chunk,
    )
    check_chat_options(arguments)
    arguments.choices = take_prompts(arguments)
    if not all(arguments.prompt):
        raise ConfigurationError("--prompt is empty; give at least one word to go on from")
    for flag, text in (*(("--prompt", text) for text in arguments.prompt), ("--system", arguments.system)):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ConfigurationError(f"{flag} holds bytes that are no UTF-8; convert the text") from None
    check_output_file(arguments.output, "--output")
    check_adapters_option(arguments)
    if check_model_files(arguments):
        return checkpoint_commands.prepare_generation(arguments, sampling)
    folders = routed_folders(arguments, arguments.choices)
    return partial(_generate, arguments, folders, sampling)


def _generate(arguments: argparse.Namespace, folders: Mapping[str, Path], sampling: Sampling) -> None:
    with activity("importing torch and transformers"):
        from spikingbrain_train.evaluation.generation import generate_text
        from spikingbrain_train.evaluation.pretrained import load_text_tokenizer

    model = load_model(arguments)
    adapters = FolderAdapters(model, folders) if folders else None
    tokenizer = load_text_tokenizer(arguments.tokenizer or arguments.model)
    generations = []
    prompts: list[str | ChatPrompt] = list(arguments.prompt)
    if arguments.chat:
        path = arguments.tokenizer or arguments.model
        prompts = [chat_prompt(tokenizer, path, prompt, arguments.system) for prompt in arguments.prompt]
    for prompt, choice in zip(prompts, arguments.choices, strict=True):
        if adapters is not None:
            adapters.choose(choice)
        generation = generate_text(model, tokenizer, prompt, sampling, show_text)
        print(generation.describe() + ("" if choice is None else f"; with {choice}"))
        generations.append(asdict(generation) | ({} if choice is None else {"chosen": choice}))
    if arguments.output is not None:
        write_result(arguments.output, generations if len(generations) > 1 else generations[0])
