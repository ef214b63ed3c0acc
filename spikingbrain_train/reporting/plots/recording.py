"""A run as it is read back from its folder: points, beginnings, settings, and what it started from."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from spikingbrain_train.errors import CheckpointError, DataError
from spikingbrain_train.reporting.metrics import METRICS_FILE, is_event, read_lines
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    RUN_CONFIG_FILE,
    iteration_folder,
    newest_iteration,
)

Series = list[tuple[float, float]]
"""Positions on an axis and values; a value that was not finite is NaN."""


class Axis(str, Enum):
    """What curves are drawn over."""

    tokens = "tokens"
    """Tokens that the run has read."""
    steps = "steps"
    """Optimizer steps."""
    hours = "hours"
    """Hours at work, evaluations and checkpoints included, the time between attempts left out."""


@dataclass(frozen=True)
class Beginning:
    """The start of a run, or of one of its continuations."""

    iteration: int
    """Optimizer steps done before it."""
    time: float
    """Seconds since 1970."""
    is_start: bool
    changed: Mapping[str, tuple[Any, Any]]
    """Setting -> its value before and now."""


@dataclass(frozen=True)
class HeldOutSet:
    """What an evaluation read, so that two can be told to have read the same."""

    sets: frozenset[tuple[str, int]]
    """Fingerprints of the datasets, and how many tokens of each were predicted."""
    seq_length: int | None
    """Tokens of a window."""

    @classmethod
    def of(cls, datasets: object, seq_length: object) -> HeldOutSet | None:
        """From what events and results of evaluations say of it; None where they say nothing.

        Args:
            datasets: name -> tokens and fingerprint.
            seq_length: of the windows.
        """
        if not isinstance(datasets, Mapping) or not datasets:
            return None
        try:
            found = {(str(each["fingerprint"]), int(each["tokens"])) for each in datasets.values()}
        except (KeyError, TypeError, ValueError):
            return None
        return cls(frozenset(found), seq_length if isinstance(seq_length, int) else None)


@dataclass(frozen=True)
class Recording:
    """What a run has written down, however old the release that wrote it."""

    folder: Path
    points: list[dict[str, Any]]
    events: list[dict[str, Any]]
    settings: Mapping[str, Any]
    """Dotted name -> value, of the newest checkpoint; empty where there is none."""

    @classmethod
    def read(cls, folder: str | Path) -> Recording:
        """Read a run's folder.

        Raises:
            DataError: there are no metrics, a line of them is damaged, or nothing has been reported yet.
        """
        lines = read_lines(folder)
        points = [line for line in lines if not is_event(line)]
        if not any(_is_number(value) for point in points for name, value in point.items() if "/" in name):
            raise DataError(
                f"{Path(folder) / METRICS_FILE} holds no finite metric to draw yet; "
                "train for at least logging.log_interval iterations."
            )
        events = [line for line in lines if is_event(line)]
        return cls(Path(folder), points, events, _settings_in(Path(folder)))

    @property
    def stage(self) -> str | None:
        """``stage.kind`` of the run, None where nothing says it."""
        return self._fact("stage", "stage.kind")

    @property
    def output_dir(self) -> str | None:
        """Where the run wrote to, which may be on another machine; None where nothing says it."""
        return self._fact("output_dir", "output_dir")

    @property
    def tells_its_start(self) -> bool:
        """Whether it is known what the run started from."""
        return bool(self.events) or "checkpoint.load" in self.settings

    @property
    def load(self) -> str | None:
        """The checkpoint that its first weights are from; None for random ones."""
        first: Mapping[str, Any] = next((event["run"] for event in self.events if event.get("run")), {})
        value = first["load"] if "load" in first else self.settings.get("checkpoint.load")
        return None if value is None else str(value)

    @cached_property
    def held_out(self) -> set[HeldOutSet]:
        """What its evaluations read: several where a continuation has other data, none if not known."""
        facts = [event.get("run") or {} for event in self.events]
        found = (HeldOutSet.of(each.get("held_out"), each.get("seq_length")) for each in facts)
        return {each for each in found if each is not None}

    @cached_property
    def beginnings(self) -> list[Beginning]:
        """Its start and continuations, as far as they are recorded."""
        return [
            Beginning(
                iteration=event["iteration"],
                time=float(event.get("time") or 0.0),
                is_start=event["event"] == "started",
                changed={name: (was, now) for name, (was, now) in (event.get("changed") or {}).items()},
            )
            for event in self.events
        ]

    @property
    def iterations(self) -> int:
        """Optimizer steps up to the last point."""
        return max(point["iteration"] for point in self.points)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of all metrics of which there is a number, in the order in which they were reported."""
        found: dict[str, None] = {}
        for point in self.points:
            for name, value in point.items():
                if "/" in name and name not in found and _is_number(value):
                    found[name] = None
        return list(found)

    @cached_property
    def tables(self) -> list[str]:
        """Names of all metrics that are tables of numbers."""
        found = (name for point in self.points for name, value in point.items() if isinstance(value, list))
        return list(dict.fromkeys(found))

    def layers(self, family: str) -> dict[int, str]:
        """The metrics ``<family>/layer_<n>`` by their layer, in its order."""
        begin = f"{family}/layer_"
        found = {
            int(number): name
            for name in self.metrics
            if name.startswith(begin) and (number := name.removeprefix(begin)).isdigit()
        }
        return dict(sorted(found.items()))

    @cached_property
    def families(self) -> list[str]:
        """What there is per layer: names of metrics without ``/layer_<n>``."""
        parts = (name.rpartition("/layer_") for name in self.metrics)
        return list(
            dict.fromkeys(family for family, between, number in parts if between and number.isdigit())
        )

    def series(self, metric: str, axis: Axis) -> Series:
        """All points of a metric, in the order of their positions."""
        return [
            (self.position(point, axis), float(value) if _is_number(value) else math.nan)
            for point in self.points
            if metric in point and not isinstance(value := point[metric], list)
        ]

    def last_table(self, metric: str) -> list[list[float]] | None:
        """The rows of the last table of that name, NaN where a number was not finite."""
        for point in reversed(self.points):
            if isinstance(rows := point.get(metric), list):
                return [[float(cell) if _is_number(cell) else math.nan for cell in row] for row in rows]
        return None

    def position(self, point: Mapping[str, Any], axis: Axis) -> float:
        """Where a point lies on an axis."""
        if axis is Axis.hours:
            return self._hours(float(point.get("time") or 0.0), point["iteration"])
        return self.place(point["iteration"], axis)

    def place(self, iteration: int, axis: Axis) -> float:
        """Where an iteration lies on an axis; between two points as if all steps between them were equal."""
        if axis is Axis.steps:
            return float(iteration)
        if axis is Axis.hours:
            knots = self._hour_knots
        else:
            knots = self._token_knots
            if len(knots) == 1 and iteration > 0:
                raise DataError(
                    f"{self.folder / METRICS_FILE} has no train/tokens; draw it with --x steps or --x hours"
                )
        return _interpolate(knots, iteration)

    def end(self, axis: Axis) -> float:
        """Where the last point lies."""
        return max(self.position(point, axis) for point in self.points)

    @cached_property
    def _token_knots(self) -> list[tuple[float, float]]:
        counted = {
            point["iteration"]: point["train/tokens"] for point in self.points if point.get("train/tokens")
        }
        return sorted([(0.0, 0.0), *counted.items()])

    @cached_property
    def _hour_knots(self) -> list[tuple[float, float]]:
        return sorted((point["iteration"], self.position(point, Axis.hours)) for point in self.points)

    @cached_property
    def _attempts(self) -> list[tuple[int, float, float]]:
        """Of each attempt: steps done before it, its time, and the hours that those before it took."""
        begins = [(each.iteration, each.time) for each in self.beginnings if each.time]
        times = [(point["iteration"], float(point["time"])) for point in self.points if point.get("time")]
        if times and (not begins or begins[0][1] > times[0][1]):
            begins.insert(0, times[0])  # of an earlier release: what came before its first point is not known
        found: list[tuple[int, float, float]] = []
        for iteration, begin in begins:
            hours = 0.0
            if found:
                _, last_begin, before = found[-1]
                done = [time for _, time in times if last_begin <= time <= begin]
                hours = before + ((max(done) - last_begin) / 3600 if done else 0.0)
            found.append((iteration, begin, hours))
        return found

    def _hours(self, time: float, iteration: int) -> float:
        if not self._attempts:
            raise DataError(
                f"{self.folder / METRICS_FILE} has no times; draw it with --x tokens or --x steps"
            )
        attempt = max(bisect_right([begin for _, begin, _ in self._attempts], time) - 1, 0)
        _, begin, before = self._attempts[attempt]
        return before + max(time - begin, 0.0) / 3600

    @cached_property
    def _facts(self) -> Mapping[str, Any]:
        return next((event["run"] for event in reversed(self.events) if event.get("run")), {})

    def _fact(self, name: str, setting: str) -> str | None:
        value = self._facts[name] if name in self._facts else self.settings.get(setting)
        return None if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _interpolate(knots: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ascending knots; beyond the last one with the slope before it."""
    after = min(max(bisect_right(knots, (x, math.inf)), 1), len(knots) - 1)
    if after < 1:
        return knots[0][1] if knots else 0.0
    (x0, y0), (x1, y1) = knots[after - 1], knots[after]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0) if x1 > x0 else y1


def _settings_in(folder: Path) -> dict[str, Any]:
    """The settings that the newest checkpoint holds; a picture needs none, so damaged ones are none."""
    try:
        checkpoints = folder / CHECKPOINT_FOLDER
        newest = newest_iteration(checkpoints)
        if newest is None:
            return {}
        text = (iteration_folder(checkpoints, newest) / RUN_CONFIG_FILE).read_text(encoding="utf-8")
        return dict(_flat(yaml.safe_load(text)))
    except (CheckpointError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def _flat(values: object, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
