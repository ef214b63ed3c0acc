"""What a run writes about itself, and what a resumed run makes of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikingbrain_train.config.run import LoggingConfig, LRDecayStyle, RunConfig, WandbMode
from spikingbrain_train.config.run_record import StageTokens, TokenHistory
from spikingbrain_train.errors import DataError, NumericalError, PlatformError
from spikingbrain_train.planning.resume import Change
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_events, read_metrics
from spikingbrain_train.reporting.start_times import StartTimes
from spikingbrain_train.training.beginning import Beginning, Facts, HeldOutSet
from spikingbrain_train.training.callbacks import weights_and_biases
from spikingbrain_train.training.callbacks.callbacks import Callbacks
from spikingbrain_train.training.callbacks.metrics_file import MetricsFile
from spikingbrain_train.training.callbacks.tensorboard import TensorBoard
from spikingbrain_train.training.callbacks.weights_and_biases import WANDB_RUN_ID_FILE, WeightsAndBiases
from spikingbrain_train.training.heat_map import HeatMap
from spikingbrain_train.training.report import Report

FILE_ONLY = LoggingConfig(tensorboard=False)


@contextmanager
def writers(
    logging: LoggingConfig,
    folder: Path,
    *,
    is_main_process: bool = True,
    resumed_iteration: int = 0,
    changes: list[Change] | None = None,
    is_last_step: bool = False,
) -> Iterator[Callbacks]:
    """What writes the reports of a run, from its start to its end."""
    config = RunConfig(logging=logging, output_dir=str(folder))
    config.stage.train_iters, config.stage.seq_length, config.stage.global_batch_size = 100, 32, 4
    begins = None if resumed_iteration == 0 else changes or []
    facts = Facts(str(folder), "cpt", None, {"text": HeldOutSet(1000, "abcd")}, seq_length=32, world_size=1)
    run = SimpleNamespace(
        config=config,
        groups=SimpleNamespace(is_main_process=is_main_process),
        state=SimpleNamespace(iteration=resumed_iteration),
        beginning=Beginning(resumed_iteration, facts, [("weights", "random")], begins),
        is_last_step=is_last_step,
        record=SimpleNamespace(history=TokenHistory([StageTokens("align", 4096, "earlier/checkpoints")])),
        console=SimpleNamespace(start_times=StartTimes(0.0)),
        activity=lambda _: nullcontext(),
        say=print,
    )
    callbacks = Callbacks([MetricsFile(), TensorBoard(), WeightsAndBiases()], run)  # type: ignore[arg-type]
    error: BaseException | None = None
    try:
        callbacks.start()
        yield callbacks
    except BaseException as met:
        error = met
        raise
    finally:
        callbacks.end(error)


def log_losses(
    config: LoggingConfig,
    folder: Path,
    losses: dict[int, float],
    resumed_iteration: int = 0,
    changes: list[Change] | None = None,
) -> None:
    with writers(config, folder, resumed_iteration=resumed_iteration, changes=changes) as callbacks:
        for iteration, loss in losses.items():
            callbacks.log(Report(iteration, {"train/loss": loss}))


def full_disk(callbacks: Callbacks) -> TextIO:
    """Put the metrics file on a full disk."""
    file = next(each for each in callbacks if isinstance(each, MetricsFile))
    assert file._file is not None
    file._file.close()
    file._file = open("/dev/full", "w")  # noqa: SIM115
    return file._file


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
    with writers(FILE_ONLY, tmp_path) as callbacks:
        metrics = {"train/loss": 2.5, "train/grad_norm": math.inf, "valid/cross_entropy": math.nan}
        callbacks.log(Report(1, metrics))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    _started, line = (tmp_path / METRICS_FILE).read_text().splitlines()
    point = json.loads(line, parse_constant=refuse)
    assert point["iteration"] == 1
    assert point["train/loss"] == 2.5
    assert point["train/grad_norm"] is None and point["valid/cross_entropy"] is None


def test_a_heat_map_is_rows_of_numbers_in_the_file_and_a_picture_in_tensorboard(tmp_path: Path) -> None:
    table = HeatMap([[1.5, 0.123456], [0.0, math.nan]], ["layer 1", "layer 3"], "expert", "load over mean")
    with writers(LoggingConfig(tensorboard=True), tmp_path) as callbacks:
        callbacks.log(Report(1, {"train/loss": 2.5}, {"moe/expert_load": table}))

    (point,) = read_metrics(tmp_path)
    assert point["train/loss"] == 2.5
    assert point["moe/expert_load"] == [[1.5, 0.1235], [0.0, None]]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("moe/expert_load")
    assert picture.step == 1 and picture.width > 100 and picture.height > 100


def test_each_point_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with writers(FILE_ONLY, tmp_path) as callbacks:
        callbacks.log(Report(1, {"train/loss": 2.0}))
        assert losses_on_file(tmp_path) == {1: 2.0}


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


LOWER_RATE = Change("optimizer.lr", 1e-3, 1e-4, "")


def test_the_file_says_what_the_points_belong_to(tmp_path: Path) -> None:
    log_losses(FILE_ONLY, tmp_path, {10: 5.0, 20: 4.0})
    (started,) = read_events(tmp_path)
    assert started.pop("time") > 1.7e9
    assert started == {
        "iteration": 0,
        "event": "started",
        "run": {
            "output_dir": str(tmp_path),
            "stage": "cpt",
            "load": None,
            "held_out": {"text": {"tokens": 1000, "fingerprint": "abcd"}},
            "seq_length": 32,
            "world_size": 1,
        },
    }
    style = Change("optimizer.lr_decay_style", LRDecayStyle.cosine, LRDecayStyle.WSD, "")
    data = Change("data.valid", ["a"], ["a", "b"], "")
    log_losses(FILE_ONLY, tmp_path, {30: 3.0}, resumed_iteration=20, changes=[LOWER_RATE, style, data])
    assert read_events(tmp_path)[0]["event"] == "started"
    resumed = read_events(tmp_path)[1]
    assert (resumed["iteration"], resumed["event"], resumed["run"]) == (20, "resumed", started["run"])
    assert resumed["changed"] == {
        "optimizer.lr": [1e-3, 1e-4],
        "optimizer.lr_decay_style": ["cosine", "WSD"],
        "data.valid": [["a"], ["a", "b"]],
    }


def test_events_are_dropped_with_the_points_that_they_are_about(tmp_path: Path) -> None:
    def happened() -> list[tuple[str, int]]:
        return [(event["event"], event["iteration"]) for event in read_events(tmp_path)]

    log_losses(FILE_ONLY, tmp_path, {10: 5.0, 20: 4.0, 30: 3.5})
    log_losses(FILE_ONLY, tmp_path, {30: 3.0, 40: 2.0}, resumed_iteration=20, changes=[LOWER_RATE])
    log_losses(FILE_ONLY, tmp_path, {50: 1.5}, resumed_iteration=40)
    assert happened() == [("started", 0), ("resumed", 20), ("resumed", 40)]
    log_losses(FILE_ONLY, tmp_path, {45: 1.5}, resumed_iteration=40)  # again, nothing of the last is left
    assert happened() == [("started", 0), ("resumed", 20), ("resumed", 40)]
    log_losses(FILE_ONLY, tmp_path, {30: 3.0}, resumed_iteration=20)  # back to before the change
    assert happened() == [("started", 0), ("resumed", 20)] and read_events(tmp_path)[1]["changed"] == {}
    log_losses(FILE_ONLY, tmp_path, {10: 3.0})
    assert happened() == [("started", 0)]


def test_a_run_with_nothing_left_to_do_is_no_event(tmp_path: Path) -> None:
    log_losses(FILE_ONLY, tmp_path, {100: 5.0})
    with writers(FILE_ONLY, tmp_path, resumed_iteration=100, is_last_step=True):
        pass
    assert [event["event"] for event in read_events(tmp_path)] == ["started"]


def test_files_of_earlier_releases_have_points_only(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1, "train/loss": 2.0}\n')
    assert read_events(tmp_path) == [] and losses_on_file(tmp_path) == {1: 2.0}
    log_losses(FILE_ONLY, tmp_path, {2: 1.0}, resumed_iteration=1)
    assert [event["event"] for event in read_events(tmp_path)] == ["resumed"]
    assert losses_on_file(tmp_path) == {1: 2.0, 2: 1.0}


def test_tensorboard_has_the_config_and_what_changed_as_text(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True)
    log_losses(config, tmp_path, {10: 5.0})
    log_losses(config, tmp_path, {20: 3.0}, resumed_iteration=10, changes=[LOWER_RATE])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def texts(tag: str) -> list[tuple[int, str]]:
        found = events.Tensors(f"{tag}/text_summary")
        return [(each.step, each.tensor_proto.string_val[0].decode()) for each in found]

    assert texts("run/started") == [(0, "weights: random")]
    assert texts("run/resumed") == [(10, "weights: random")]
    assert [step for step, _ in texts("run/config")] == [0, 10]
    assert "    optimizer:\n      kind: adamw\n      lr: 0.0005\n" in texts("run/config")[0][1]


def test_line_cut_by_a_crash_is_dropped_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_losses(FILE_ONLY, tmp_path, {1: 5.0, 2: 4.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 3, "train/lo')
    assert losses_on_file(tmp_path) == {1: 5.0, 2: 4.0}  # readers leave the unfinished line out
    with caplog.at_level(logging.WARNING):
        log_losses(FILE_ONLY, tmp_path, {3: 3.0}, resumed_iteration=2)
    assert "line 4" in caplog.text
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
    with writers(LoggingConfig(wandb=WandbMode.offline), folder, is_main_process=False):
        pass  # whose reports they don't get
    assert not folder.exists()


def test_unwritable_output_dir_is_a_sentence(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with (
        pytest.raises(PlatformError, match="choose another output_dir"),
        writers(FILE_ONLY, blocker / "run"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full imitates a full disk on Linux only")
def test_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="No space left"), writers(FILE_ONLY, tmp_path) as callbacks:
        full_disk(callbacks)  # closing it fails, too
        callbacks.log(Report(1, {"train/loss": 2.0}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full imitates a full disk on Linux only")
def test_a_full_disk_does_not_take_the_place_of_what_ended_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NumericalError, match="the loss is nan"), writers(FILE_ONLY, tmp_path) as callbacks:
        full_disk(callbacks).write("what closing tries to write")
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


def test_wandb_has_the_config_what_the_run_is_and_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    online = SimpleNamespace(define_metric=lambda *_, **__: None, summary=summary, finish=lambda **_: None)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: asked.append(kwargs) or online)
    monkeypatch.setattr(weights_and_biases, "_unreachable", lambda url: None)
    config = LoggingConfig(wandb=WandbMode.online, tensorboard=False)
    with writers(config, tmp_path):
        assert summary == {}
    with writers(config, tmp_path, resumed_iteration=10, changes=[LOWER_RATE]):
        pass
    for arguments in asked:
        assert arguments["config"]["run"]["held_out"] == {"text": {"tokens": 1000, "fingerprint": "abcd"}}
        assert arguments["config"]["optimizer"]["lr"] == 5e-4
        (before,) = arguments["config"]["lineage"]
        assert before == {"kind": "align", "tokens": 4096, "checkpoint": "earlier/checkpoints"}
        assert arguments["resume"] == "allow"
    assert asked[0]["id"] == asked[1]["id"]
    assert summary == {"resumed/iteration": 10, "resumed/changed": {"optimizer.lr": "0.001 -> 0.0001"}}


def test_wandb_online_without_account_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(weights_and_biases, "_unreachable", lambda url: None)
    online = LoggingConfig(wandb=WandbMode.online, tensorboard=False)
    with (
        pytest.raises(PlatformError, match=r"No API key configured.*logging\.wandb=offline"),
        writers(online, tmp_path),
    ):
        pass
