"""What comes in with megatron-core: no logger, and torch's compiler only where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
IMPORTED_BY_NOTHING_ELSE = Version(version("megatron-core")) < Version("0.17") and Version(
    version("torch")
) >= Version("2.13")
_STAND_IN = (
    "jit_fuser = 'torch.compile'\ndef disable_jit_fuser():\n    global jit_fuser\n    jit_fuser = 'nothing'\n"
)


def printed(code: str, *folders: Path) -> str:
    """What a new process prints that sees no GPU."""
    path = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def start() -> list[str]:
    """What a training process that sees no GPU says of its imports."""
    code = """
import sys
import spikingbrain_train.training.trainer
from megatron.core.fusions import fused_bias_swiglu
print(hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"))
print("torch._inductor.compile_fx" in sys.modules)
print([name for name in ("wandb", "torch.utils.tensorboard") if name in sys.modules])
import wandb
from torch.utils.tensorboard import SummaryWriter
print(wandb.__name__, SummaryWriter.__name__)
"""
    return printed(code).splitlines()


def test_without_a_gpu_models_are_imported_without_the_compiler(start: list[str]) -> None:
    assert start[0] == "False"
    if IMPORTED_BY_NOTHING_ELSE:
        assert start[1] == "False"


def test_loggers_are_imported_by_who_writes_to_them_alone(start: list[str]) -> None:
    assert start[2:] == ["[]", "wandb SummaryWriter"]


@pytest.mark.parametrize(("has_gpu", "wraps"), [(True, "torch.compile"), (False, "nothing")])
def test_what_megatron_wraps_its_functions_in(tmp_path: Path, has_gpu: bool, wraps: str) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "jit.py").write_text(_STAND_IN)
    code = f"""
import spikingbrain_train
from spikingbrain_train.runtime import megatron_jit
megatron_jit.has_gpu_device = lambda: {has_gpu}
from megatron.core import jit
print(jit.__file__.startswith({str(tmp_path)!r}), jit.jit_fuser)
"""
    assert printed(code, tmp_path) == f"True {wraps}"
