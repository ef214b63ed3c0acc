"""Tokens of all stages of a model, from what its checkpoints store; nothing needs torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.run import CheckpointConfig, DataConfig, RunConfig
from spikingbrain_train.config.run_record import RunRecord, TokenHistory, read_record, write_record
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.token_history import (
    describe_all,
    describe_end,
    history_of,
    history_with,
    percent,
)
from tests.config.small_model import small_model, write_checkpoint

BATCH, LENGTH = 4, 64


def config(output: Path, load: Path | None, kind: str = "cpt", source: float | None = None) -> RunConfig:
    return RunConfig(
        model=small_model(),
        stage=StageConfig(kind=kind, train_iters=9, seq_length=LENGTH, global_batch_size=BATCH),
        checkpoint=CheckpointConfig(load=None if load is None else str(load)),
        data=DataConfig(source_tokens=source),
        output_dir=str(output),
    )


def train(run: RunConfig, iteration: int, *, records: bool = True) -> Path:
    """Leave what a run leaves behind, without weights; returns its folder of checkpoints."""
    history = history_of(run)
    checkpoints = Path(run.output_dir) / "checkpoints"
    write_checkpoint(checkpoints, run.model, iteration=iteration)
    folder = checkpoints / f"iter_{iteration:07d}"
    save_config(run, folder / "run_config.yaml")
    if records:
        write_record(RunRecord(1, [], history), folder)
    return checkpoints


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """Converted from a dense model."""
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "hybrid", small_model(), iteration=0)
    (tmp_path / "hybrid" / "conversion_report.json").write_text(json.dumps({"source": str(source)}))
    return tmp_path / "hybrid"


@pytest.mark.parametrize("records", [True, False], ids=["stored", "followed back"])
def test_stages_add_up_from_the_source_on(tmp_path: Path, hybrid: Path, records: bool) -> None:
    align = train(config(tmp_path / "align", hybrid, "align", source=1e6), 3, records=records)
    cpt = train(config(tmp_path / "cpt", align), 5, records=records)
    found = history_of(config(tmp_path / "next", cpt))
    assert [(stage.kind, stage.tokens) for stage in found.stages] == [("align", 768), ("cpt", 1280)]
    assert found.unknown is None and found.source_tokens == 1e6
    assert history_with(cpt) == found
    record = RunRecord(1, [], found)
    assert record.all_tokens(952) == 3000 and record.source_share(952) == 0.003
    assert describe_all(found) == ("2.048 k in 2 stages (align 768, cpt 1.28 k): 0.2 % of the source's 1 M")
    assert describe_end(found, 952) == (
        "3 k in all stages, 2.048 k in 2 stages (align 768, cpt 1.28 k) before this one; 0.3 % of the "
        "source's 1 M (this stage: 0.095 %)"
    )


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path: Path, hybrid: Path) -> None:
    align = train(config(tmp_path / "align", hybrid, "align"), 3)
    run = config(tmp_path / "cpt", align, source=1e6)
    train(run, 5)
    shutil.rmtree(tmp_path / "align")
    shutil.rmtree(hybrid)
    again = history_of(run)
    assert [stage.tokens for stage in again.stages] == [768] and again.unknown is None
    told_otherwise = replace(run, data=DataConfig(source_tokens=2e6))
    assert history_of(told_otherwise) == replace(again, source_tokens=2e6)
    # Its own tokens are no part of what was before it, but of what comes after it.
    after = history_of(config(tmp_path / "sft", tmp_path / "cpt" / "checkpoints"))
    assert [stage.tokens for stage in after.stages] == [768, 1280] and after.source_tokens == 1e6


def test_where_it_ends_is_said_and_nothing_guessed(tmp_path: Path, hybrid: Path) -> None:
    align = train(config(tmp_path / "align", hybrid, "align", source=1e6), 3, records=False)
    cpt = train(config(tmp_path / "cpt", align, source=1e6), 5, records=False)
    shutil.rmtree(tmp_path / "align")
    found = history_of(config(tmp_path / "next", cpt))
    assert [stage.tokens for stage in found.stages] == [1280]
    assert found.unknown == f"{align} is not there"
    record = RunRecord(1, [], found)
    assert record.all_tokens(100) is None and record.source_share(100) is None
    assert describe_end(found, 100) == (
        f"100 in this stage, 0.01 % of the source's 1 M; what was read before is not known: {align} is not "
        "there; known are 1.28 k in one stage (cpt)"
    )
    assert "and what was read before is not known" in describe_all(found)
    # The next stage's checkpoints store that, too.
    last = train(config(tmp_path / "next", cpt), 2)
    assert history_with(last).unknown == found.unknown
    assert history_of(config(tmp_path / "x", tmp_path / "nowhere")).unknown is not None


def test_an_export_that_is_imported_again_goes_on_counting(tmp_path: Path, hybrid: Path) -> None:
    cpt = train(config(tmp_path / "cpt", hybrid), 5)
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text('{"auto_map": {}}')
    (export / "conversion_report.json").write_text(json.dumps({"source": str(cpt / "iter_0000005")}))
    write_checkpoint(tmp_path / "again", small_model(), iteration=0)
    (tmp_path / "again" / "conversion_report.json").write_text(json.dumps({"source": str(export)}))
    assert [stage.tokens for stage in history_of(config(tmp_path / "y", tmp_path / "again")).stages] == [1280]
    stored = tmp_path / "again" / "iter_0000000" / "hf_source"
    stored.mkdir()
    shutil.copy(export / "config.json", stored)
    shutil.rmtree(export)
    assert history_of(config(tmp_path / "y", tmp_path / "again")).unknown is not None


def test_nothing_was_read_before_random_weights_or_a_dense_model(tmp_path: Path, hybrid: Path) -> None:
    assert history_of(config(tmp_path / "a", None)) == TokenHistory()
    assert history_of(config(tmp_path / "a", hybrid)) == TokenHistory()
    shutil.rmtree(tmp_path / "models")  # a dense model may lie elsewhere by now
    assert history_of(config(tmp_path / "a", hybrid)) == TokenHistory()


def test_records_of_earlier_releases_have_no_history(tmp_path: Path) -> None:
    (tmp_path / "run_record.json").write_text('{"world_size": 2, "training_data": []}')
    assert read_record(tmp_path) == RunRecord(2, [])


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.014, "1.4 %"), (2.7e-9, "0.00000027 %"), (0.5, "50 %"), (1.5, "150 %"), (0.0, "0 %")],
)
def test_shares_of_any_size_are_numbers_that_people_read(share: float, text: str) -> None:
    assert percent(share) == text
