"""The code of an export makes the model that its weights are of: held parameter by parameter, without memory.

Files of kinds from outside have nobody else who holds them to what their kinds declare.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from spikingbrain_train.conversion.safetensors_io import TensorSpec
from spikingbrain_train.errors import CheckpointError


def check_code(
    code: Mapping[str, str], config: dict[str, Any], specs: Iterable[TensorSpec], kinds: str
) -> None:
    """Run an export's code on the meta device.

    Args:
        code: texts of its files by their names.
        config: its config.json.
        specs: of its tensors.
        kinds: whose files these are, for sentences.

    Raises:
        CheckpointError: the code fails, or makes a model of other tensors.
    """
    try:
        made = _tensors(code, config)
    except Exception as error:  # code of others raises whatever it likes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the code for exports of {kinds} cannot make the model: {reason}") from error
    written = {spec.name: tuple(spec.shape) for spec in specs}
    if config.get("tie_word_embeddings"):
        made.pop("lm_head.weight", None)
    for name in dict.fromkeys([*written, *made]):
        if written.get(name) != made.get(name):
            declared = f"of shape {list(written[name])}" if name in written else "none"
            has = f"has it with shape {list(made[name])}" if name in made else "has none"
            raise CheckpointError(
                f"the weights of {kinds} do not fit their code for exports: {name} is {declared} by what "
                f"weights and tensor_names declare, and the model that the code makes {has}"
            )


def _tensors(code: Mapping[str, str], config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the model."""
    package = f"_export_{uuid.uuid4().hex}"
    modules = {key: value.split(".") for key, value in config["auto_map"].items()}
    with TemporaryDirectory(prefix="spikingbrain-export-") as folder:
        for name, text in code.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        root = ModuleType(package)
        root.__path__ = [folder]
        sys.modules[package] = root
        dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            configuration, model = (
                getattr(importlib.import_module(f"{package}.{module}"), cls)
                for module, cls in (modules["AutoConfig"], modules["AutoModelForCausalLM"])
            )
            with torch.device("meta"):
                built = model(configuration(**config))
            return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        finally:
            sys.dont_write_bytecode = dont_write
            for name in [each for each in sys.modules if each.split(".")[0] == package]:
                del sys.modules[name]
