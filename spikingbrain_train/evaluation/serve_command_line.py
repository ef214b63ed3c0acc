"""Arguments of spikingbrain-serve, understood before torch is imported."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.folder_model import load_folder
from spikingbrain_train.evaluation.model_arguments import (
    NUMBER_FORMATS,
    add_device,
    add_number_format,
    add_trust,
)
from spikingbrain_train.evaluation.model_folder import check_model_folder, is_megatron_checkpoint
from spikingbrain_train.reporting.activity import activity

PACKAGES = ("fastapi", "uvicorn", "openai")
"""What transformers' server needs beside what this project needs anyway: the extra ``serve``."""

_DESCRIPTION = """\
Answer OpenAI's chat and completion requests with a Hugging Face folder: an export, whose own modelling code
`transformers serve` does not find, or a dense model. The server is that of transformers; one request is
computed at a time.
"""

_EXAMPLES = """\
examples:
  spikingbrain-serve --model outputs/smollm2/export --trust-remote-code
  curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is a spike?"}], "temperature": 0}'
"""


def serve_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-serve."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder with safetensors"
    )
    parser.add_argument("--name", help="what requests may call the model (default: the name of its folder)")
    parser.add_argument(
        "--host",
        default="localhost",
        help="address to listen at; 0.0.0.0 lets other machines ask, without any password "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes one that is free (default: %(default)s)"
    )
    add_number_format(parser, (*NUMBER_FORMATS, "float16"))
    add_device(parser)
    add_trust(parser)
    return parser


def serve(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-serve."""
    parsed = serve_parser().parse_args(arguments)
    with user_errors():
        _check(parsed)
        model = load_folder(
            parsed.model,
            device=parsed.device,
            dtype=parsed.dtype,
            trust_remote_code=parsed.trust_remote_code,
        )
        with activity("importing the server"):
            from spikingbrain_train.evaluation.chat_server import ChatServer
        folder, name = parsed.model, parsed.name or parsed.model.resolve().name
        ChatServer(model, folder, name).run(parsed.host, parsed.port)


def _check(parsed: argparse.Namespace) -> None:
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"spikingbrain-serve needs {', '.join(missing)}; install the extra: pip install -e '.[serve]'"
        )
    if not 0 <= parsed.port <= 65535:
        raise ConfigurationError(f"--port {parsed.port} is no port; give one from 0 (any free one) to 65535")
    if parsed.name is not None and not parsed.name.strip():
        raise ConfigurationError("--name is empty; give a name, or leave it out for that of the folder")
    if is_megatron_checkpoint(parsed.model):
        raise ConfigurationError(
            f"--model {parsed.model} is a Megatron checkpoint, which no server of transformers reads; write "
            "it as a Hugging Face folder with spikingbrain-export first"
        )
    check_model_folder(parsed.model, parsed.trust_remote_code)
