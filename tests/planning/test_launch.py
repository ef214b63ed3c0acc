"""What a process learns about its launch and its machine before torch is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import AcceleratorKind, ClusterConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.planning import host_capacity
from spikingbrain_train.planning.launch import Launch, has_gpu_device, memory_free, memory_limit
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.planner import plan_run

MEETING = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 and WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_launch_that_would_wait_for_ever_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(PlatformError) as refusal:
        Launch.from_environment({**MEETING, **variables})
    assert words in str(refusal.value)


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_is_what_the_machine_has_or_what_its_control_groups_allow(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    _machine(tmp_path, {"proc/meminfo": "MemTotal:  4194304 kB\nMemFree: 1 kB\n"})
    assert memory_limit(tmp_path) == 4 * GIB
    # version 2: no limit in the group itself, one in its parent
    _machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job_7/step_0\n",
            "sys/fs/cgroup/job_7/step_0/memory.max": "max\n",
            "sys/fs/cgroup/job_7/memory.max": f"{3 * GIB}\n",
        },
    )
    assert memory_limit(tmp_path) == 3 * GIB
    # version 1, in a container that sees its own group as the root
    _machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert memory_limit(tmp_path) == 2 * GIB


def test_free_memory_is_what_the_machine_and_every_control_group_have_left(tmp_path: Path) -> None:
    assert memory_free(tmp_path) is None
    _machine(tmp_path, {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:  8388608 kB\n"})
    assert memory_free(tmp_path) == 8 * GIB
    group, parent = "sys/fs/cgroup/job_7/step_0/", "sys/fs/cgroup/job_7/"
    _machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job_7/step_0\n",
            f"{group}memory.max": "max\n",
            f"{group}memory.current": f"{GIB}\n",
            f"{parent}memory.max": f"{6 * GIB}\n",
            f"{parent}memory.current": f"{4 * GIB}\n",
        },
    )
    assert memory_free(tmp_path) == 2 * GIB
    _machine(tmp_path, {f"{parent}memory.stat": f"anon 5\ninactive_file {GIB}\n"})  # read again when needed
    assert memory_free(tmp_path) == 3 * GIB
    _machine(
        tmp_path,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 4096\n",
        },
    )
    assert memory_free(tmp_path) == GIB + 4096


@pytest.mark.parametrize("device", ["nvidia0", "mxcd", "mxcd0", "dxg"])
def test_a_gpu_is_known_by_its_device_file_unless_it_is_hidden(tmp_path: Path, device: str) -> None:
    assert not has_gpu_device(tmp_path, {})
    _machine(tmp_path, {"dev/nvidiactl": ""})
    assert not has_gpu_device(tmp_path, {})  # a driver without a card
    _machine(tmp_path, {f"dev/{device}": ""})
    assert has_gpu_device(tmp_path, {})
    assert has_gpu_device(tmp_path, {"CUDA_VISIBLE_DEVICES": "1,0"})
    for hidden in ("", "-1"):
        assert not has_gpu_device(tmp_path, {"CUDA_VISIBLE_DEVICES": hidden})


def _run(**changes: object) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=1024,
            ffn_hidden_size=4096,
            num_attention_heads=16,
            num_query_groups=8,
            kv_channels=64,
            vocab_size=32000,
            max_position_embeddings=1 << 20,
        ),
        cluster=ClusterConfig(accelerator=AcceleratorKind.cpu),
        stage=StageConfig(train_iters=1, seq_length=1024, global_batch_size=64),
        output_dir="unused",
    )
    for name, value in changes.items():
        section, _, leaf = name.partition("__")
        setattr(getattr(config, section), leaf, value)
    return config


class TestHost:
    """A machine of 8 cores and 16 GiB; the run above needs 2.8 GiB of weights, gradients and optimizer."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_capacity, "memory_limit", lambda: 16 * GIB)
        monkeypatch.setattr(host_capacity, "available_cores", lambda: 8)
        monkeypatch.setattr(host_capacity, "has_gpu_device", lambda: True)

    @staticmethod
    def check(config: RunConfig, ranks: int = 1) -> None:
        host_capacity.check_host(
            plan_run(config, ranks), Launch(0, ranks, 0, ranks, None if ranks == 1 else "here")
        )

    def test_what_fits_is_accepted(self) -> None:
        self.check(_run())
        self.check(_run(data__num_workers=32))
        self.check(_run(data__num_workers=8), ranks=4)

    def test_more_parameters_than_memory_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"parameters on 1 rank.* this machine has 16\.0 GiB"):
            self.check(_run(model__hidden_size=16384))

    def test_every_rank_of_the_machine_counts(self) -> None:
        with pytest.raises(ConfigurationError, match=r"on 8 rank\(s\)"):
            self.check(_run(), ranks=8)

    def test_every_rank_counts_with_its_own_pipeline_stage(self) -> None:
        """The first and the last of four stages hold 300 M numbers of vocabulary, those between none."""
        config = _run(model__vocab_size=300_000, parallel__pipeline_model_parallel_size=4)
        stages = plan_run(config, 4).stages
        needed = sum(stage.memory.total - stage.memory.activations for stage in stages)
        assert needed < 16 * GIB < 4 * max(stage.memory.total - stage.memory.activations for stage in stages)
        self.check(config, ranks=4)

        # On a machine with the last two only, the sum is theirs.
        config.model.vocab_size = 1_000_000
        plan = plan_run(config, 4)
        with pytest.raises(ConfigurationError) as refusal:
            host_capacity.check_host(plan, Launch(3, 4, 1, 2, "there"))
        parameters = sum(stage.parameters for stage in plan.stages[2:])
        assert str(refusal.value).startswith(f"{parameters:,} parameters on 2 rank(s) with their gradients")

    def test_a_step_that_is_many_times_the_memory_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"stage\.seq_length=1048576"):
            self.check(_run(stage__seq_length=1 << 20))

    def test_on_a_gpu_host_memory_decides_nothing(self) -> None:
        self.check(_run(model__hidden_size=16384, cluster__accelerator=AcceleratorKind.auto))
        self.check(_run(model__hidden_size=16384, cluster__accelerator=AcceleratorKind.cuda))

    @pytest.mark.parametrize("ranks", [1, 8])
    def test_loader_processes_are_bounded_by_the_cores(self, ranks: int) -> None:
        with pytest.raises(ConfigurationError, match=r"data\.num_workers=9999999 .* on 8 cores"):
            self.check(_run(data__num_workers=9999999, model__hidden_size=64), ranks=ranks)
