"""The chosen layout as a file of the group ``parallel``, and the command that trains with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.layouts.search import Found
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.storage.durable_files import write_text_durably

_GROUP = "parallel"


def check_output(path: Path) -> None:
    """Hydra finds a choice of the group ``parallel`` in a folder of that name. Raises ConfigurationError."""
    if path.suffix != ".yaml" or path.resolve().parent.name != _GROUP:
        raise ConfigurationError(
            f"--output {path} is no choice of the group {_GROUP}: Hydra finds those as <folder>/{_GROUP}/"
            f"<name>.yaml; name it so, e.g. --output my_conf/{_GROUP}/{path.stem or 'layout'}.yaml"
        )


def write_layout(found: Found, path: Path) -> None:
    """Write the section ``parallel``, what is not a default, with what is predicted of it above."""
    config, world_size = found.plan.config, found.plan.world_size
    stage, time = config.stage, found.time
    fullest = found.plan.fullest.memory.total / GIB
    head = (
        f"# {found.layout.describe(world_size)} on {world_size} GPUs, as spikingbrain-plan-parallel "
        "chose it.\n"
        f"# For {stage.global_batch_size} sequences of {stage.seq_length} tokens a step, "
        f"stage.micro_batch_size={stage.micro_batch_size}.\n"
        f"# Predicted: {fullest:.1f} GiB on the fullest GPU, {time.seconds:.3g} s a step, "
        f"an MFU of {time.mfu:.1%}.\n"
    )
    text = yaml.safe_dump(_without_defaults(config.parallel, ParallelConfig()), sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(path, head + text)


def arguments_for(found: Found, path: Path, asked: Sequence[str]) -> list[str]:
    """What ``spikingbrain-train`` and ``spikingbrain-plan`` take to train with it.

    Args:
        found: the layout.
        path: where it was written.
        asked: the settings that the search was asked with.
    """
    kept = [word for word in asked if word.partition("=")[0] not in (_GROUP, "stage.micro_batch_size")]
    words = [*kept, f"{_GROUP}={path.stem}", f"stage.micro_batch_size={found.layout.micro_batch_size}"]
    folder = path.resolve().parent
    if folder != (conf_folder() / _GROUP).resolve():
        words.append(f"hydra.searchpath=[file://{folder.parent}]")
    return words


def command_for(found: Found, path: Path, asked: Sequence[str]) -> str:
    """A command line with them."""
    return shlex.join(["spikingbrain-train", *arguments_for(found, path, asked)])


def _without_defaults(section: Any, default: Any) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for each in fields(section):
        value, usual = getattr(section, each.name), getattr(default, each.name)
        if value == usual:
            continue
        if hasattr(value, "__dataclass_fields__"):
            written[each.name] = _without_defaults(value, usual)
        else:
            written[each.name] = value.name if isinstance(value, Enum) else value
    return written
