"""The kinds of steps that only the demo has; its YAML names this module among its plugins."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.pipelines.demo.budget import CHOICE_FILE, SPEED_FILE, Lengths, check_minutes
from spikingbrain_train.pipelines.demo.named_settings import TRAIN_ITERS, NamedSettings
from spikingbrain_train.pipelines.demo.report import JSON, MARKDOWN, PICTURE, TABLE
from spikingbrain_train.pipelines.demo.smollm2 import NAME
from spikingbrain_train.pipelines.demo.stages import STAGES, StagePaths, fitted_stages
from spikingbrain_train.pipelines.kinds import STEP_KINDS, Context, StepKind
from spikingbrain_train.pipelines.pipeline_file import checkout
from spikingbrain_train.pipelines.steps import Step, own_command

_THIS = "spikingbrain_train.pipelines.demo"
_FILES = ("checkpoint", "teacher", "train", "valid")
_OWN = dict.fromkeys(STAGES, False)
"""The user's own settings of a stage."""


class Source(StepKind):
    """The dense model: downloaded, unless ``model`` names one. Output: ``model``, a Hugging Face folder.

    The download is kept in the folder that SPIKINGBRAIN_CACHE names, in .cache of a checkout, or in
    ~/.cache/spikingbrain-train."""

    name = "demo_source"
    title = f"get {NAME}"

    def settings(self) -> Mapping[str, bool]:
        return {"model": False}

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        if given.get("model") is not None:
            model = Path(str(given["model"]))
            if not (model / "config.json").is_file():
                raise DataError(f"model {model} is not a Hugging Face folder: config.json is missing")
            return Step(context.name, self.title, [], outputs={"model": str(model)})
        model = _cache() / NAME
        command = [*own_command("download-smollm2"), "--output", str(model)]
        # Other demos use it, too: it is nothing of this one's own.
        return Step(
            context.name,
            self.title,
            command,
            outputs={"model": str(model)},
            proof=[model / "config.json"],
        )


def _cache() -> Path:
    """Where downloads are kept."""
    named, root = os.environ.get("SPIKINGBRAIN_CACHE"), checkout()
    if named:
        return Path(named)
    if root is not None:
        return root / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikingbrain-train"


def _named(given: Mapping[str, Any]) -> NamedSettings:
    """The user's settings of both stages."""
    for stage in STAGES:
        if not isinstance(given.get(stage) or [], list):
            raise ConfigurationError(f"{stage} must be a list, e.g. [stage.train_iters=100]")
    return NamedSettings(*([str(word) for word in given.get(stage) or []] for stage in STAGES))


def _both_lengths_named(named: NamedSettings) -> bool:
    """Nothing is fitted then."""
    return all(named.in_stage(stage, TRAIN_ITERS) for stage in STAGES)


class MeasureSpeed(StepKind):
    """Measures speed, unless the user names the lengths of both stages. Output: ``speed``, a file."""

    name = "demo_measure_speed"
    title = "measure how fast this machine trains"

    def settings(self) -> Mapping[str, bool]:
        return {**dict.fromkeys(_FILES, True), **_OWN}

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        named, speed = _named(given), context.output / SPEED_FILE
        outputs = {"speed": str(speed)}
        if _both_lengths_named(named):
            return Step(context.name, self.title, [], outputs=outputs)
        # The pretraining stage starts from what alignment has yet to write: from the hybrid here.
        checkpoint, teacher, train, valid = (str(given[name]) for name in _FILES)
        paths = StagePaths(checkpoint, teacher, train, valid, context.output)
        command = [*own_command("measure-speed"), "--output", str(speed)]
        for stage in STAGES:
            command += [f"--{stage}", *paths.arguments(stage), *getattr(named, stage)]
        return Step(context.name, self.title, command, outputs=outputs, makes=[speed], proof=[speed])


class Fit(StepKind):
    """How long the stages are on this machine, unless the user names both lengths.

    Finds out: ``align`` and ``cpt``, settings of a run; ``seq_length`` and ``max_windows`` of the
    evaluation; ``sentence``. Output: ``choice``, the file with all of them.
    """

    name = "demo_fit"
    title = "fit the stages to this machine"

    def settings(self) -> Mapping[str, bool]:
        return {"speed": True, "held_out": True, "budget": True, "spent": False, **_OWN}

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        named, budget = _named(given), given["budget"]
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise ConfigurationError(f"budget={budget} must be a number of minutes")
        check_minutes(budget)
        whole_recipe = asdict(fitted_stages(Lengths(), named))
        choice = context.output / CHOICE_FILE
        if _both_lengths_named(named):
            return Step(context.name, self.title, [], outputs={"choice": None}, assumed=whole_recipe)
        command = [
            *(sys.executable, "-m", f"{_THIS}.fit", "--pipeline-output", str(context.output)),
            *("--speed", str(given["speed"]), "--held-out", str(given["held_out"])),
            *("--budget", f"{budget:g}", "--spent", *(str(step) for step in given.get("spent") or [])),
            *(word for stage in STAGES for word in (f"--{stage}", *getattr(named, stage))),
            *("--output", str(choice)),
        ]
        return Step(
            context.name,
            self.title,
            command,
            outputs={"choice": str(choice)},
            assumed=whole_recipe,
            values=choice,
            makes=[choice],
            proof=[choice],
        )


class Report(StepKind):
    """One table of what the steps measured; ``of`` refers to them, ``choice`` to what was fitted.

    Output: ``table``, a text file.
    """

    name = "demo_report"
    title = "sum up: table, loss curve, report"

    def settings(self) -> Mapping[str, bool]:
        return {"model": True, "data": True, "choice": False, "of": True}

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        makes = [context.output / name for name in (PICTURE, MARKDOWN, JSON, TABLE)]
        choice = given.get("choice")
        command = [
            *(sys.executable, "-m", f"{_THIS}.report", "--output", str(context.output)),
            *("--model", str(given["model"]), "--data", *(str(path) for path in given["data"])),
            *(("--lengths", str(choice)) if choice else ()),
        ]
        table = makes[-1]
        return Step(
            context.name, self.title, command, outputs={"table": str(table)}, makes=makes, proof=[table]
        )


for _kind in (Source(), MeasureSpeed(), Fit(), Report()):
    STEP_KINDS.register(_kind)
