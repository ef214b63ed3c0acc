"""Files that a run names are checked before anything starts, and nothing on disk changes."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from spikingbrain_train.config.model import (
    ActivationFunc,
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
)
from spikingbrain_train.config.run import DataConfig, Resume, RunConfig
from spikingbrain_train.config.stage import AlignmentConfig, AlignmentInputs, StageConfig
from spikingbrain_train.data.gpt_dataset import build_datasets
from spikingbrain_train.errors import CheckpointError, ConfigurationError, DataError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.file_checks import check_output_folder
from spikingbrain_train.storage.memory_folder import run_id
from tests.config.small_model import small_model, write_checkpoint

HYBRID = small_model()
DENSE = dataclasses.replace(HYBRID, mixers=["full"])


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """A run over files that all exist."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").touch()
    return RunConfig(
        model=dataclasses.replace(HYBRID),
        stage=StageConfig(train_iters=10, seq_length=64, global_batch_size=1),
        data=DataConfig(train=[str(tmp_path / "tokens")]),
        output_dir=str(tmp_path / "runs" / "new"),
    )


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refusal(run: RunConfig, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        check_run_config(run, world_size=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_over_existing_files_is_accepted_and_leaves_the_disk_alone(run, tmp_path):
    before = snapshot(tmp_path)
    check_run_config(run, world_size=1)
    assert snapshot(tmp_path) == before


def test_training_data_must_be_named(run):
    run.data.train = []
    assert "data.train=[" in refusal(run, ConfigurationError)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_both_halves_of_a_dataset_must_exist(run, tmp_path, suffix):
    (tmp_path / f"tokens{suffix}").unlink()
    sentence = refusal(run, DataError)
    assert f"tokens{suffix}" in sentence and "spikingbrain-preprocess" in sentence


def test_a_dataset_named_by_its_file_is_told_its_prefix(run, tmp_path):
    run.data.valid = [f"{tmp_path}/tokens.bin"]
    assert refusal(run, DataError).endswith(f"name its prefix {tmp_path}/tokens")


@pytest.mark.parametrize(
    ("blend", "said"),
    [
        (
            [{"prefix": "A", "weight": -1.0}, {"prefix": "B", "weight": 1}],
            "data.train[0] has the weight -1.0",
        ),
        ([{"prefix": "A", "weight": 1.0}, {"prefix": "B", "weight": 0}], "instead of weighting it 0"),
        ([{"prefix": "A", "weight": 0}, {"prefix": "B", "weight": 0}], "must be a positive, finite number"),
        ([{"prefix": "A", "weight": float("nan")}], "data.train[0] has the weight nan"),
        ([{"prefix": "A", "weight": 1e308}, {"prefix": "B", "weight": 1e308}], "sum of the weights"),
        ([{"prefix": "A", "weight": "much"}], "the weight much, which is no number"),
        ([{"prefix": "A", "weight": True}], "which is no number"),
        (["A", {"prefix": "B", "weight": 1.0}], "B a weight and A none; give every dataset one"),
        ([{"prefix": "A"}, {"prefix": "B", "weight": 1.0}], "B a weight and A none"),
        (["A", "./A"], "data.train[1]=./A is the dataset of data.train[0]; name it once"),
        ([{"prefix": "A", "weight": 1}, {"prefix": "A", "weight": 2}], "with the sum of the weights"),
        ([{"prefix": "A", "share": 1}], "data.train[0]={'prefix': 'A', 'share': 1} does not fit"),
        ([7], "data.train[0]=7 does not fit: data.train[0] takes a prefix, or {prefix: data/a, weight: 0.7}"),
        ([["A", 0.7]], "does not fit"),
    ],
)
def test_a_blend_that_training_would_refuse_is_refused_at_start(run, blend, said):
    run.data.train = blend
    sentence = refusal(run, ConfigurationError)
    assert said in sentence
    with pytest.raises(ConfigurationError) as caught:
        build_datasets(run.data, 64, 1)
    assert str(caught.value) == sentence


def test_a_weighted_dataset_that_is_missing_is_named(run, tmp_path):
    run.data.train = [{"prefix": run.data.train[0], "weight": 1}, {"prefix": f"{tmp_path}/no", "weight": 2}]
    assert f"data.train[1]={tmp_path}/no: there is no {tmp_path}/no.bin" in refusal(run, DataError)


def test_tokenizer_must_exist(run, tmp_path):
    run.data.tokenizer = str(tmp_path / "nowhere")
    assert "data.tokenizer=" in refusal(run, DataError)


def test_output_below_a_file_is_refused(run, tmp_path):
    run.output_dir = str(tmp_path / "tokens.bin" / "run")
    sentence = refusal(run, ConfigurationError)
    assert "output_dir=" in sentence and "tokens.bin is a file" in sentence


def test_output_on_a_file_system_that_takes_no_files_is_refused(run):
    run.output_dir = "/proc/run"
    assert "output_dir=/proc/run cannot be written" in refusal(run, ConfigurationError)


def test_output_on_a_full_disk_is_refused(run, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refusal(run, ConfigurationError)


def test_output_folder_check_creates_nothing(tmp_path):
    check_output_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_output_must_not_be_where_the_run_starts_from(run, tmp_path):
    run.output_dir = str(tmp_path / "run")
    run.checkpoint.load = write_checkpoint(tmp_path / "run" / "checkpoints", HYBRID)
    sentence = refusal(run, ConfigurationError)
    assert "checkpoint.load" in sentence and "choose another output_dir" in sentence


def test_resume_agrees_with_what_lies_in_the_output(run, tmp_path):
    run.checkpoint.resume = Resume.must
    assert "checkpoint.resume=auto" in refusal(run, CheckpointError)
    run_id(run.output_dir)
    assert "checkpoint.resume=auto" in refusal(run, CheckpointError)
    run.checkpoint.memory_interval, run.checkpoint.memory_folder = 5, str(tmp_path)
    check_run_config(run, world_size=1)  # hosts may have copies in memory: all of them are asked
    write_checkpoint(Path(run.output_dir) / "checkpoints", HYBRID, iteration=30, run=run)
    run.stage.train_iters = 40
    check_run_config(run, world_size=1)
    run.checkpoint.resume = Resume.never
    sentence = refusal(run, ConfigurationError)
    assert "iteration 30" in sentence and "checkpoint.resume=auto" in sentence


class TestLoadedCheckpoint:
    def test_a_fitting_checkpoint_is_accepted_with_a_longer_context(self, run, tmp_path):
        run.checkpoint.load = write_checkpoint(tmp_path / "hybrid", HYBRID)
        run.model.max_position_embeddings = 32768
        run.model.sliding_window = 128
        check_run_config(run, world_size=1)

    def test_missing_folder(self, run, tmp_path):
        run.checkpoint.load = str(tmp_path / "nowhere")
        assert "checkpoint.load=" in refusal(run, CheckpointError)

    def test_folder_without_tracker(self, run, tmp_path):
        run.checkpoint.load = str(tmp_path)
        assert "latest_checkpointed_iteration.txt" in refusal(run, CheckpointError)

    def test_folder_of_one_iteration_is_told_its_parent(self, run, tmp_path):
        folder = write_checkpoint(tmp_path / "hybrid", HYBRID, iteration=7)
        run.checkpoint.load = f"{folder}/iter_0000007"
        assert refusal(run, CheckpointError).endswith(f"checkpoint.load={folder}")

    def test_folder_of_a_run_is_told_its_checkpoints(self, run, tmp_path):
        folder = write_checkpoint(tmp_path / "old" / "checkpoints", HYBRID)
        run.checkpoint.load = str(tmp_path / "old")
        assert refusal(run, CheckpointError).endswith(f"checkpoint.load={folder}")

    @pytest.mark.parametrize("content", ["", "release", "12x", "-1"])
    def test_damaged_tracker(self, run, tmp_path, content):
        run.checkpoint.load = write_checkpoint(tmp_path / "hybrid", HYBRID)
        (tmp_path / "hybrid" / "latest_checkpointed_iteration.txt").write_text(content)
        assert "instead of an iteration number" in refusal(run, CheckpointError)

    @pytest.mark.parametrize("missing", ["model_config.yaml", ".metadata"])
    def test_incomplete_iteration(self, run, tmp_path, missing):
        run.checkpoint.load = write_checkpoint(tmp_path / "hybrid", HYBRID)
        (tmp_path / "hybrid" / "iter_0000000" / missing).unlink()
        assert missing in refusal(run, CheckpointError)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"num_layers": 2}, ["num_layers=2", "model.num_layers=4"]),
            ({"vocab_size": 1024}, ["vocab_size=1024", "model.vocab_size=512"]),
            ({"add_qkv_bias": True}, ["add_qkv_bias=true", "model.add_qkv_bias=false"]),
            ({"mixers": ["swa", "gla"]}, ["mixer swa in layer 0", "model.mixers says gla"]),
            ({"mixers": ["gla", ["gla", "swa"]]}, ["mixer [gla,swa] in layer 1", "model.mixers says swa"]),
            ({"num_sink_tokens": 6}, ["num_sink_tokens=6", "model.num_sink_tokens=0"]),
            (
                {"feed_forwards": ["moe"]},
                ["feed-forward moe in layer 0", "model.feed_forwards says dense"],
            ),
            (
                {"gla": GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied)},
                ["gla.gate=tied", "model.gla.gate=low_rank"],
            ),
        ],
    )
    def test_another_architecture(self, run, tmp_path, change, parts):
        run.checkpoint.load = write_checkpoint(tmp_path / "other", dataclasses.replace(HYBRID, **change))
        sentence = refusal(run, CheckpointError)
        assert all(part in sentence for part in parts), sentence

    def test_another_gate_width(self, run, tmp_path):
        run.checkpoint.load = write_checkpoint(tmp_path / "hybrid", HYBRID)
        run.model.gla = dataclasses.replace(HYBRID.gla, gate_low_rank_dim=8)
        assert "model.gla.gate_low_rank_dim=8" in refusal(run, CheckpointError)


class TestTeacher:
    def test_a_dense_source_teaches_alignment(self, run, tmp_path):
        run.stage.kind = "align"
        run.stage.teacher = write_checkpoint(tmp_path / "dense", DENSE)
        check_run_config(run, world_size=1)

    def test_a_teacher_with_the_same_mixers_has_nothing_to_teach(self, run, tmp_path):
        run.stage.kind = "align"
        run.stage.teacher = write_checkpoint(tmp_path / "hybrid", HYBRID)
        assert "nothing to learn" in refusal(run, ConfigurationError)

    def test_feed_forwards_alone_are_fitted_and_not_trained(self, run, tmp_path):
        run.stage.kind, run.stage.alignment = "align", AlignmentConfig(calibration_tokens=64)
        run.stage.teacher = write_checkpoint(tmp_path / "dense", DENSE)
        run.model = dataclasses.replace(DENSE, activation_func=ActivationFunc.relu)
        sentence = refusal(run, ConfigurationError)
        assert "other feed-forwards (model.activation_func=relu instead of silu)" in sentence
        assert "set stage.train_iters=0 stage.alignment.fit_source_projections=true" in sentence
        run.stage.train_iters = 0
        run.stage.alignment.fit_source_projections = True
        run.stage.alignment.calibration_inputs = AlignmentInputs.student
        check_run_config(run, world_size=1)
        run.model.feed_forwards = ["dense", "moe"]
        assert "only dense ones can be fitted to its" in refusal(run, ConfigurationError)

    def test_alignment_needs_a_teacher_of_the_same_shape(self, run, tmp_path):
        run.stage.kind = "align"
        run.stage.teacher = write_checkpoint(tmp_path / "dense", dataclasses.replace(DENSE, hidden_size=128))
        assert "stage.teacher=" in refusal(run, CheckpointError)

    def test_distillation_needs_the_same_vocabulary(self, run, tmp_path):
        run.stage.kind = "distill"
        run.stage.teacher = write_checkpoint(tmp_path / "dense", dataclasses.replace(DENSE, vocab_size=256))
        sentence = refusal(run, CheckpointError)
        assert "vocabulary of 256" in sentence and "model.vocab_size=512" in sentence

    def test_distillation_from_what_the_run_starts_from_has_nothing_to_teach(self, run, tmp_path):
        run.stage.kind = "distill"
        run.stage.teacher = run.checkpoint.load = write_checkpoint(tmp_path / "hybrid", HYBRID)
        assert "would learn what it says already" in refusal(run, ConfigurationError)
        run.stage.distillation.weight = 0.5  # holds next-token loss back
        check_run_config(run, world_size=1)
        run.stage.distillation.weight = None
        run.stage.teacher = write_checkpoint(tmp_path / "other", HYBRID)
        check_run_config(run, world_size=1)

    def test_virtual_stages_send_a_teacher_as_wide_as_the_model_alone(self, run, tmp_path):
        run.stage.kind = "distill"
        run.stage.teacher = write_checkpoint(tmp_path / "wide", dataclasses.replace(DENSE, hidden_size=128))
        run.parallel.pipeline_model_parallel_size = 2
        check_run_config(run, world_size=2)
        run.parallel.virtual_pipeline_model_parallel_size = 2
        run.stage.global_batch_size = 2
        with pytest.raises(ConfigurationError, match=r"hidden size 128 .* side by side; set .* to null"):
            check_run_config(run, world_size=2)

    def test_a_teacher_has_layers_for_every_pipeline_stage(self, run, tmp_path):
        run.stage.kind = "distill"
        run.stage.teacher = write_checkpoint(tmp_path / "deep", dataclasses.replace(DENSE, num_layers=6))
        run.parallel.pipeline_model_parallel_size = 2
        check_run_config(run, world_size=2)
        run.parallel.virtual_pipeline_model_parallel_size = 2
        run.stage.global_batch_size = 2
        with pytest.raises(ConfigurationError, match="has 6 layers, .* number must be a multiple of 4;"):
            check_run_config(run, world_size=2)

    def test_a_pipeline_stage_that_would_align_nothing_is_refused(self, run, tmp_path):
        run.stage.kind = "align"
        run.parallel.pipeline_model_parallel_size = 2
        run.stage.teacher = write_checkpoint(
            tmp_path / "half",
            dataclasses.replace(HYBRID, mixers=["full", "full", "gla", "swa"]),
        )
        with pytest.raises(
            ConfigurationError, match="layers 2 to 3 have the teacher's mixers; even stages can be 1$"
        ):
            check_run_config(run, world_size=2)
        run.parallel.pipeline_model_parallel_layout = [3, 1]
        with pytest.raises(ConfigurationError, match=r"layout=\[3,1\] leaves .* layer 3 has the teacher's"):
            check_run_config(run, world_size=2)
        run.parallel.pipeline_model_parallel_layout = [1, 3]
        check_run_config(run, world_size=2)
        run.parallel.pipeline_model_parallel_layout = None
        run.model.mixers = ["swa", "gla", "full", "swa"]
        check_run_config(run, world_size=2)

    def test_a_missing_teacher_is_named(self, run):
        run.stage.kind = "distill"
        run.stage.teacher = "nowhere"
        assert "stage.teacher=nowhere" in refusal(run, CheckpointError)
