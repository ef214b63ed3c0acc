"""Command lines that ask to be shown something: ``--help``, ``--help=optimizer.lr``, ``--cfg job``.

Hydra would print what it knows: interpolations, and no word on any setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.groups import choices_of, chosen_by_default, groups
from spikingbrain_train.config.help_text import FROM_CHECKPOINT, OVERVIEW_OF_TRAIN, Manual
from spikingbrain_train.config.manual import sections_of
from spikingbrain_train.config.model_from_checkpoint import with_model_of_checkpoint
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.config.shown import shown

_PARTS = "  # what is not listed here is that of the checkpoint in checkpoint.load"


@dataclass(frozen=True)
class Asked:
    """What a command line asks to be shown."""

    topic: str | None = None
    """Of ``--help``; empty asks for all of it, None for no help."""
    config: bool = False
    """``--cfg job``: the config of the run."""

    @classmethod
    def of(cls, arguments: Sequence[str]) -> tuple[Asked, list[str]]:
        """What is asked, and the arguments without the flags that ask."""
        rest, topic, config = list(arguments), None, False
        for flag in [each for each in rest if each in ("-h", "--help") or each.startswith("--help=")]:
            at = rest.index(flag)
            topic = flag.partition("=")[2]
            end = at + 1
            if "=" not in flag and end < len(rest) and "=" not in rest[end] and rest[end][0:1] != "-":
                topic, end = rest[end], end + 1
            del rest[at:end]
        # Resolved values, and parts of a config, are Hydra's.
        if not {"--resolve", "--package", "-p"} & set(rest):
            for position, word in enumerate(rest):
                if word == "--cfg=job" or (word in ("--cfg", "-c") and rest[position + 1 :][:1] == ["job"]):
                    del rest[position : position + (1 if "=" in word else 2)]
                    config = True
                    break
        return cls(topic, config), rest

    def answer(self, composed: DictConfig) -> str | None:
        """What to print for the run that was composed; None where nothing was asked.

        Raises:
            ConfigurationError: help is asked about something that is not there.
        """
        if self.topic is not None:
            manual = manual_of_run(composed)
            return manual.about(self.topic) if self.topic else manual.overview(OVERVIEW_OF_TRAIN)
        return config_as_yaml(composed) if self.config else None


def config_as_yaml(composed: DictConfig) -> str:
    """The config of a run as YAML that ``--config`` takes back.

    The model of a checkpoint is written out; where the checkpoint is not there, it is left out.
    """
    values = with_model_of_checkpoint(composed, otherwise=None)
    lines = OmegaConf.to_yaml(OmegaConf.create(values)).splitlines()
    if values != with_model_of_checkpoint(composed, otherwise=FROM_CHECKPOINT):
        lines = [line + _PARTS if line.startswith("model:") else line for line in lines]
    return "\n".join(lines)


def manual_of_run(composed: DictConfig | None = None) -> Manual:
    """Everything about the settings of runs.

    Args:
        composed: the run whose values are shown beside them; None shows defaults alone.
    """
    schema = with_sections(RunConfig)
    values: dict[str, str] = {}
    if composed is not None:
        plain = with_model_of_checkpoint(composed, otherwise=FROM_CHECKPOINT)
        values = {name: shown(value) for name, value in _leaves(plain)}
    return Manual(list(sections_of(schema)), groups(), chosen_by_default(), values)


def manual_of_conversion() -> Manual:
    """Everything about the settings of recipes, which conversions follow."""
    recipes = {"conversion": choices_of("conversion")}
    return Manual(list(sections_of(with_sections(ConversionConfig))), recipes, {}, {}, of_run=False)


def _leaves(values: Any, prefix: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
