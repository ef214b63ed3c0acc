"""How many tokens all stages of a model have read together, and what share of the source's that is.

Every checkpoint stores what was read before its run began (``history`` in ``run_record.json``), so that it
can be told when the older folders are gone. Those of earlier releases are followed back from folder to
folder; where that ends before the source, it is said, and nothing is guessed. Without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spikingbrain_train.config.derivation import read_derivation
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import SamplesRead, StageTokens, TokenHistory, read_record
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.planning.ancestry import conversion_report, loaded_checkpoint
from spikingbrain_train.planning.resume import run_to_resume
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    RUN_CONFIG_FILE,
    is_iteration_folder,
    iteration_of,
    latest_checkpoint,
)
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_MOST = 50  # steps: beyond, folders lead back to themselves


def history_of(config: RunConfig) -> TokenHistory:
    """What was read before a run began, which may start now or go on.

    Raises:
        CheckpointError: what lies in its output_dir is damaged.
    """
    found = _history_of(config)
    source = config.data.source_tokens
    return found if source is None else replace(found, source_tokens=source)


def _history_of(config: RunConfig) -> TokenHistory:
    stored = run_to_resume(config)
    if stored is not None:
        if stored.record is not None and stored.record.history is not None:
            return stored.record.history
        return _before(stored.checkpoint, stored.config)
    if config.checkpoint.load is None:
        return TokenHistory()
    try:
        return history_with(latest_checkpoint(config.checkpoint.load, "checkpoint.load"))
    except SpikingBrainError:  # a plan may be made where it is not
        return _ends_at(Path(config.checkpoint.load))


def history_with(folder: Path, most: int = _MOST) -> TokenHistory:
    """What a folder's weights have read, its own stage included.

    Args:
        folder: of one checkpoint, of several, or in Hugging Face's format.
        most: steps back.
    """
    if most == 0:
        return TokenHistory(unknown=f"{folder} leads back to itself")
    if (folder / CONFIG_FILE).is_file():
        if (derivation := read_derivation(folder)) is not None:
            return derivation.history
        source = conversion_report(folder).get("source")
        return history_with(Path(source), most - 1) if isinstance(source, str) else TokenHistory()
    try:
        checkpoint = folder if is_iteration_folder(folder) else resolve_checkpoint(folder)
        if (derivation := read_derivation(checkpoint)) is not None:
            return derivation.history
        if not (checkpoint / RUN_CONFIG_FILE).is_file():
            return _before_import(checkpoint, most)
        run, record = load_run_config(checkpoint / RUN_CONFIG_FILE), read_record(checkpoint)
        stage = run.stage
        steps = iteration_of(checkpoint) or (0 if stage.train_iters else stage.calibration_steps)
        counted_from = SamplesRead() if record is None else record.counted_from
        tokens = counted_from.at(steps, stage.batch_sizes) * stage.seq_length
    except (SpikingBrainError, ValueError):
        return _ends_at(folder)
    before = None if record is None else record.history
    before = _before(checkpoint, run, most) if before is None else before
    own = StageTokens(stage.kind, tokens, str(checkpoint))
    return replace(before, stages=[*before.stages, own])


def _before(checkpoint: Path, run: RunConfig, most: int = _MOST) -> TokenHistory:
    """What was read before the run of an earlier release that wrote a checkpoint."""
    load = loaded_checkpoint(checkpoint, run)
    found = TokenHistory() if load is None else history_with(load, most - 1)
    source = run.data.source_tokens
    return found if source is None else replace(found, source_tokens=source)


def _before_import(checkpoint: Path, most: int) -> TokenHistory:
    """Of a checkpoint that no run wrote: what the Hugging Face folder that it was made from had read here."""
    source = conversion_report(checkpoint.parent).get("source")
    if isinstance(source, str) and (Path(source) / CONFIG_FILE).is_file():
        return history_with(Path(source), most - 1)
    try:
        came_from_here = "auto_map" in load_config_json(checkpoint / HF_SOURCE_FOLDER)
    except SpikingBrainError:
        came_from_here = False
    # Of a plain model nothing was read here, wherever its folder is by now; an export brings code of its own.
    return _ends_at(Path(str(source))) if came_from_here else TokenHistory()


def _ends_at(folder: Path) -> TokenHistory:
    if not folder.exists():
        return TokenHistory(unknown=f"{folder} is not there")
    return TokenHistory(unknown=f"{folder} is no checkpoint that says what was read before it")


def describe_history(history: TokenHistory) -> str:
    """What was read before, in words: ``1.066 B in 2 stages (align 65.54 M, cpt 1 B)``."""
    each = ", ".join(f"{stage.kind} {quantity(stage.tokens)}" for stage in history.stages)
    if not history.stages:
        return "nothing"
    if len(history.stages) == 1:
        return f"{quantity(history.tokens)} in one stage ({history.stages[0].kind})"
    return f"{quantity(history.tokens)} in {len(history.stages)} stages ({each})"


def describe_share(tokens: int, source_tokens: float) -> str:
    """A share of the source's tokens: ``1.4 % of 10 T``."""
    return f"{percent(tokens / source_tokens)} of {quantity(source_tokens)}"


def percent(share: float) -> str:
    """A share of any size with two digits: ``1.4 %``, ``0.00027 %``."""
    text = f"{100 * share:.2g}"
    return f"{float(text):.10f}".rstrip("0").rstrip(".") + " %" if "e" in text else f"{text} %"


def describe_all(history: TokenHistory) -> str:
    """What all stages have read that a history names, and their share of the source's tokens, in words."""
    if history.unknown is not None:
        return f"{describe_history(history)}, and what was read before is not known: {history.unknown}"
    words = describe_history(history)
    if history.source_tokens is not None:
        share = percent(history.tokens / history.source_tokens)
        words += f": {share} of the source's {quantity(history.source_tokens)}"
    return words


def describe_end(history: TokenHistory, own: int) -> str:
    """What all stages have read at the end of one that reads ``own`` tokens, as far as that is known."""
    source = history.source_tokens
    if history.unknown is not None:
        share = "" if source is None else f", {percent(own / source)} of the source's {quantity(source)}"
        known = f"; known are {describe_history(history)}" if history.stages else ""
        before = f"what was read before is not known: {history.unknown}{known}"
        return f"{quantity(own)} in this stage{share}; {before}"
    tokens = history.tokens + own
    words = f"{quantity(tokens)} in all stages"
    if history.stages:
        words += f", {describe_history(history)} before this one"
    if source is not None:
        share = percent(tokens / source)
        words += f"; {share} of the source's {quantity(source)}"
        if history.stages:
            words += f" (this stage: {percent(own / source)})"
    return words
