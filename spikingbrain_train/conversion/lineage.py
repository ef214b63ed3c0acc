"""Where a checkpoint comes from, stage by stage back to its source, as far as stored facts tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.config.derivation import DERIVATION_FILE, Derivation, read_derivation
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.run_record import SamplesRead, read_record
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.conversion.report import REPORT_FILE
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.planning.ancestry import conversion_report, loaded_checkpoint
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.storage.checkpoint_folder import (
    RUN_CONFIG_FILE,
    is_iteration_folder,
    iteration_of,
)
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_MOST = 50  # steps: beyond, folders lead back to themselves


@dataclass(frozen=True)
class Step:
    """One folder on the way."""

    folder: str
    did: str
    """What made it, in words: ``stage cpt: 40 iterations, 40.96 k tokens``."""
    tokens: int | None = None
    """That its stage has read; None where it is no stage."""
    teacher: str | None = None
    """The folder that its stage learned from."""
    written: str | None = None
    """The day, as ``2026-11-26``."""

    def describe(self) -> str:
        """In a line."""
        learning = f", learning from {self.teacher}" if self.teacher else ""
        return f"{self.folder}: {self.did}{learning}" + (f", {self.written}" if self.written else "")


def lineage(folder: Path) -> list[Step]:
    """The folder, what it was made from, and so on to the source, which comes last.

    Args:
        folder: a Hugging Face folder, or the folder of an iteration.
    """
    found: list[Step] = []
    seen: set[Path] = set()
    here: Path | None = folder
    while here is not None and len(found) < _MOST:
        if (derivation := _derivation(here)) is not None:
            return [*found, _derived(here, derivation), *(Step(**step) for step in derivation.lineage)]
        step, here = _step(here)
        if Path(step.folder).resolve() in seen:
            break
        seen.add(Path(step.folder).resolve())
        found.append(step)
    return found


def _derivation(folder: Path) -> Derivation | None:
    """What a folder, or the newest checkpoint in it, was made from."""
    try:
        is_one = is_iteration_folder(folder) or (folder / CONFIG_FILE).is_file() or not folder.is_dir()
        return read_derivation(folder if is_one else resolve_checkpoint(folder))
    except SpikingBrainError:
        return None


def _derived(folder: Path, derivation: Derivation) -> Step:
    """A folder that tells the whole way back itself."""
    of = ", ".join(derivation.sources)
    written = _day(folder / DERIVATION_FILE)
    return Step(str(folder), f"{derivation.did}, from {of}", written=written)


def _step(folder: Path) -> tuple[Step, Path | None]:
    """One folder, and the one that it was made from; None where nothing says which."""
    shown = str(folder)
    if (folder / CONFIG_FILE).is_file():
        source = conversion_report(folder).get("source")
        if not isinstance(source, str):
            return Step(shown, "a Hugging Face folder"), None
        return Step(shown, f"exported from {source}", written=_day(folder / REPORT_FILE)), Path(source)
    if not folder.is_dir():
        return Step(shown, "not there any more, or not from here; the way back ends"), None
    try:
        checkpoint = folder if is_iteration_folder(folder) else resolve_checkpoint(folder)
    except SpikingBrainError:
        return Step(shown, "no checkpoint any more; the way back ends"), None
    if (checkpoint / RUN_CONFIG_FILE).is_file():
        return _trained(checkpoint)
    report = conversion_report(checkpoint.parent)
    source = report.get("source")
    if isinstance(source, str):
        did = f"imported from {source} ({report.get('architecture')})"
        written = _day(checkpoint.parent / REPORT_FILE)
        return Step(str(checkpoint), did, written=written), Path(source)
    return Step(str(checkpoint), "nothing is stored of where it comes from"), None


def _trained(checkpoint: Path) -> tuple[Step, Path | None]:
    try:
        run = load_run_config(checkpoint / RUN_CONFIG_FILE)
    except SpikingBrainError:
        return Step(str(checkpoint), f"trained, by a run whose {RUN_CONFIG_FILE} cannot be read"), None
    iterations, stage = iteration_of(checkpoint), run.stage
    record = read_record(checkpoint)
    counted_from = SamplesRead() if record is None else record.counted_from
    tokens = counted_from.at(iterations, stage.batch_sizes) * stage.seq_length
    did = f"stage {stage.kind}: {iterations:,} iterations, {quantity(tokens)} tokens"
    load = loaded_checkpoint(checkpoint, run)
    if load is None:
        did += f", from random weights (seed {run.seed})"
    return Step(str(checkpoint), did, tokens, _teacher(stage), _day(checkpoint / RUN_CONFIG_FILE)), load


def _teacher(stage: StageConfig) -> str | None:
    try:
        return stage.teacher if kind_of(stage).needs_teacher(stage) else None
    except ConfigurationError:  # a kind of a plugin that is not named here
        return stage.teacher


def _day(file: Path) -> str | None:
    try:
        return time.strftime("%Y-%m-%d", time.localtime(file.stat().st_mtime))
    except OSError:
        return None
