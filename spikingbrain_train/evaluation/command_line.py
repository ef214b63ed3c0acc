"""Arguments of spikingbrain-evaluate and spikingbrain-generate, understood before torch is imported."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.config.dataset_names import dataset_names
from spikingbrain_train.config.run_record import fingerprint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.model_folder import check_model_folder, check_output_file
from spikingbrain_train.evaluation.sampling import Sampling
from spikingbrain_train.planning.file_checks import check_prefix
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.durable_files import write_text_durably

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EVALUATE_DESCRIPTION = """\
Measure the held-out cross entropy and perplexity of a Hugging Face model: a dense source, or a hybrid that
spikingbrain-export wrote. The windows are those that a run evaluates on with the same stage.seq_length.
"""

_EVALUATE_EXAMPLES = """\
examples:
  # a dense model on all held-out tokens, in windows of 1024
  spikingbrain-evaluate --model models/SmolLM2-135M-Instruct --data outputs/smollm2/data/text_valid \\
      --seq-length 1024

  # an exported hybrid, whose folder brings its own modelling code
  spikingbrain-evaluate --model outputs/smollm2/export --data outputs/smollm2/data/text_valid \\
      --seq-length 1024 --trust-remote-code
"""

_GENERATE_DESCRIPTION = """\
Continue a prompt with a Hugging Face model, and say how fast that was and how much memory the text took:
a hybrid keeps recurrent states of constant size and the last tokens of its windows.
"""

_GENERATE_EXAMPLES = """\
examples:
  spikingbrain-generate --model outputs/smollm2/export --prompt "The for statement" --trust-remote-code

  # the likeliest token each time
  spikingbrain-generate --model outputs/smollm2/export --prompt "The for statement" --temperature 0 \\
      --max-new-tokens 64 --trust-remote-code
"""


def evaluate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-evaluate."""
    parser = _parser(_EVALUATE_DESCRIPTION, _EVALUATE_EXAMPLES)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="held-out indexed datasets, without .bin/.idx",
    )
    parser.add_argument(
        "--seq-length", type=int, default=2048, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="use the first N windows (default: all)")
    return parser


def generate_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-generate."""
    parser = _parser(_GENERATE_DESCRIPTION, _GENERATE_EXAMPLES)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
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


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-evaluate."""
    _run(evaluate_parser(), _evaluate, arguments)


def generate(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-generate."""
    _run(generate_parser(), _generate, arguments)


def _parser(description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder with safetensors"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number format to compute in; auto takes bfloat16 where the hardware multiplies it, else "
        "float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "metax"),
        default="auto",
        help="auto takes a GPU if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the modelling code that lies in the model's folder; every exported hybrid brings some",
    )
    return parser


def _run(
    parser: argparse.ArgumentParser,
    handler: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> None:
    with user_errors():
        handler(parser.parse_args(arguments))
        sys.stdout.flush()


def _evaluate(arguments: argparse.Namespace) -> None:
    for name in ("seq_length", "max_windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if value is not None and value >= 2**31:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; give less than 2**31")
    _check_files(arguments)
    for prefix in arguments.data:
        check_prefix("--data", prefix)
    model = _load_model(arguments)
    with activity("opening the data"):
        from spikingbrain_train.data.gpt_dataset import open_valid_dataset
        from spikingbrain_train.data.indexed import check_same_tokenizer
        from spikingbrain_train.data.tokenizers import load_tokenizer
        from spikingbrain_train.evaluation.perplexity import measure_perplexity

        tokenizer = load_tokenizer(arguments.model)
        for prefix in arguments.data:
            check_same_tokenizer(prefix, tokenizer)
        dataset = open_valid_dataset(
            arguments.data, arguments.seq_length, arguments.max_windows, model.config.vocab_size
        )
    measured = measure_perplexity(model, dataset, progress=True)
    print(f"model          {arguments.model} ({type(model).__name__}, {_dtype_name(model.dtype)})")
    print(f"held-out text  {measured.tokens:,} tokens in {measured.windows} windows of {measured.seq_length}")
    print(f"cross entropy  {measured.cross_entropy:.4f} nats per token")
    print(f"perplexity     {measured.perplexity:.3f}")
    if arguments.output is not None:
        held_out = _held_out(arguments.data, dataset.predicted_tokens())
        result = {**asdict(measured), "perplexity": measured.perplexity, "held_out": held_out}
        _write_json(arguments.output, result)


def _held_out(prefixes: Sequence[str], tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What was read, as the metrics of a run have it, so that a picture knows whether both read the same."""
    return {
        name: {"tokens": number, "fingerprint": fingerprint(prefix).digest}
        for name, prefix, number in zip(dataset_names(prefixes), prefixes, tokens, strict=True)
    }


def _generate(arguments: argparse.Namespace) -> None:
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if not arguments.prompt:
        raise ConfigurationError("--prompt is empty; give at least one word to go on from")
    _check_files(arguments)
    with activity("importing torch and transformers"):
        from spikingbrain_train.evaluation.generation import generate_text
        from spikingbrain_train.evaluation.pretrained import load_text_tokenizer

    model = _load_model(arguments)
    generation = generate_text(
        model, load_text_tokenizer(arguments.model), arguments.prompt, sampling, _show_text
    )
    speed = generation.tokens_per_second
    print(f"\n\n{generation.prompt_tokens} tokens read, {generation.new_tokens} written", end="")
    print("" if speed is None else f" at {speed:.1f} tokens/s")
    print(f"cache: {generation.cache.describe()}")
    if arguments.output is not None:
        _write_json(arguments.output, asdict(generation))


def _check_files(arguments: argparse.Namespace) -> None:
    check_model_folder(arguments.model, arguments.trust_remote_code)
    check_output_file(arguments.output, "--output")


def _load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    with activity("importing torch and transformers"):
        import torch

        from spikingbrain_train.config.parallel import AcceleratorKind
        from spikingbrain_train.config.run import Precision
        from spikingbrain_train.evaluation.pretrained import load_causal_lm
        from spikingbrain_train.runtime.accelerator import detect
        from spikingbrain_train.runtime.bf16 import choose_precision, slow_format_warning

    accelerator = detect(AcceleratorKind(arguments.device))
    if arguments.dtype == "auto":
        bf16 = choose_precision(accelerator).precision is Precision.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
    else:
        dtype = getattr(torch, arguments.dtype)
        slow = slow_format_warning(f"--dtype {arguments.dtype}", dtype, accelerator)
        if slow is not None:
            print(slow, file=sys.stderr, flush=True)
    with activity(f"loading {arguments.model}"):
        return load_causal_lm(
            arguments.model,
            trust_remote_code=arguments.trust_remote_code,
            dtype=dtype,
            device=accelerator.device(),
        )


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _show_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
