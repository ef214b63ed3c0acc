"""spikingbrain-analyze-spikes on one model in all of its forms and over ranks.

In float32. Spikes jump where a channel lies half-way between two counts, so forms and topologies agree in all
but a few of some 10,000 counts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.load import load_model_config, save_config
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source


def analyze(*arguments: str) -> None:
    """The command, on every rank of a pool."""
    from spikingbrain_train.spike_analysis.command_line import analyze_spikes

    analyze_spikes([*arguments, "--device", "cpu", "--dtype", "float32"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hybrid`` and its ``export``, both again as if trained with spikes, and a ``text.txt``."""
    folder = tmp_path_factory.mktemp("spikes")
    source = save_small_source(folder / "source")
    import_checkpoint(source, folder / "hybrid", ConversionConfig(mixers=["gla", "swa"], sliding_window=7))
    export_checkpoint(folder / "hybrid", folder / "export")
    shutil.copytree(folder / "hybrid", folder / "spiking")
    stored = latest_checkpoint(folder / "spiking", "--model") / MODEL_CONFIG_FILE
    model = load_model_config(stored)
    save_config(replace(model, spiking=SpikingConfig([Projection.qkv, Projection.mlp_fc2], k=2.5)), stored)
    export_checkpoint(folder / "spiking", folder / "spiking_export")
    (folder / "text.txt").write_text(topics["assignment"])
    return folder


def analyzed(ranks: RankPool, folder: Path, model: str, *more: str, world_size: int = 1) -> dict[str, Any]:
    output = folder / f"out_{model}_{world_size}"
    words = ["--model", str(folder / model), "--text", str(folder / "text.txt"), "--output", str(output)]
    words += ["--seq-length", "32", "--windows", "2", "--trust-remote-code", *more]
    ranks.run(analyze, *words, world_size=world_size)
    assert (output / "spikes.html").read_text().startswith("<!DOCTYPE html>")
    found = json.loads((output / "spikes.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def of_checkpoint(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return analyzed(ranks, folder, "hybrid")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=2e-2)
    assert found["cross_entropy"]["without_spikes"] == pytest.approx(
        expected["cross_entropy"]["without_spikes"], abs=1e-5
    )
    for one, other in zip(
        [found["overall"], *(each["overall"] for each in found["layers"])],
        [expected["overall"], *(each["overall"] for each in expected["layers"])],
        strict=True,
    ):
        assert one["counts"] == other["counts"] and one["channels"] == other["channels"]
        for name in ("share_up_to_7", "silent", "mean_spikes"):
            assert one[name] == pytest.approx(other[name], abs=3e-3), name
        for coding, numbers in one["codings"].items():
            assert numbers["sparsity"] == pytest.approx(other["codings"][coding]["sparsity"], abs=3e-3)
        energies = [each["codings"]["bitwise_bidirectional"]["energy_pj"] for each in (one, other)]
        assert energies[0] == pytest.approx(energies[1], rel=3e-3)


def test_every_input_of_every_layer_is_counted(of_checkpoint: dict[str, Any]) -> None:
    tokens, hidden, mlp = 64, 32, 48
    layers = of_checkpoint["layers"]
    assert [each["layer"] for each in layers] == [0, 1, 2, 3]
    for layer in layers:
        names = set(layer["projections"])
        gate = {"self_attention.linear_gate_down_proj"} if layer["layer"] % 2 == 0 else set()
        assert names == gate | {
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        }
        # Of each input once: q, k, v and the gate read one.
        assert layer["overall"]["counts"] == tokens * (3 * hidden + mlp)
    assert of_checkpoint["overall"]["counts"] == sum(of_checkpoint["overall"]["occurrences"])
    assert of_checkpoint["k"] == 3.0 and of_checkpoint["trained_k"] is None
    assert len(of_checkpoint["rasters"]) == 4


def test_an_export_says_what_its_checkpoint_says(
    ranks: RankPool, folder: Path, of_checkpoint: dict[str, Any]
) -> None:
    assert_same(analyzed(ranks, folder, "export"), of_checkpoint)


def test_a_model_that_was_trained_with_spikes_is_counted_where_it_has_them(
    ranks: RankPool, folder: Path
) -> None:
    trained = analyzed(ranks, folder, "spiking", "--sweep")
    assert trained["k"] == trained["trained_k"] == 2.5 and len(trained["sweep"]) == 1
    assert set(trained["projections"]) == {"self_attention.linear_qkv", "mlp.linear_fc2"}
    exported = analyzed(ranks, folder, "spiking_export", "--sweep")
    assert exported["trained_k"] == 2.5
    names = {name.rsplit(".", 1)[-1] for name in exported["projections"]}
    assert names == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert_same(exported, trained)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("tp2_sp",), id="TP 2 + sequence parallel"),
        pytest.param(("pipeline_model_parallel_size=2",), id="PP 2", marks=pytest.mark.slow),
        pytest.param(("context_parallel_size=2",), id="CP 2", marks=pytest.mark.slow),
        pytest.param((), id="DP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_counts_the_same(
    settings: tuple[str, ...], ranks: RankPool, folder: Path, of_checkpoint: dict[str, Any]
) -> None:
    parallel = ("--parallel", *settings) if settings else ()
    assert_same(analyzed(ranks, folder, "hybrid", *parallel, world_size=2), of_checkpoint)


def test_coarser_spikes_are_rarer_as_in_the_paper(of_checkpoint: dict[str, Any]) -> None:
    """SpikingBrain, arXiv 2509.05276, table 11: sparsity and share up to 7 fall with k."""
    rows = of_checkpoint["sweep"]
    assert [row["k"] for row in rows] == [2.0, 2.5, 3.0, 3.5, 4.0]
    for earlier, later in zip(rows, rows[1:], strict=False):
        assert earlier["share_up_to_7"] > later["share_up_to_7"]
        ours = [row["codings"]["bitwise_bidirectional"]["sparsity"] for row in (earlier, later)]
        assert ours[0] > ours[1]
        assert earlier["published"]["sparsity"] > later["published"]["sparsity"]
