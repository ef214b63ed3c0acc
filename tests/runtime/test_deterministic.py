"""Equal bits for equal inputs: what is told to libraries, which kernels are set aside, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from spikingbrain_train.architecture.backends.backend import Machine
from spikingbrain_train.architecture.backends.gated_linear_attention import (
    GATED_LINEAR_ATTENTION,
    LinearAttentionCall,
)
from spikingbrain_train.architecture.backends.softmax_attention import (
    SOFTMAX_ATTENTION,
    SoftmaxAttentionCall,
)
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.deterministic import VARIABLES, deterministic_algorithms


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_libraries_are_told_while_the_run_lasts_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    before = {name: os.environ.get(name) for name in VARIABLES}
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Tree"
        assert detect("cpu").machine().is_deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert {name: os.environ.get(name) for name in VARIABLES} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("NCCL_ALGO", "NVLS"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("MKL_CBWR", "AVX2"),
    ],
)
def test_a_variable_that_says_otherwise_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with (
        pytest.raises(PlatformError, match=f"deterministic=true needs {name} .* but it is {value}; unset it"),
        deterministic_algorithms(True),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


_AFTER_A_PRODUCT = """
import torch
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.deterministic import deterministic_algorithms
torch.randn(64, 64) @ torch.randn(64, 64)
try:
    with deterministic_algorithms(True):
        print("runs")
except PlatformError as error:
    print(error)
assert not torch.are_deterministic_algorithms_enabled()
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies without MKL")
def test_a_process_whose_products_depend_on_addresses_is_refused_and_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MKL reads its variable once: what comes behind an ordinary product would have other bits than alone."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", _AFTER_A_PRODUCT]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert "multiplied matrices before" in said and "; set MKL_CBWR=AUTO,STRICT before" in said
    assert len(said.splitlines()) == 1
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")  # as tests/conftest.py has, before the first product
    torch.randn(64, 64) @ torch.randn(64, 64)
    with deterministic_algorithms(True):
        pass


def test_what_torch_cannot_do_so_is_a_sentence() -> None:
    with (
        pytest.raises(PlatformError, match="deterministic=true, but put_ does not have a deterministic"),
        deterministic_algorithms(True),
    ):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_'")
    with pytest.raises(RuntimeError, match="^anything else$"), deterministic_algorithms(True):
        raise RuntimeError("anything else")


def _gpu(*, is_deterministic: bool) -> Machine:
    return Machine(True, lambda name: None, lambda name: False, is_deterministic=is_deterministic)


def test_kernels_that_vary_are_set_aside_and_refused_by_name() -> None:
    linear, window = LinearAttentionCall("bfloat16"), SoftmaxAttentionCall("bfloat16", 64, 64, 512, 128, 4)
    for machine, expected in (
        (_gpu(is_deterministic=False), ("fla", "flex")),
        (_gpu(is_deterministic=True), ("chunk", "blocked")),
    ):
        chosen = GATED_LINEAR_ATTENTION.choose("auto", linear, machine)
        assert (chosen, SOFTMAX_ATTENTION.choose("auto", window, machine)) == expected
    for table, name in ((GATED_LINEAR_ATTENTION, "fla"), (SOFTMAX_ATTENTION, "flex")):
        with pytest.raises(PlatformError, match=f"={name} .* or set numerics.deterministic=false"):
            table.require(name, _gpu(is_deterministic=True))
