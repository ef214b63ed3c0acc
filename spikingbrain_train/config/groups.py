"""The groups of conf/ that a run chooses from, and what each choice says it is for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikingbrain_train.config.yaml_files import conf_folder


def purpose(choice: Path) -> str:
    """The comment on top of a file of conf/: its first line."""
    comments = [line.lstrip("# ") for line in choice.read_text().splitlines() if line.startswith("#")]
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def choices_of(group: str) -> dict[str, str]:
    """The choices of one folder of conf/, each with what it is for."""
    folder = conf_folder() / group
    return dict(_choices_of(folder, folder.stat().st_mtime_ns))


def chosen_by_default() -> dict[str, str | None]:
    """Every group of a run, and which choice it has where nothing else is said."""
    file = conf_folder() / "config.yaml"
    return dict(_chosen_by_default(file, file.stat().st_mtime_ns))


def groups() -> dict[str, dict[str, str]]:
    """Every group of a run: its choices, each with the comment on top of its file."""
    return {group: choices_of(group) for group in sorted(chosen_by_default())}


# Asked for with every composition, which they would make a fifteenth longer.
@lru_cache(maxsize=64)
def _choices_of(folder: Path, changed: int) -> dict[str, str]:
    return {choice.stem: purpose(choice) for choice in sorted(folder.glob("*.yaml"))}


@lru_cache(maxsize=1)
def _chosen_by_default(file: Path, changed: int) -> dict[str, str | None]:
    defaults: Any = OmegaConf.to_container(OmegaConf.load(file))
    listed = [entry for entry in defaults["defaults"] if isinstance(entry, dict)]
    folders = {folder.name for folder in file.parent.iterdir()}
    return {group: choice for entry in listed for group, choice in entry.items() if group in folders}
