"""The accelerator seam tells platforms and packages apart, and says what to change when one is missing."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikingbrain_train.architecture.backends.linears import PARALLEL_LINEAR, LinearsCall
from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime import accelerator as module
from spikingbrain_train.runtime.accelerator import Accelerator, detect, installed_packages
from spikingbrain_train.runtime.packages import package_failure


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 2, torch_version: str = "2.6.0") -> Iterator:
    """Pretend that torch sees GPUs."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "get_device_name", lambda index: name)
        patch.setattr(torch, "__version__", torch_version)
        yield patch


@contextmanager
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def make_package(folder: Path, name: str, *subpackages: str) -> None:
    for path in (name, *(f"{name}/{sub}" for sub in subpackages)):
        (folder / path).mkdir()
        (folder / path / "__init__.py").write_text("")


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_gpu(monkeypatch):
        found = detect("auto")
    assert found.kind is AcceleratorKind.cpu and not found.is_gpu
    assert found.collective_backend == "gloo"
    assert found.device(local_rank=5) == torch.device("cpu")
    assert {torch.float32, torch.bfloat16} <= set(found.supported_dtypes)


@pytest.mark.parametrize(
    ("device_name", "torch_version", "kind"),
    [
        ("NVIDIA H200", "2.13.0+cu130", "cuda"),
        ("MetaX C550", "2.6.0+metax3.2.1.3", "metax"),
        ("MetaX C500", "2.6.0", "metax"),
        ("C550", "2.6.0+metax3.2.1.3", "metax"),
    ],
)
def test_gpu_platforms_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, device_name: str, torch_version: str, kind: str
) -> None:
    with gpu(monkeypatch, device_name, torch_version=torch_version):
        found = detect("auto")
        assert found.kind is AcceleratorKind(kind)
        assert found.collective_backend == "nccl" and found.device_type == "cuda"
        assert found.device(1) == torch.device("cuda", 1)
        assert detect(kind) == found
        assert detect("cpu").kind is AcceleratorKind.cpu
        other = "cuda" if kind == "metax" else "metax"
        with pytest.raises(
            PlatformError, match=f"cluster.accelerator={other}.*choose cluster.accelerator={kind}"
        ):
            detect(other)


def test_kernels_start_as_queued_unless_somebody_chose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def name_of(index: int) -> str:
        seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return "NVIDIA H200"

    with gpu(monkeypatch, "NVIDIA H200") as patch:
        patch.setattr(torch.cuda, "get_device_name", name_of)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        for before in ("", "8"):
            patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before)
            if not before:
                del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
            detect("cuda")
        assert seen == ["1", "8"]
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
        detect("cpu")
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_rank_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        gpu(monkeypatch, "NVIDIA A100", count=2),
        pytest.raises(PlatformError, match="local rank 2 has no GPU: this node shows 2"),
    ):
        detect("cuda").bind(2)


@pytest.mark.parametrize("requested", ["cuda", "metax"])
def test_missing_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    with (
        no_gpu(monkeypatch),
        pytest.raises(PlatformError, match=f"cluster.accelerator={requested}, but torch .* sees no GPU"),
    ):
        detect(requested)


def test_metax_runtime_under_a_foreign_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MACA_PATH", str(tmp_path))
    with no_gpu(monkeypatch), pytest.raises(PlatformError, match=f"{tmp_path}.*not a .metax build"):
        detect("metax")


def test_unknown_platform_lists_the_known_ones() -> None:
    with pytest.raises(PlatformError, match="auto, cuda, metax, cpu"):
        detect("tpu")


def test_package_that_is_missing_is_refused_by_the_setting_that_asks() -> None:
    nothing = Accelerator(AcceleratorKind.cuda, "NVIDIA A100", 1, {})
    assert not nothing.has("transformer_engine")
    with pytest.raises(PlatformError, match="^parallel_linear=transformer_engine needs .*not installed"):
        PARALLEL_LINEAR.choose("transformer_engine", LinearsCall(nothing.kind), nothing.machine())


def test_gpu_package_is_idle_on_cpu() -> None:
    cpu = Accelerator(AcceleratorKind.cpu, "CPU", 0, {"fla": "0.6.0"})
    assert not cpu.has("fla")
    assert "idle without a GPU: fla" in cpu.describe()
    assert not cpu.machine().is_gpu


def test_package_that_does_not_import_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_package(tmp_path, "flash_attn")
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    package_failure.cache_clear()
    found = Accelerator(AcceleratorKind.cuda, "NVIDIA A100", 1, installed_packages())
    assert found.has("flash_attn")
    failure = found.machine().package_failure("flash_attn")
    assert failure is not None and "does not import (undefined symbol" in failure
    package_failure.cache_clear()


def test_only_nvidias_apex_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, subpackages in (("pypi", ["auth"]), ("nvidia", ["multi_tensor_apply", "optimizers"])):
        (tmp_path / folder).mkdir()
        make_package(tmp_path / folder, "apex", *subpackages)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "pypi"))
        assert "apex" not in installed_packages()
    monkeypatch.syspath_prepend(str(tmp_path / "nvidia"))
    assert "apex" in installed_packages()


def test_unsupported_dtype_names_the_supported_ones() -> None:
    with pytest.raises(PlatformError, match="does not support float16; choose one of float32, bfloat16"):
        detect("cpu").require_dtype(torch.float16)


def test_generators_return_to_a_saved_state() -> None:
    cpu = detect("cpu")
    states = cpu.get_rng_state()
    first = torch.rand(4)
    cpu.set_rng_state(states)
    assert torch.equal(torch.rand(4), first)


def test_a_gpu_says_how_much_memory_it_has_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = {3: SimpleNamespace(total_memory=64 << 30)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device])
    assert Accelerator(AcceleratorKind.metax, "MetaX C550", 8).memory_bytes() == 64 << 30
    assert Accelerator(AcceleratorKind.cpu, "a CPU", 0).memory_bytes() is None


def test_peak_memory_follows_what_the_process_holds() -> None:
    cpu, page = detect("cpu"), resource.getpagesize()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    size = max(64 * 2**20, cpu.peak_memory_bytes() - resident + 32 * 2**20)  # more than was ever held
    before = cpu.peak_memory_bytes()
    block = mmap.mmap(-1, size)  # of the kernel: the C library may still have as much that was freed before
    block.write(b"1" * size)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * page
    assert before < cpu.peak_memory_bytes() and cpu.peak_memory_bytes() >= held * 0.9
    block.close()


def test_every_gpu_only_package_is_a_known_one() -> None:
    assert set(module.OPTIONAL_PACKAGES) >= module.GPU_ONLY_PACKAGES
