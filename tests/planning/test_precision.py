"""What ``precision=auto`` becomes: said without torch for plans, settled with torch for runs and tools."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format
from spikingbrain_train.config.load import save_config, to_run_config
from spikingbrain_train.config.parallel import AcceleratorKind, ParallelConfig
from spikingbrain_train.config.run import Precision, Resume, RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.parallel import agreed_precision
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning import precision
from spikingbrain_train.planning.plan_report.report import render
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.precision import PrecisionChoice
from spikingbrain_train.runtime import bf16
from spikingbrain_train.runtime.accelerator import Accelerator, detect
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    RUN_CONFIG_FILE,
    iteration_folder,
)
from tests.distributed.pool import RankPool

ROOT = Path(__file__).parents[2]
CPU = Accelerator(AcceleratorKind.cpu, "some CPU", 0)
GPU = Accelerator(AcceleratorKind.cuda, "some GPU", 1)


def cpuinfo(folder: Path, line: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: made up\n{line}\nbugs\t: none\n")
    return path


def run_config(*overrides: str) -> RunConfig:
    return to_run_config(compose_run(["model=tiny_hybrid", "cluster=cpu", "output_dir=/nowhere", *overrides]))


def store_run(folder: Path, stored: Precision) -> None:
    """What a run of this precision leaves in its output folder, as far as its successor's start reads it."""
    checkpoint = iteration_folder(folder / CHECKPOINT_FOLDER, 3)
    checkpoint.mkdir(parents=True)
    save_config(replace(run_config(), precision=stored), checkpoint / RUN_CONFIG_FILE)
    for name in (MODEL_CONFIG_FILE, ".metadata", "metadata.json"):
        (checkpoint / name).touch()
    (folder / CHECKPOINT_FOLDER / LATEST_ITERATION_FILE).write_text("3")


class TestInstructions:
    @pytest.mark.parametrize(
        ("line", "known"),
        [
            ("flags\t\t: fpu sse4_2 avx avx2 fma", False),
            ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
            ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
            ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile", True),
            ("Features\t: fp asimd sve", False),
            ("Features\t: fp asimd sve bf16 i8mm", True),
            ("isa\t: rv64imafdc", None),
        ],
    )
    def test_flags_of_the_cpu_decide(self, tmp_path: Path, line: str, known: bool | None) -> None:
        assert precision.bf16_instructions(cpuinfo(tmp_path, line), {}) is known

    @pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
    @pytest.mark.parametrize(
        ("limit", "known"),
        [
            ("AVX2", False),
            ("avx512_core", False),
            ("AVX512_CORE_BF16", True),
            ("AVX512_CORE_AMX", True),
            ("ALL", True),
        ],
    )
    def test_a_limit_of_onednn_counts(self, tmp_path: Path, variable: str, limit: str, known: bool) -> None:
        able = cpuinfo(tmp_path, "flags\t\t: avx2 avx512_bf16 amx_bf16")
        assert precision.bf16_instructions(able, {variable: limit}) is known

    def test_a_system_without_cpuinfo_does_not_tell(self, tmp_path: Path) -> None:
        assert precision.bf16_instructions(tmp_path / "missing", {}) is None

    def test_torch_and_the_plan_agree_on_this_machine_whatever_its_limit(self) -> None:
        code = (
            "from spikingbrain_train.planning import precision; from spikingbrain_train.runtime import bf16; "
            "from spikingbrain_train.runtime.accelerator import detect; "
            "expected = precision.choice_on_cpu(precision.bf16_instructions()); "
            "assert bf16.choose_precision(detect('cpu')) == expected, expected; "
            "print(expected.precision.value)"
        )
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "fp32", done.stderr


class TestPlan:
    @pytest.mark.parametrize(("able", "value"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
    def test_plan_holds_the_precision_and_says_why(
        self, monkeypatch: pytest.MonkeyPatch, able: bool | None, value: str
    ) -> None:
        monkeypatch.setattr(precision, "bf16_instructions", lambda: able)
        plan = plan_run(run_config(), 1)
        named = plan_run(run_config(f"precision={value}"), 1)
        assert plan.config.precision.value == value
        assert f"precision={value} because" in render(plan)
        assert plan.stages == named.stages and plan.checkpoint_bytes == named.checkpoint_bytes
        assert "precision=" not in render(named)

    def test_a_cluster_of_gpus_is_planned_in_bf16_from_anywhere(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "bf16_instructions", lambda: False)
        for cluster in ("nvidia", "metax"):
            assert plan_run(run_config(f"cluster={cluster}"), 1).config.precision is Precision.bf16

    def test_auto_takes_a_machine_for_one_with_gpus_where_the_check_of_its_memory_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "bf16_instructions", lambda: False)
        for seen, value in ((True, Precision.bf16), (False, Precision.fp32)):
            monkeypatch.setattr(precision, "has_gpu_device", lambda seen=seen: seen)
            assert plan_run(run_config("cluster.accelerator=auto"), 1).config.precision is value

    def test_published_experiments_are_bf16_wherever_they_are_planned(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "bf16_instructions", lambda: False)
        for experiment in (ROOT / "conf" / "experiment").glob("spikingbrain_*.yaml"):
            assert compose_run([f"experiment={experiment.stem}"]).precision is Precision.bf16, experiment.stem

    @pytest.mark.parametrize("stored", [Precision.bf16, Precision.fp32])
    def test_a_resumed_run_keeps_its_precision_on_another_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Precision
    ) -> None:
        monkeypatch.setattr(precision, "bf16_instructions", lambda: stored is Precision.fp32)
        store_run(tmp_path, stored)
        config = replace(run_config(), output_dir=str(tmp_path))
        plan = plan_run(config, 1)
        assert plan.config.precision is stored and "as in the run that is resumed" in render(plan)
        other = Precision.fp32 if stored is Precision.bf16 else Precision.bf16
        assert plan_run(replace(config, precision=other), 1).config.precision is other
        config.checkpoint.resume = Resume.never
        assert plan_run(config, 1).config.precision is other

    def test_a_plan_refuses_what_the_run_would_refuse_to_resume(self, tmp_path: Path) -> None:
        store_run(tmp_path, Precision.fp32)
        (iteration_folder(tmp_path / CHECKPOINT_FOLDER, 3) / RUN_CONFIG_FILE).unlink()
        with pytest.raises(CheckpointError, match=f"has no {RUN_CONFIG_FILE}"):
            plan_run(replace(run_config(), output_dir=str(tmp_path)), 1)


class TestChoice:
    @pytest.mark.parametrize("able", [True, False])
    def test_nothing_is_measured_where_system_and_torch_agree(
        self, monkeypatch: pytest.MonkeyPatch, able: bool
    ) -> None:
        monkeypatch.setattr(bf16, "bf16_instructions", lambda: able)
        monkeypatch.setattr(bf16, "_onednn_takes_bf16", lambda: able)
        monkeypatch.setattr(bf16, "product_slowdown", lambda dtype: pytest.fail("measured"))
        assert bf16.choose_precision(CPU).precision is (Precision.bf16 if able else Precision.fp32)

    @pytest.mark.parametrize(("slowdown", "chosen"), [(4.0, Precision.fp32), (0.5, Precision.bf16)])
    @pytest.mark.parametrize(("system", "torch_says"), [(None, True), (False, True), (True, False)])
    def test_a_product_is_measured_where_they_do_not(
        self,
        monkeypatch: pytest.MonkeyPatch,
        slowdown: float,
        chosen: Precision,
        system: bool | None,
        torch_says: bool,
    ) -> None:
        monkeypatch.setattr(bf16, "bf16_instructions", lambda: system)
        monkeypatch.setattr(bf16, "_onednn_takes_bf16", lambda: torch_says)
        monkeypatch.setattr(bf16, "product_slowdown", lambda dtype: slowdown)
        choice = bf16.choose_precision(CPU)
        assert choice.precision is chosen and "(measured)" in choice.describe()

    @pytest.mark.parametrize("able", [True, False])
    def test_a_gpu_without_bf16_takes_fp32_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, able: bool
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able)
        choice = bf16.choose_precision(GPU)
        assert choice.precision is (Precision.bf16 if able else Precision.fp32)
        assert "some GPU" in choice.describe()

    def test_an_explicit_slow_format_is_obeyed_with_the_measured_factor(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bf16, "bf16_instructions", lambda: False)
        monkeypatch.setattr(bf16, "_onednn_takes_bf16", lambda: False)
        monkeypatch.setattr(bf16, "product_slowdown", lambda dtype: 29.2)
        warning = bf16.slow_format_warning("precision=bf16", torch.bfloat16, CPU)
        assert warning is not None and "precision=bf16" in warning and "29 times slower" in warning
        assert bf16.slow_format_warning("precision=fp32", torch.float32, CPU) is None
        assert bf16.slow_format_warning("precision=bf16", torch.bfloat16, GPU) is None

    def test_slowdown_of_float64_is_that_of_half_as_wide_instructions(self) -> None:
        # Half as many numbers in a register; a factor of 4 for whatever else runs on this machine.
        assert 0.5 < bf16.product_slowdown(torch.float64) < 8


def _agreed(groups: ProcessGroups, able: list[bool]) -> tuple[str, str]:
    config = run_config()
    told = {"bf16_instructions": lambda: able[groups.rank], "_onednn_takes_bf16": lambda: able[groups.rank]}
    with mock.patch.multiple(bf16, **told):
        choice = agreed_precision.agree_on_precision(config, groups)
    return choice.precision.value, choice.describe()


@pytest.mark.parametrize(
    ("able", "value", "reason"),
    [
        ([True, True], "bf16", "in hardware"),
        ([True, False], "fp32", "because 1 of 2 ranks have no fast bf16"),
        ([False, False], "fp32", "no bf16 instructions"),
    ],
)
def test_ranks_agree_on_what_all_of_them_multiply(
    ranks: RankPool, able: list[bool], value: str, reason: str
) -> None:
    for found, sentence in ranks.run(_agreed, able, world_size=2, parallel=ParallelConfig()):
        assert found == value and reason in sentence


def _refused_in_fp8(groups: ProcessGroups) -> str:
    config = replace(run_config(), fp8=Fp8Config(Fp8Format.hybrid))
    able = PrecisionChoice(Precision.bf16 if groups.rank == 0 else Precision.fp32)
    with (
        mock.patch.object(agreed_precision, "choose_precision", return_value=able),
        pytest.raises(ConfigurationError) as error,
    ):
        agreed_precision.agree_on_precision(config, groups)
    return str(error.value)


def test_fp8_is_refused_on_every_rank_where_one_of_them_lacks_bf16(ranks: RankPool) -> None:
    for sentence in ranks.run(_refused_in_fp8, world_size=2, parallel=ParallelConfig()):
        assert "fp8.format=hybrid rounds what bf16" in sentence and "1 of 2 ranks have no fast" in sentence


def test_this_machine_is_detected() -> None:
    assert bf16.choose_precision(detect("cpu")).precision in (Precision.bf16, Precision.fp32)
