"""What runs of benchmarks/conversion_quality.py gave, as a table and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.conversion_methods import METHODS
from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import WIDTH, count_text, line_style
from spikingbrain_train.reporting.tables import table

WITHIN = 0.5
"""Nats above the dense source that methods are held to for the tokens that they need."""
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


def gaps(of_texts: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Nats above the dense source, of each text and their mean."""
    above = {name: of_texts[name] - dense[name] for name in dense}
    return {**above, "mean": mean(above.values())}


def spread(values: Sequence[float]) -> str:
    """Mean of the seeds, and their standard deviation where there are several."""
    return f"{mean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _by_method(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    grouped: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        grouped[result["method"], result["tokens"]].append(result)
    order = list(METHODS)
    return dict(sorted(grouped.items(), key=lambda item: (item[0][1], order.index(item[0][0]))))


def tokens_within(result: Mapping[str, Any], dense: Mapping[str, float], nats: float = WITHIN) -> int | None:
    """Tokens at the first evaluation at most ``nats`` above the dense source; None where there is none."""
    return next(
        (tokens for tokens, of_texts in result["curve"] if gaps(of_texts, dense)["mean"] <= nats), None
    )


def results_table(results: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> list[str]:
    """Lines: a method and its budget each, nats above the dense source at its end."""
    names = [*dense, "mean"]
    rows = [["tokens", "method", *names, "seeds", f"within {WITHIN:g} after"]]
    for (method, tokens), runs in _by_method(results).items():
        ends = [gaps(run["curve"][-1][1], dense) for run in runs]
        reached = [tokens_within(run, dense) for run in runs]
        after = count_text(max(found for found in reached if found)) if all(reached) else "-"
        values = (spread([end[name] for end in ends]) for name in names)
        rows.append([count_text(tokens), method, *values, str(len(runs)), after])
    return table(rows, left=2)


def draw(results: Sequence[Mapping[str, Any]], dense: Mapping[str, float], path: Path) -> None:
    """Curves of all methods over tokens, every seed a line."""
    save_figure(lambda: _figure(results, dense), path, "--picture")


def _figure(results: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panel = figure.subplots()
    shown = [name for name in METHODS if any(run["method"] == name for run in results)]
    styles = {name: line_style(number) for number, name in enumerate(shown)}
    named = set()
    for (method, _), runs in _by_method(results).items():
        for run in runs:
            curve = [point for point in run["curve"] if point[0] > 0]
            tokens = [point[0] for point in curve]
            above = [gaps(point[1], dense)["mean"] for point in curve]
            style = styles[method]
            label = None if method in named else method
            named.add(method)
            panel.plot(
                tokens,
                above,
                marker=style.marker,
                markersize=3.5,
                linewidth=1.3,
                label=label,
                **style.keywords(),
            )
    panel.axhline(WITHIN, color="#222222", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    panel.set_ylim(min(_TICKS), max(_TICKS))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("tokens read, those for the choice of layers included")
    panel.set_ylabel("nats above the dense source, unseen text")
    for formatted in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
        formatted(lambda value, _: count_text(value) if f"{value:e}"[0] in "125" else "")
    dress(panel)
    panel.legend(frameon=False, ncols=2)
    return figure
