"""The way of a checkpoint back to its source, from what its folders store. Nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.run import CheckpointConfig, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.conversion.lineage import lineage
from tests.config.small_model import small_model, write_checkpoint


def run_folder(
    output: Path, load: str | None, iteration: int, said_output: str | None = None, **stage: object
) -> Path:
    """A run's newest checkpoint, without weights."""
    run = RunConfig(
        model=small_model(),
        stage=StageConfig(train_iters=9, seq_length=64, global_batch_size=4, **stage),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(load=load),
        output_dir=said_output or str(output),
    )
    write_checkpoint(output / "checkpoints", run.model, iteration=iteration)
    folder = output / "checkpoints" / f"iter_{iteration:07d}"
    save_config(run, folder / "run_config.yaml")
    return folder


def converted(folder: Path, source: str) -> None:
    report = {"source": source, "architecture": "Qwen2ForCausalLM", "layers": "2 gla + 2 swa (window 4096)"}
    (folder / "conversion_report.json").write_text(json.dumps(report))


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """models/source -> hybrid -> align -> cpt -> export."""
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "hybrid", small_model(), iteration=0)
    converted(tmp_path / "hybrid", str(source))
    align = run_folder(tmp_path / "align", str(tmp_path / "hybrid"), 3, kind="align", teacher="dense")
    cpt = run_folder(
        *(tmp_path / "cpt", str(align.parent), 5),
        kind="distill",
        teacher="dense",
    )
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    converted(export, str(cpt))
    return tmp_path


def test_it_leads_back_to_the_source(road: Path) -> None:
    export, cpt, align, hybrid, source = lineage(road / "export")
    assert export.did.startswith("exported from ") and export.written is not None
    assert cpt.did == "stage distill: 5 iterations, 1.28 k tokens" and cpt.teacher == "dense"
    assert align.did == "stage align: 3 iterations, 768 tokens" and align.teacher == "dense"
    assert hybrid.did == f"imported from {road / 'models/source'} (Qwen2ForCausalLM)"
    assert source.did == "a Hugging Face folder" and source.folder == str(road / "models" / "source")


def test_what_is_gone_ends_it(road: Path) -> None:
    (road / "hybrid").rename(road / "elsewhere")
    *_, align, last = lineage(road / "cpt" / "checkpoints" / "iter_0000005")
    assert align.folder.endswith("align/checkpoints/iter_0000003")
    assert "not there any more" in last.did and last.folder == str(road / "hybrid")


def test_a_teacher_that_taught_nothing_is_not_named(tmp_path: Path) -> None:
    (step,) = lineage(run_folder(tmp_path / "run", None, 2, teacher="dense"))
    assert step.teacher is None and "from random weights (seed 1234)" in step.did


def test_relative_paths_mean_where_the_run_was_started(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "outputs" / "hybrid", small_model(), iteration=0)
    run = run_folder(tmp_path / "outputs" / "cpt", "outputs/hybrid", 2, said_output="outputs/cpt")
    _, hybrid = lineage(run)
    assert Path(hybrid.folder).resolve() == (tmp_path / "outputs/hybrid/iter_0000000").resolve()


def test_what_the_run_wrote_down_comes_before_what_its_setting_names_today(tmp_path: Path) -> None:
    for iteration in (1, 2):
        write_checkpoint(tmp_path / "align", small_model(), iteration=iteration)
    run = run_folder(tmp_path / "cpt", str(tmp_path / "align"), 2)
    started = {"iteration": 0, "time": 0.0, "event": "started"}
    event = {**started, "run": {"load": str(tmp_path / "align" / "iter_0000001")}}
    (tmp_path / "cpt" / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert lineage(run)[1].folder.endswith("iter_0000001")


def test_folders_that_lead_back_to_themselves_end(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", str(tmp_path / "run" / "checkpoints"), 2)
    assert [step.folder for step in lineage(run)] == [str(run)]
