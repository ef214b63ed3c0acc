"""A profile as a table, as plain values and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, WIDTH
from spikingbrain_train.reporting.tables import table
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.training.profiling.parts import REST
from spikingbrain_train.training.profiling.summary import Operator, Part, StepSummary

_OPERATORS = 15


@dataclass(frozen=True)
class Row:
    """A part of one step, over all ranks."""

    name: str
    forward: float
    """Seconds, mean over ranks, as all others."""
    backward: float
    slowest: float
    """Seconds of both passes on the rank where they take longest."""
    share: float
    """Of the step."""
    products: float
    """Seconds in matrix products."""
    product_flops: float

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Profile:
    """What a step went to."""

    device: str
    precision: str
    ranks: tuple[int, ...]
    """That were profiled."""
    steps: int
    """Profiled; all numbers are those of one."""
    seconds: float
    """Wall time of a step, mean over ranks."""
    unprofiled: float | None
    """The same of one without the profiler; None where none was warm."""
    peak_tflops: float | None
    """Of a large matrix product on the main process; None where the machine is too busy to tell."""
    rows: tuple[Row, ...]
    """Longest first, the rest last."""
    operators: tuple[tuple[str, float, float], ...]
    """Name, own seconds and calls; longest first."""
    background: float
    """Seconds of communication while the step went on."""

    @classmethod
    def of(
        cls,
        summaries: Mapping[int, StepSummary],
        steps: int,
        peak_tflops: float | None,
        device: str,
        precision: str,
    ) -> Profile:
        """Means over the profiled ranks (``summaries`` by rank) and over steps."""
        ranks = list(summaries.values())
        alone = [rank.unprofiled for rank in ranks if rank.unprofiled is not None]
        divisor = len(ranks) * steps
        seconds = sum(rank.seconds for rank in ranks) / divisor
        names = dict.fromkeys(name for rank in ranks for name in rank.parts)
        rows = []
        for name in names:
            parts = [rank.parts.get(name, Part()) for rank in ranks]
            forward = sum(part.forward for part in parts) / divisor
            backward = sum(part.backward for part in parts) / divisor
            rows.append(
                Row(
                    name,
                    forward,
                    backward,
                    max(part.seconds for part in parts) / steps,
                    (forward + backward) / seconds,
                    sum(part.products for part in parts) / divisor,
                    sum(part.product_flops for part in parts) / divisor,
                )
            )
        rows.sort(key=lambda row: (row.name == REST, -row.seconds))
        operators: dict[str, Operator] = {}
        for rank in ranks:
            for name, each in rank.operators.items():
                total = operators.setdefault(name, Operator())
                total.seconds += each.seconds
                total.calls += each.calls
        longest = sorted(operators.items(), key=lambda item: -item[1].seconds)[:_OPERATORS]
        return cls(
            device=device,
            precision=precision,
            ranks=tuple(summaries),
            steps=steps,
            seconds=seconds,
            unprofiled=sum(alone) / len(alone) if alone else None,
            peak_tflops=peak_tflops,
            rows=tuple(rows),
            operators=tuple((name, op.seconds / divisor, op.calls / divisor) for name, op in longest),
            background=sum(rank.background for rank in ranks) / divisor,
        )

    def of_peak(self, flops: float, seconds: float) -> float | None:
        """Share of the peak that matrix products reach over so many seconds."""
        if not self.peak_tflops or not seconds or not flops:
            return None
        return flops / seconds / (self.peak_tflops * 1e12)

    def describe(self) -> str:
        """Tables for a terminal."""
        header = ["part", "forward", "backward", "share", "in products", "TFLOP/s", "of the peak"]
        several = len(self.ranks) > 1
        if several:
            header.insert(3, "slowest rank")
        rows = [header]
        for row in self.rows:
            share = self.of_peak(row.product_flops, row.seconds)
            cells = [row.name, _ms(row.forward), _ms(row.backward), f"{row.share:.1%}"]
            busy, rate = row.products / (row.seconds or 1.0), row.product_flops / (row.seconds or 1.0) / 1e12
            cells += [f"{busy:.0%}", f"{rate:.3g}" if rate else "", "" if share is None else f"{share:.0%}"]
            if several:
                cells.insert(3, _ms(row.slowest))
            rows.append(cells)
        flops = sum(row.product_flops for row in self.rows)
        products = sum(row.products for row in self.rows)
        alone = "" if self.unprofiled is None else f" ({_ms(self.unprofiled)} without the profiler)"
        where = f"{len(self.ranks)} ranks" if several else f"rank {self.ranks[0]}"
        peak = "not measured: too busy" if self.peak_tflops is None else f"{self.peak_tflops:.3g} TFLOP/s"
        lines = [
            f"a step takes {_ms(self.seconds)}{alone} on {where} ({self.device}, {self.precision}), "
            f"mean of {self.steps}",
            f"matrix products: {flops / 1e12:.4g} TFLOP a step and rank in {_ms(products)} "
            f"({products / self.seconds:.1%} of it); the peak of a large one is {peak}",
            "",
            *table(rows, 1),
            "",
            *table(
                [
                    ["operator", "own time", "share", "calls"],
                    *(
                        [name, _ms(seconds), f"{seconds / self.seconds:.1%}", f"{calls:,.0f}"]
                        for name, seconds, calls in self.operators
                    ),
                ],
                1,
            ),
        ]
        if self.background:
            lines += ["", f"collectives in other threads, waited for or not: {_ms(self.background)}"]
        return "\n".join(lines)

    def as_values(self) -> dict[str, Any]:
        """Plain values, for programs."""
        names = ("device", "precision", "ranks", "steps", "seconds", "unprofiled", "peak_tflops")
        values = {name: getattr(self, name) for name in (*names, "background")}
        values["parts"] = [
            vars(row)
            | {"seconds": row.seconds, "share_of_peak": self.of_peak(row.product_flops, row.seconds)}
            for row in self.rows
        ]
        values["operators"] = [
            {"name": name, "seconds": seconds, "calls": calls} for name, seconds, calls in self.operators
        ]
        return values


def write_profile(profile: Profile, folder: Path) -> str:
    """Write ``profile.json`` and ``profile.png``; returns what to print."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_durably(folder / "profile.json", json.dumps(profile.as_values(), indent=2) + "\n")
    save_figure(lambda: draw_profile(profile), folder / "profile.png")
    files = f"profile.json, profile.png, trace.json.gz (of rank {min(profile.ranks)})"
    return f"{profile.describe()}\n\n{folder}: {files}"


def draw_profile(profile: Profile) -> Any:
    """A bar a part: its forward and backward pass. A matplotlib Figure."""
    from matplotlib.figure import Figure

    rows = profile.rows
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(rows)), layout="constrained", facecolor="white")
    axis = figure.subplots()
    forward, places = [1e3 * row.forward for row in rows], range(len(rows))
    axis.barh(places, forward, color="#0072b2", label="forward")
    axis.barh(places, [1e3 * row.backward for row in rows], left=forward, color="#d55e00", label="backward")
    for place, row in zip(places, rows, strict=True):
        end = (1e3 * row.seconds, place)
        axis.annotate(f"{row.share:.1%}", end, (4, 0), textcoords="offset points", va="center", color=INK)
    axis.set_yticks(places, [row.name for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("milliseconds of a step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=FAINT)
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(f"A step of {1e3 * profile.seconds:,.0f} ms", loc="left")
    return figure


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
