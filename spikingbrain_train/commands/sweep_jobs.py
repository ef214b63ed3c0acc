"""The jobs of a sweep: ``optimizer.lr=1e-4,2e-4 seed=1,2`` is four runs, each in a folder that says which."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from spikingbrain_train.commands.ranks import Ranks
from spikingbrain_train.config.compose import compose_run, explain_composition, groups
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.plugins import load_plugins, plugins_of_command_line
from spikingbrain_train.config.stored_config import stored_config_file, with_stored_config
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.pipelines.kinds.train import hydra_value
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import launched_world_size
from spikingbrain_train.training.callbacks.named import check_named_classes

_OUTPUT = "output_dir"
_LONGEST_NAME = 120
_FLAGS_WITH_VALUE = ("--config", "--config-dir", "-cd", "--config-name", "-cn")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    varied: tuple[str, ...]
    """What it has that others have not, as ``name=value``."""
    words: tuple[str, ...]
    """Arguments of ``spikingbrain-train``, output_dir among them."""
    output_dir: Path


def expand(words: Sequence[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every combination of the swept values, the last setting varying fastest.

    Args:
        words: a command line in Hydra's syntax: ``a=1,2``, ``a=range(1,4)``, ``model=glob(tiny*)`` are swept.

    Returns:
        Of each job what varies, and its whole command line.

    Raises:
        ConfigurationError: a word cannot be read, or nothing is swept.
    """
    choices: list[list[tuple[str, bool]]] = []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        waiting = iter(words)
        for word in waiting:
            if word.startswith("-"):
                choices.append([(word, False)])
                if word in _FLAGS_WITH_VALUE:
                    choices.append([(next(waiting, ""), False)])
                continue
            try:
                (override,) = parser.parse_overrides([word])
            except HydraException as error:
                raise explain_composition(error) or error from error
            if not override.is_sweep_override():
                choices.append([(word, False)])
                continue
            if not override.is_discrete_sweep():
                raise ConfigurationError(f"{word} has no end of values; write them out, as name=1,2,3")
            key = override.get_key_element()
            choices.append([(f"{key}={value}", True) for value in override.sweep_string_iterator()])
    if all(len(values) == 1 for values in choices):
        raise ConfigurationError(
            "--multirun varies nothing; give a setting several values, as optimizer.lr=1e-4,2e-4"
        )
    return [
        (tuple(word for word, swept in job if swept), tuple(word for word, _ in job))
        for job in itertools.product(*choices)
    ]


def folder_name(varied: Sequence[str], keys: Sequence[str]) -> str:
    """What varies as the name of a folder, e.g. ``lr_1e-4__seed_1``: no letter of it means anything to Hydra.

    Args:
        varied: ``name=value`` of one job.
        keys: names of all swept settings; the last part of a name that two of them share is not enough.
    """
    lasts = [key.rpartition(".")[2] for key in keys]
    parts = []
    for word in varied:
        key, _, value = word.partition("=")
        last = key.rpartition(".")[2]
        name = last if lasts.count(last) == 1 else key
        parts.append("_".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in (name, value)))
    whole = "__".join(parts)
    if len(whole) <= _LONGEST_NAME:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{whole[:_LONGEST_NAME]}-{digest}"


def plan_jobs(words: Sequence[str], ranks: Ranks | None, *, elsewhere: bool) -> list[Job]:
    """The jobs of a command line, each composed and checked.

    Args:
        words: arguments of ``spikingbrain-train`` with swept settings.
        ranks: how many ranks each job starts; None starts one.
        elsewhere: the jobs run on a cluster, whose ranks are those that the layout needs.

    Raises:
        SpikingBrainError: naming the job that cannot run, before any of them does.
    """
    load_plugins(plugins_of_command_line(list(words), stored_config_file(words)))
    expanded = expand(words)
    jobs: list[Job] = []
    for varied, job_words in expanded:
        try:
            jobs.append(_job(varied, job_words, ranks, elsewhere))
        except SpikingBrainError as error:
            raise type(error)(
                f"job {len(jobs) + 1} of {len(expanded)} ({' '.join(varied)}): {error}"
            ) from error
    folders = [job.output_dir for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigurationError(
                f"{folders.count(folder)} jobs would write into {folder}; leave a swept value out"
            )
    return jobs


def _job(varied: tuple[str, ...], words: tuple[str, ...], ranks: Ranks | None, elsewhere: bool) -> Job:
    composed = compose_run(with_stored_config(words, groups()))
    given = not OmegaConf.is_missing(composed, _OUTPUT)
    if not given:
        raise ConfigurationError(
            f"{_OUTPUT} is missing; give the folder of the sweep, every job gets one in it"
        )
    keys = [word.partition("=")[0] for word in varied]
    folder = Path(composed[_OUTPUT])
    if _OUTPUT not in keys:
        folder = folder / folder_name(varied, keys)
        kept = (word for word in words if word.partition("=")[0] != _OUTPUT)
        words = (*kept, f"{_OUTPUT}={hydra_value(str(folder))}")
        composed[_OUTPUT] = str(folder)
    composed.dry_run = True
    config = to_run_config(composed)
    size = None if ranks is None else ranks.world_size()
    if size is None:
        size = launched_world_size(config) if elsewhere or ranks is not None else 1
    config.dry_run = False
    check_run_config(config, size)
    check_named_classes(config)
    return Job(varied, words, folder)
