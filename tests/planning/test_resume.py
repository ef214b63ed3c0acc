"""What a run that goes on may change is decided for every setting, before torch is there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.architecture.rotary import SETTINGS_OF_TYPES
from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import (
    ActivationFunc,
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    MoEConfig,
)
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.config.run import Precision, Resume, RunConfig
from spikingbrain_train.config.run_record import RunRecord, fingerprint, record_of, write_record
from spikingbrain_train.config.setting import OnChange, decisions, leaves
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.resume import (
    StoredRun,
    changes_since,
    check_settings,
    check_training_data,
    is_same_topology,
    nothing_left,
    read_stored_run,
    run_to_resume,
)
from tests.config.changes import changed, other
from tests.config.small_dataset import write_dataset
from tests.config.small_model import small_model, write_checkpoint

# Every kind of layer, so that every setting has a part in it.
MODEL = small_model(
    mixers=["gla", "swa", ["gla", "full"], ["gdn", "mamba"]],
    mamba=MambaConfig(bc_dt_norm=True),
    feed_forwards=["dense", "moe"],
    moe=MoEConfig(num_experts=4, capacity_factor=2.0),
    spiking=SpikingConfig(projections=[Projection.qkv, Projection.gate]),
    quantization=QuantizationConfig(projections=[Projection.qkv, Projection.gate]),
    rope_scaling=RopeScalingConfig(RopeType.llama3, factor=8.0),
)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run over two datasets that exist, in a folder of its own."""
    prefixes = [
        write_dataset(tmp_path / name, documents=documents) for name, documents in (("a", 5), ("b", 3))
    ]
    return RunConfig(
        model=dataclasses.replace(MODEL),
        stage=StageConfig(train_iters=10, seq_length=16, global_batch_size=2, teacher="teacher"),
        data=dataclasses.replace(RunConfig().data, train=blend(prefixes, [3.0, 1.0])),
        output_dir=str(tmp_path / "run"),
        precision=Precision.fp32,
    )


def save(
    run: RunConfig, iteration: int = 4, record: RunRecord | None = None, with_record: bool = True
) -> Path:
    """What ``run`` leaves behind at ``iteration``."""
    checkpoints = Path(run.output_dir) / "checkpoints"
    write_checkpoint(checkpoints, run.model, iteration, run)
    checkpoint = checkpoints / f"iter_{iteration:07d}"
    if with_record:
        write_record(record or record_of(run, world_size=1), checkpoint)
    return checkpoint


def refusal(run: RunConfig, kind: type[SpikingBrainError] = CheckpointError) -> str:
    stored = run_to_resume(run)
    assert stored is not None
    with pytest.raises(kind) as caught:
        check_settings(stored, run)
        check_training_data(stored, run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_setting_of_a_run_says_what_resuming_does_with_a_change(run: RunConfig) -> None:
    assert list(decisions(run)) == list(leaves(run))


@pytest.mark.parametrize("name", decisions(RunConfig()))
def test_a_changed_setting_is_free_said_or_refused_as_stands_beside_it(run: RunConfig, name: str) -> None:
    for kind, read in SETTINGS_OF_TYPES.items():
        if name.removeprefix("model.rope_scaling.") in read:
            run.model = dataclasses.replace(run.model, rope_scaling=RopeScalingConfig(kind, factor=8.0))
    if name == "model.fatrelu_threshold":
        run.model = dataclasses.replace(run.model, activation_func=ActivationFunc.fatrelu)
    if name == "model.moe.router_bias_decay_iters":
        run.model = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, router_bias=True))
    if name.startswith("model.lora.") and name != "model.lora.names":
        run.model = dataclasses.replace(run.model, lora=LoraConfig(names=["one", "two"]))
    stored = StoredRun(save(run), run, record_of(run, world_size=1))
    before = leaves(run)[name]
    if name in ("parallel.data_parallel_size", "parallel.expert_tensor_parallel_size"):
        before = 1  # what null stands for
    now = changed(run, name, other(before))
    decision = decisions(run)[name]
    if decision.rule is OnChange.refused:
        with pytest.raises(CheckpointError) as caught:
            check_settings(stored, now)
        assert f"was written with {name}=" in str(caught.value) and "restore the setting" in str(caught.value)
        return
    check_settings(stored, now)
    if decision.rule is OnChange.by_tokens:
        return
    world_size = 2 if name.startswith("parallel.") and name.endswith("parallel_size") else 1
    if name == "parallel.expert_tensor_parallel_size":
        world_size = 1
    said = [change for change in changes_since(stored, now, world_size) if change.name == name]
    assert len(said) == (decision.rule is OnChange.said), said


def test_nothing_is_said_of_an_unchanged_run(run: RunConfig) -> None:
    save(run)
    stored = run_to_resume(run)
    assert stored is not None and stored.iteration == 4
    check_settings(stored, run)
    check_training_data(stored, run)
    assert changes_since(stored, run, world_size=1) == []


def test_changes_are_said_as_they_are_written_on_the_command_line(run: RunConfig) -> None:
    save(run)
    stored = run_to_resume(run)
    assert stored is not None
    now = changed(changed(run, "optimizer.lr", 1e-5), "checkpoint.load", "elsewhere")
    now = changed(now, "data.reset_at_documents", True)
    assert [change.describe() for change in changes_since(stored, now, world_size=2)] == [
        "parallel.data_parallel_size 1 -> 2",
        "data.reset_at_documents false -> true",
        "optimizer.lr 0.0005 -> 1e-05",
        "checkpoint.load null -> elsewhere (its weights are read at the start only)",
    ]
    assert is_same_topology(stored, run, 1) and not is_same_topology(stored, run, 2)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("precision", Precision.bf16, ["precision=fp32", "with bf16", "checkpoint.load="]),
        ("seed", 99, ["seed=1234", "with 99", "another order"]),
        ("stage.seq_length", 32, ["stage.seq_length=16", "with 32", "another order"]),
        ("stage.kind", "align", ["stage.kind=cpt", "with align"]),
        ("model.num_sink_tokens", 6, ["model.num_sink_tokens=0", "with 6", "choose another output_dir"]),
        ("model.mixers", ["gla"], ["model.mixers=[gla,swa,[gla,full],[gdn,mamba]]", "with [gla]"]),
        ("model.sliding_window", 8, ["model.sliding_window=4096", "with 8", "checkpoint.load="]),
        (
            "model.gla",
            GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
            ["model.gla.feature_map=relu", "with sigmoid"],
        ),
    ],
)
def test_what_must_stay_is_refused_naming_both_values(
    run: RunConfig, name: str, value: Any, parts: list[str]
) -> None:
    save(run)
    sentence = refusal(changed(run, name, value))
    for part in parts:
        assert part in sentence


def test_a_precision_that_is_left_open_is_that_of_the_run(run: RunConfig) -> None:
    save(run)
    stored = run_to_resume(run)
    assert stored is not None
    check_settings(stored, changed(run, "precision", Precision.auto))
    assert changes_since(stored, changed(run, "precision", Precision.auto), world_size=1) == []


class TestTrainingData:
    def test_other_tokens_under_the_same_name_are_refused(self, run: RunConfig, tmp_path: Path) -> None:
        save(run)
        write_dataset(tmp_path / "b", documents=4)
        sentence = refusal(run)
        assert f"data.train={tmp_path}/b of" in sentence
        assert "in 3 documents" in sentence and "in 4 documents" in sentence

    def test_tokens_of_another_order_under_the_same_name_are_refused(
        self, run: RunConfig, tmp_path: Path
    ) -> None:
        save(run)
        write_dataset(tmp_path / "b", documents=3, reverse=True)
        assert "digest" in refusal(run)

    def test_the_order_of_datasets_stays(self, run: RunConfig) -> None:
        save(run)
        assert "another order" in refusal(changed(run, "data.train", run.data.train[::-1]))

    def test_a_dataset_more_or_less_is_refused(self, run: RunConfig) -> None:
        save(run)
        sentence = refusal(changed(run, "data.train", run.data.train[:1]))
        a, b = run.data.train_prefixes
        assert f"data.train=[{{prefix:{a},weight:3}},{{prefix:{b},weight:1}}]" in sentence

    def test_the_same_tokens_may_move(self, run: RunConfig, tmp_path: Path) -> None:
        save(run)
        moved = write_dataset(tmp_path / "moved", documents=5)
        now = changed(run, "data.train", blend([moved, run.data.train_prefixes[1]], [3.0, 1.0]))
        stored = run_to_resume(now)
        assert stored is not None
        check_training_data(stored, now)
        (change,) = changes_since(stored, now, world_size=1)
        assert change.describe().startswith("data.train [")
        assert change.describe().endswith("(the same tokens)")

    def test_weights_of_the_same_shares_are_the_same(self, run: RunConfig) -> None:
        save(run)
        now = changed(run, "data.train", blend(run.data.train_prefixes, [6.0, 2.0]))
        stored = run_to_resume(now)
        assert stored is not None
        check_training_data(stored, now)

    @pytest.mark.parametrize(("weights", "now"), [([1.0, 1.0], "weight:1}]"), (None, "with [")])
    def test_other_weights_are_refused(self, run: RunConfig, weights: list[float] | None, now: str) -> None:
        save(run)
        sentence = refusal(changed(run, "data.train", blend(run.data.train_prefixes, weights)))
        assert ",weight:3},{" in sentence and now in sentence and "another order" in sentence

    def test_weights_of_a_single_dataset_do_not_matter(self, run: RunConfig) -> None:
        alone = changed(run, "data.train", run.data.train_prefixes[:1])
        save(alone)
        stored = run_to_resume(alone)
        assert stored is not None
        check_training_data(stored, changed(alone, "data.train", blend(alone.data.train, [3.0])))

    def test_checkpoints_of_earlier_releases_know_paths_only(self, run: RunConfig, tmp_path: Path) -> None:
        save(run, with_record=False)
        stored = run_to_resume(run)
        assert stored is not None and stored.record is None and stored.world_size == 1
        check_training_data(stored, run)
        moved = write_dataset(tmp_path / "moved", documents=5)
        assert "data.train=[" in refusal(
            changed(run, "data.train", blend([moved, run.data.train_prefixes[1]], [3.0, 1.0]))
        )

    def test_a_fingerprint_sees_any_size_and_the_start_and_end(self, tmp_path: Path) -> None:
        prefix = write_dataset(tmp_path / "large", documents=3000)
        before = fingerprint(prefix)
        assert (before.documents, before.tokens) == (3000, 3000 * 20)
        for offset in (0, Path(f"{prefix}.bin").stat().st_size - 2):
            content = bytearray(Path(f"{prefix}.bin").read_bytes())
            content[offset] ^= 1
            Path(f"{prefix}.bin").write_bytes(content)
            assert fingerprint(prefix) != before
            before = fingerprint(prefix)


def test_checks_before_torch_refuse_what_resuming_would(run: RunConfig, tmp_path: Path) -> None:
    run.stage.teacher = None
    assert check_run_config(run, world_size=1) is None
    save(run)
    stored = check_run_config(run, world_size=1)
    assert stored is not None and stored == run_to_resume(run)
    with pytest.raises(CheckpointError, match="seed=1234 and cannot be resumed with 7"):
        check_run_config(changed(run, "seed", 7), world_size=1)
    write_dataset(tmp_path / "a", documents=6)
    with pytest.raises(CheckpointError, match="another order"):
        check_run_config(run, world_size=1)


def test_a_resumed_run_does_not_need_what_it_started_from(run: RunConfig) -> None:
    run.stage.teacher = None
    run.checkpoint.load = "gone"
    save(run)
    check_run_config(run, world_size=1)


def test_a_converted_checkpoint_is_no_run_to_go_on_with(run: RunConfig) -> None:
    (save(run) / "run_config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no run_config\.yaml.*checkpoint\.load="):
        run_to_resume(run)
    assert run_to_resume(changed(run, "checkpoint.resume", Resume.never)) is None


@pytest.mark.parametrize("content", ["", "{}", '{"world_size": 1, "training_data": [{}]}', "[]"])
def test_a_damaged_record_is_named(run: RunConfig, content: str) -> None:
    checkpoint = save(run)
    (checkpoint / "run_record.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run_record\.json does not describe a run"):
        read_stored_run(checkpoint)


def test_a_record_is_plain_text(run: RunConfig) -> None:
    record = json.loads((save(run) / "run_record.json").read_text())
    assert record["world_size"] == 1
    assert [dataset["documents"] for dataset in record["training_data"]] == [5, 3]


def test_a_finished_run_has_nothing_left_to_do(run: RunConfig) -> None:
    save(run, iteration=10)
    stored = run_to_resume(run)
    assert stored is not None
    assert "nothing is left to do" in str(nothing_left(run, stored))
    assert "iteration 10 of stage.train_iters=8" in str(
        nothing_left(changed(run, "stage.train_iters", 8), stored)
    )
    assert nothing_left(changed(run, "stage.train_iters", 11), stored) is None
