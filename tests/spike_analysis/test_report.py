"""Numbers, page and charts of counts that are written down here."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

from spikingbrain_train.spike_analysis import svg
from spikingbrain_train.spike_analysis.analysis import Analysis, Reading
from spikingbrain_train.spike_analysis.html_page import html_page
from spikingbrain_train.spike_analysis.linear_records import Linear, LinearRecord, Records, SharedInputs
from spikingbrain_train.spike_analysis.report import Read, SpikeReport
from spikingbrain_train.spiking.energy import EnergyModel

QKV, GATE, DOWN = Linear(0, "qkv"), Linear(0, "gate"), Linear(1, "down<proj>")


def record(counts: list[list[int]], outputs: int) -> LinearRecord:
    found = LinearRecord(len(counts[0]), outputs, torch.device("cpu"))
    found.add(torch.tensor(counts, dtype=torch.float32))
    return found


def records(times: int = 1) -> Records:
    """Two linears on one input of 2 channels, and one on 3 channels of which one never spikes."""
    shared = [[1, -3], [0, 2]]
    return Records(
        {
            QKV: record([[times * c for c in row] for row in shared], outputs=6),
            GATE: record([[times * c for c in row] for row in shared], outputs=2),
            DOWN: record([[times * 9, 0, -1], [0, 0, 0]], outputs=2),
        },
        {GATE: QKV},
    )


def report(ks: tuple[float, ...] = (2.0, 3.0)) -> SpikeReport:
    readings = [Reading(k, 2.0 + k, records(index + 1)) for index, k in enumerate(ks)]
    read = Read("models/<tiny>", "Megatron", "float32", None, "a & b.txt", 8, 2, 4)
    return SpikeReport.of(read, Analysis(1.5, readings), 2.0, 3, EnergyModel())


def test_shared_inputs_count_once_and_energies_weigh_by_outputs() -> None:
    numbers = report().numbers
    overall = numbers.overall
    # 1, -3, 0, 2 once, and 9, 0, -1, 0, 0, 0.
    assert overall.counts == 10 and overall.channels == 5
    assert overall.silent == pytest.approx(5 / 10) and overall.share_up_to_7 == pytest.approx(9 / 10)
    assert overall.silent_channels == pytest.approx(1 / 5)
    spikes = 1 + 2 + 1 + 2 + 1
    assert overall.mean_spikes == pytest.approx(spikes / 10)
    coding = overall.codings["bitwise_bidirectional"]
    assert coding.sparsity == pytest.approx(1 - (spikes - 1) / 30)  # the upper one of 9 is not sent
    operations = 4 * 6 + 4 * 2 + 6 * 2
    assert coding.energy_pj == pytest.approx(0.03 * (4 * 6 + 4 * 2 + 3 * 2) / operations)
    gate = numbers.projections["gate"]
    assert gate == numbers.projections["qkv"] and gate.counts == 4
    assert [each.layer for each in numbers.layers] == [0, 1]
    assert overall.least == -3 and overall.occurrences == [1, 0, 1, 5, 1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_parts_of_ranks_add_up_to_the_whole() -> None:
    counts = torch.randint(-9, 10, (5, 6), generator=torch.Generator().manual_seed(0))
    whole = LinearRecord(6, 4, torch.device("cpu"))
    whole.add(counts)
    parts = []
    for rank in range(2):  # each holds half of the channels, as behind a row-parallel linear
        part = LinearRecord(6, 4, torch.device("cpu"))
        part.add(counts[:, 3 * rank : 3 * rank + 3], 3 * rank)
        parts.append(Records({DOWN: part}))
    merged = Records.merged([*parts, Records()]).linears[DOWN]
    assert torch.equal(merged.distribution.histogram, whole.distribution.histogram)
    assert torch.equal(merged.spikes_of_channel, whole.spikes_of_channel)


def test_linears_share_an_input_within_a_layer_and_a_text() -> None:
    found = Records()
    inputs = SharedInputs(found)
    x, y, z = torch.ones(1), torch.ones(1), torch.ones(1)
    assert inputs.first_reader(QKV, x) == QKV and inputs.first_reader(GATE, x) == QKV
    assert inputs.first_reader(DOWN, x) == DOWN  # another layer
    assert inputs.first_reader(QKV, y) == QKV and inputs.first_reader(QKV, z) == QKV  # the next texts
    assert inputs.first_reader(GATE, y) == GATE and found.shared == {GATE: QKV}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_shows_everything() -> None:
    page = html_page(report())
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    tags = [tag for tag, _ in parsed.seen]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in parsed.seen)
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
    # Histograms of everything and of both inputs; rasters in five codings of the middle layer.
    labels = [attributes["aria-label"] for tag, attributes in parsed.seen if tag == "svg"]
    assert sum("Share of each count" in str(label) for label in labels) == 3
    assert sum("spikes of layer 1, down<proj>" in str(label) for label in labels) == 5
    assert {"Sparsity of 3 steps over k", "Cross entropy over k"} <= set(labels)
    assert "models/&lt;tiny&gt;" in page and "a &amp; b.txt" in page and "down&lt;proj&gt;" in page
    assert "gate read what another projection of their layer reads" in page


def test_the_page_of_one_k_has_no_sweep() -> None:
    assert "What k trades" not in html_page(report((2.0,)))


def test_json_holds_every_number() -> None:
    found = json.loads(json.dumps(report().as_json(), allow_nan=False))
    assert found["overall"]["occurrences"] == [1, 0, 1, 5, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert found["layers"][1]["projections"]["down<proj>"]["silent_channels"] == pytest.approx(1 / 3)
    assert found["shared_inputs"] == {"0.gate": "0.qkv"}
    assert [row["k"] for row in found["sweep"]] == [2.0, 3.0]
    assert found["sweep"][1]["published"] == {"share_up_to_7": 0.951, "sparsity": 0.692}
    assert found["rasters"] == [{"layer": 1, "projection": "down<proj>", "counts": [[9, 0, -1], [0, 0, 0]]}]
    assert found["overall"]["codings"]["binary"]["energy_pj"] is None


def test_a_grid_names_its_rows_by_what_says_something() -> None:
    rows = ["self_attn.q_proj", "self_attn.gk_proj.0", "mlp.down_proj", "other.down_proj"]
    drawn = svg.heat(rows, ["0"], {(row, "0"): 1.0 for row in rows}, "spikes")
    for name in ("q_proj", "gk_proj.0", "mlp.down_proj", "other.down_proj"):
        assert f">{name}</text>" in drawn
