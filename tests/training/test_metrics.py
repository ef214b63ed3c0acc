"""What a run writes about itself, and what a resumed run makes of it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikingbrain_train.config.run import LoggingConfig, WandbMode
from spikingbrain_train.errors import DataError, NumericalError, PlatformError
from spikingbrain_train.training.heat_map import HeatMap
from spikingbrain_train.training.metrics import METRICS_FILE, WANDB_RUN_ID_FILE, MetricsLogger, read_metrics

FILE_ONLY = LoggingConfig(tensorboard=False)


def log_losses(
    config: LoggingConfig, folder: Path, losses: dict[int, float], resumed_iteration: int = 0
) -> None:
    with MetricsLogger(config, folder, is_logging_rank=True, resumed_iteration=resumed_iteration) as logger:
        for iteration, loss in losses.items():
            logger.log(iteration, {"train/loss": loss})


def losses_on_file(folder: Path) -> dict[int, float]:
    points = read_metrics(folder)
    losses = {point["iteration"]: point["train/loss"] for point in points}
    assert len(losses) == len(points), "an iteration was written twice"
    return losses


def losses_in_tensorboard(folder: Path) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert len({event.step for event in scalars}) == len(scalars), "an iteration was written twice"
    return {event.step: event.value for event in scalars}


def test_points_are_readable_by_any_json_reader(tmp_path: Path) -> None:
    with MetricsLogger(FILE_ONLY, tmp_path, is_logging_rank=True) as logger:
        logger.log(1, {"train/loss": 2.5, "train/grad_norm": math.inf, "valid/cross_entropy": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    point = json.loads(line, parse_constant=refuse)
    assert point["iteration"] == 1
    assert point["train/loss"] == 2.5
    assert point["train/grad_norm"] is None and point["valid/cross_entropy"] is None


def test_a_heat_map_is_rows_of_numbers_in_the_file_and_a_picture_in_tensorboard(tmp_path: Path) -> None:
    table = HeatMap([[1.5, 0.123456], [0.0, math.nan]], ["layer 1", "layer 3"], "expert", "load over mean")
    with MetricsLogger(LoggingConfig(tensorboard=True), tmp_path, is_logging_rank=True) as logger:
        logger.log(1, {"train/loss": 2.5}, {"moe/expert_load": table})

    (point,) = read_metrics(tmp_path)
    assert point["train/loss"] == 2.5
    assert point["moe/expert_load"] == [[1.5, 0.1235], [0.0, None]]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("moe/expert_load")
    assert picture.step == 1 and picture.width > 100 and picture.height > 100


def test_each_point_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    logger = MetricsLogger(FILE_ONLY, tmp_path, is_logging_rank=True)
    logger.log(1, {"train/loss": 2.0})
    assert losses_on_file(tmp_path) == {1: 2.0}
    logger.close()
    logger.close()


def test_resumed_run_has_one_clean_curve(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True)
    log_losses(config, tmp_path, {10: 5.0, 20: 4.0, 30: 3.5})
    log_losses(config, tmp_path, {30: 3.0, 40: 2.0}, resumed_iteration=20)
    expected = {10: 5.0, 20: 4.0, 30: 3.0, 40: 2.0}
    assert losses_on_file(tmp_path) == expected
    assert losses_in_tensorboard(tmp_path) == expected


def test_new_run_in_a_used_folder_starts_afresh(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True)
    log_losses(config, tmp_path, {0: 9.0, 10: 5.0})
    log_losses(config, tmp_path, {0: 8.0, 10: 4.0})
    assert losses_on_file(tmp_path) == {0: 8.0, 10: 4.0}
    assert losses_in_tensorboard(tmp_path) == {0: 8.0, 10: 4.0}


def test_line_cut_by_a_crash_is_dropped_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_losses(FILE_ONLY, tmp_path, {1: 5.0, 2: 4.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 3, "train/lo')
    assert losses_on_file(tmp_path) == {1: 5.0, 2: 4.0}  # readers leave the unfinished line out
    with caplog.at_level(logging.WARNING):
        log_losses(FILE_ONLY, tmp_path, {3: 3.0}, resumed_iteration=2)
    assert "line 3" in caplog.text
    assert losses_on_file(tmp_path) == {1: 5.0, 2: 4.0, 3: 3.0}


def test_damaged_line_is_named_to_readers(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not a metrics point"):
        read_metrics(tmp_path)


def test_missing_metrics_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "nowhere")


def test_ranks_that_do_not_log_touch_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with MetricsLogger(LoggingConfig(wandb=WandbMode.offline), folder, is_logging_rank=False) as logger:
        logger.log(1, {"train/loss": 2.0})
    assert not folder.exists()


def test_unwritable_output_dir_is_a_sentence(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(PlatformError, match="choose another output_dir"):
        MetricsLogger(FILE_ONLY, blocker / "run", is_logging_rank=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full imitates a full disk on Linux only")
def test_full_disk_is_a_sentence(tmp_path: Path) -> None:
    logger = MetricsLogger(FILE_ONLY, tmp_path, is_logging_rank=True)
    assert logger._file is not None
    logger._file.close()
    logger._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(PlatformError, match="No space left"), logger:  # closing it fails, too
        logger.log(1, {"train/loss": 2.0})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full imitates a full disk on Linux only")
def test_a_full_disk_does_not_take_the_place_of_what_ended_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MetricsLogger(FILE_ONLY, tmp_path, is_logging_rank=True)
    assert logger._file is not None
    logger._file.close()
    logger._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(NumericalError, match="the loss is nan"), logger:
        logger._file.write("what closing tries to write")
        raise NumericalError("the loss is nan")
    assert "No space left" in caplog.text


def test_wandb_offline_needs_no_account_and_keeps_its_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = LoggingConfig(tensorboard=False, wandb=WandbMode.offline, wandb_name="test")
    log_losses(config, tmp_path, {1: 2.0})
    run_id = (tmp_path / WANDB_RUN_ID_FILE).read_text().strip()
    log_losses(config, tmp_path, {2: 1.0}, resumed_iteration=1)
    assert (tmp_path / WANDB_RUN_ID_FILE).read_text().strip() == run_id
    run_files = list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(run_files) == 2, "both attempts belong to one W&B run"
    assert all(file.stat().st_size > 0 for file in run_files)
    log_losses(config, tmp_path, {1: 2.0})
    assert (tmp_path / WANDB_RUN_ID_FILE).read_text().strip() != run_id, "a new run has a new id"


def test_wandb_online_without_account_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(PlatformError, match=r"No API key configured.*logging\.wandb=offline"):
        MetricsLogger(
            LoggingConfig(wandb=WandbMode.online, tensorboard=False), tmp_path, is_logging_rank=True
        )
