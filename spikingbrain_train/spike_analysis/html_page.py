"""The report as one HTML file: no script, no link to anywhere, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

from spikingbrain_train.spike_analysis import svg
from spikingbrain_train.spike_analysis.numbers import Numbers
from spikingbrain_train.spike_analysis.published import PUBLISHED
from spikingbrain_train.spike_analysis.report import (
    Raster,
    SpikeReport,
    coding_rows,
    layer_name,
    numbers_rows,
    sweep_rows,
)
from spikingbrain_train.spiking.codings import CODINGS
from spikingbrain_train.spiking.count_distribution import PAPER_CODING

_SHOWN_STEPS = 32
"""Of a raster: one outlier takes a rate coding thousands."""
_SHOWN_COUNTS = 16
"""Magnitude from which on counts share a bar."""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #5c6169;
  --rule: #dcdfe3; --first: #2563a8; --second: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1e2125; --ink: #e6e8ea; --soft: #a0a6ae; --rule: #353a41;
    --first: #6fa8e6; --second: #f0965a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 4px; font-weight: 600; }
p { margin: 8px 0 0; max-width: 90ch; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 16px;
  margin-top: 16px; }
.tiles, .pair { display: grid; gap: 16px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); margin-top: 16px; gap: 8px; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 0.85rem; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; max-width: 560px; height: auto; overflow: visible; }
.scroll { overflow-x: auto; margin-top: 8px; }
/* A shade at the edge behind which a table goes on. */
.scroll { background:
  linear-gradient(to left, var(--card) 30%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to left, var(--rule), transparent) right / 20px 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 0.9rem;
  line-height: 22px; white-space: nowrap; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
th { font-weight: 600; color: var(--soft); }
tr.own td { font-weight: 600; }
summary { cursor: pointer; padding: 6px 0; }
.key { margin-right: 1em; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em; }
.key.a::before { background: var(--first); }
.key.b::before { background: var(--second); }
.first { fill: var(--first); }
.second { fill: var(--second); }
.line { fill: none; stroke-width: 2; }
.first-line { stroke: var(--first); }
.second-line { stroke: var(--second); }
.grid { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--soft); stroke-dasharray: 4 4; }
text { fill: var(--soft); font: 11px system-ui, sans-serif; }
text.axis { font-size: 12px; }
/* On a phone charts are drawn at two thirds of their size. */
@media (max-width: 560px) {
  main { padding: 16px 8px 32px; }
  section { padding: 12px; }
  th, td { padding: 4px 7px; }
  text { font-size: 15px; }
  text.axis { font-size: 16px; }
}
"""


def html_page(report: SpikeReport) -> str:
    """The whole file."""
    title = f"Spikes of {report.read.model}"
    parts = [
        _heading(report),
        _tiles(report),
        _distribution(report),
        _codings(report),
        _layers(report),
        _sweep(report),
        _rasters(report),
        _definitions(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _heading(report: SpikeReport) -> str:
    read = report.read
    trained = "without spikes" if read.trained_k is None else f"with spikes of k {read.trained_k:g}"
    words = (
        f"{read.form}, {read.dtype}, trained {trained}. {read.tokens:,} tokens of {read.text}, in "
        f"{read.windows} windows of {read.seq_length}; k = {report.k:g}."
    )
    return f'<h1>Spikes of {escape(read.model)}</h1><p class="soft">{escape(words)}</p>'


def _tiles(report: SpikeReport) -> str:
    overall = report.numbers.overall
    coding = overall.codings[PAPER_CODING.name]
    tiles = [
        (f"{overall.mean_spikes:.3f}", "spikes of a channel and token"),
        (f"{overall.silent:.1%}", "of channels silent at a token"),
        (f"{overall.share_up_to_7:.1%}", "of counts up to 7"),
        (f"{coding.sparsity:.1%}", f"of slots empty in {report.window} steps"),
        (f"{coding.energy_pj:.4f} pJ" if coding.energy_pj is not None else "-", "a multiply-accumulate"),
        (f"{report.cross_entropy - report.without_spikes:+.4f}", "nats a token from spikes"),
    ]
    inside = "".join(f'<div class="tile"><b>{value}</b><span>{words}</span></div>' for value, words in tiles)
    return f'<div class="tiles">{inside}</div>'


def _distribution(report: SpikeReport) -> str:
    projections = "".join(
        f"<figure><h3>{escape(name)}</h3>{_histogram(each, name)}</figure>"
        for name, each in report.numbers.projections.items()
        if name not in _readers_of_others(report)
    )
    overall = report.numbers.overall
    words = (
        f"Every channel of a token becomes s<sub>int</sub> = round(x / V<sub>th</sub>) spikes, with the "
        f"token's threshold V<sub>th</sub> = mean |x| / {report.k:g}. {overall.share_up_to_7:.1%} of the "
        f"counts are within 7 of zero and fit three bits; the outermost bars hold all from "
        f"{_SHOWN_COUNTS} on. Compare with the paper's figure 9."
    )
    keys = '<span class="key a">up to 7</span><span class="key b">more</span>'
    return _section(
        "How often each count occurs",
        f'<div class="pair"><figure>{_histogram(overall, "all projections")}</figure>'
        f"<div><p>{words}</p><p>{keys}</p></div></div>"
        f'<details><summary>By projection</summary><div class="pair">{projections}</div></details>',
    )


def _histogram(numbers: Numbers, label: str) -> str:
    shown = range(-_SHOWN_COUNTS, _SHOWN_COUNTS + 1)
    shares = dict.fromkeys(shown, 0)
    for index, count in enumerate(numbers.occurrences):
        at = max(-_SHOWN_COUNTS, min(_SHOWN_COUNTS, numbers.least + index))
        shares[at] += count
    names = [
        f"≤{at}" if at == shown[0] else f"≥{at}" if at == shown[-1] else str(at).replace("-", "−")
        for at in shown
    ]
    return svg.bars(
        names,
        [shares[at] / max(1, numbers.counts) for at in shown],
        f"Share of each count, {label}",
        "count of spikes",
        [index for index, at in enumerate(shown) if abs(at) > 7],
    )


def _codings(report: SpikeReport) -> str:
    energy = report.energy
    words = (
        f"carried: counts that the first {report.window} steps hold whole. sparsity: slots of that window "
        f"without a spike; what does not fit is not sent. steps of all, spikes: to send every count, and how "
        f"many spikes a channel then takes; binary and bitwise unsigned hold no negative counts. pJ: spikes "
        f"times {energy.int8_add:g} pJ, the energy of an INT8 addition, each linear weighted by its outputs; "
        f"against an FP16 ({energy.fp16_mac:g} pJ) and an INT8 ({energy.int8_mac:g} pJ) multiply-accumulate."
    )
    rows = coding_rows(report.numbers.overall)
    table = _table(rows, PAPER_CODING.name.replace("_", " "))
    return _section("What each coding makes of them", f'{table}<p class="soft">{words}</p>')


def _layers(report: SpikeReport) -> str:
    numbers = report.numbers
    layers = [layer_name(each.layer) for each in numbers.layers]
    inside = {
        (name, layer_name(each.layer)): of for each in numbers.layers for name, of in each.projections.items()
    }
    values = {place: of.mean_spikes for place, of in inside.items()}
    grid = svg.heat(list(numbers.projections), layers, values, "Mean spikes by layer and projection")
    low, high = min(values.values()), max(values.values())
    by_layer = [(layer_name(each.layer), each.overall) for each in numbers.layers]
    everything = [(f"{layer}, {name}", of) for (name, layer), of in inside.items()]
    return _section(
        "By layer and projection",
        f"<figure>{grid}<figcaption>Mean spikes of a channel: {low:.2f} (pale) to {high:.2f} (full)."
        "</figcaption></figure>"
        + _table(numbers_rows("projection", list(numbers.projections.items())))
        + _details("Every layer", _table(numbers_rows("layer", by_layer)))
        + _details("Every projection of every layer", _table(numbers_rows("layer, projection", everything))),
    )


def _sweep(report: SpikeReport) -> str:
    if len(report.sweep) < 2:
        return ""
    measured = svg.Series(
        "sparsity",
        "first",
        [(row.k, row.overall.codings[PAPER_CODING.name].sparsity) for row in report.sweep],
    )
    published = [(row.k, PUBLISHED[row.k][1]) for row in report.sweep if row.k in PUBLISHED]
    series = [measured, *([svg.Series("the paper's sparsity", "second", published)] if published else [])]
    losses = svg.Series("cross entropy", "first", [(row.k, row.cross_entropy) for row in report.sweep])
    label = f"Sparsity of {report.window} steps over k"
    return _section(
        "What k trades",
        f'<div class="pair"><figure>{svg.lines(series, label, "k", "{:.1%}")}'
        f'<figcaption>Sparsity of {report.window} steps: <span class="key a">measured</span>'
        '<span class="key b">SpikingBrain-7B, table 11</span></figcaption></figure>'
        f"<figure>{svg.lines([losses], 'Cross entropy over k', 'k', '{:.3f}', report.without_spikes)}"
        "<figcaption>Cross entropy, nats a token; dashed: without spikes.</figcaption></figure></div>"
        + _table(sweep_rows(report), f"{report.k:g}"),
    )


def _rasters(report: SpikeReport) -> str:
    if not report.rasters:
        return ""
    parts = [
        f"<details{' open' if index == 0 else ''}><summary>{escape(raster.name)}</summary>"
        f'<div class="pair">{_raster(raster)}</div></details>'
        for index, raster in enumerate(report.rasters)
    ]
    return _section(
        "Spikes over time",
        "<p>The first tokens of the text, in each coding: a row is a channel, a column a step. "
        '<span class="key a">spike</span><span class="key b">spike with a minus sign</span></p>'
        + "".join(parts),
    )


def _raster(raster: Raster) -> str:
    counts = torch.tensor(raster.counts)  # [tokens, channels]
    drawn = []
    for name, coding in CODINGS.items():
        held = counts if coding.has_negative else counts.clamp(min=0)
        train = coding.encode(held)
        trains = train.spikes[:_SHOWN_STEPS].transpose(0, 1).tolist()
        words = name.replace("_", " ")
        steps = len(train.step_weights)
        note = f" of {steps} steps, of which {_SHOWN_STEPS} are shown" if steps > _SHOWN_STEPS else ""
        note += "" if coding.has_negative else "; negative counts left out"
        drawn.append(
            f"<figure><h3>{words}</h3>{svg.spikes(trains, f'{words} spikes of {raster.name}')}"
            f"<figcaption>{train.sparsity:.1%} of the slots empty{note}</figcaption></figure>"
        )
    return "".join(drawn)


def _definitions(report: SpikeReport) -> str:
    shared = _readers_of_others(report)
    reads = (
        f"{', '.join(shared)} read what another projection of their layer reads, which is encoded once and "
        f"counts once in numbers of a whole layer or model. "
        if shared
        else ""
    )
    words = (
        "A spike is a one in the binary form of |s<sub>int</sub>|, as in section 5.5 of the paper "
        "(SpikingBrain, arXiv 2509.05276), where nothing else is said. silent: s<sub>int</sub> = 0 at a "
        "token. never spike: channels without a spike at any token of this text. The output head and routers "
        "read no spikes. Memory traffic is no part of the energies, here as in the paper. The paper does not "
        "define "
        "its sparsity, and no definition that was tried gives its series: the window is this project's "
        "reading of its three steps."
    )
    return _section("How it was counted", f"<p>{escape(reads)}{words}</p>")


def _readers_of_others(report: SpikeReport) -> list[str]:
    """Projections that read what another one reads, in every layer that has them."""
    names = [name.split(".", 1)[1] for name in report.shared_inputs if name.split(".", 1)[0].isdigit()]
    alone = {
        name
        for each in report.numbers.layers
        for name in each.projections
        if f"{each.layer}.{name}" not in report.shared_inputs
    }
    return [name for name in dict.fromkeys(names) if name not in alone]


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>"


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>"


def _table(rows: Sequence[Sequence[str]], own: str | None = None) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = ""
    for row in rows[1:]:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f"<tr{' class=own' if row[0] == own else ''}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
