"""What a CUDA build of torch says on a machine with a CUDA toolkit and no GPU stays away from commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Whichever torch is installed here: one that was built for CUDA and sees no GPU.
_CUDA_BUILD = """
import torch
torch.version.cuda = torch.version.cuda or "12.4"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
"""
_NOTICE = "No CUDA runtime is found"


def stderr_of(code: str, cuda_home: Path | None) -> str:
    """What a new process writes to standard error."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")
    }
    environment["PYTHONPATH"] = str(ROOT)
    if cuda_home is not None:
        environment["CUDA_HOME"] = str(cuda_home)
    else:
        environment["PATH"] = "/nonexistent"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("toolkit", [True, False], ids=["with a CUDA toolkit", "without"])
def test_no_word_of_a_missing_cuda_runtime(tmp_path: Path, toolkit: bool) -> None:
    code = f"import spikingbrain_train\n{_CUDA_BUILD}\nfrom torch.utils import cpp_extension"
    assert stderr_of(code, tmp_path if toolkit else None) == ""


def test_torch_says_it_unasked(tmp_path: Path) -> None:
    # What the test above keeps away; should torch stop saying it, runtime/quiet_torch.py can go.
    assert _NOTICE in stderr_of(f"{_CUDA_BUILD}\nfrom torch.utils import cpp_extension", tmp_path)


def test_other_words_of_the_same_import_are_passed_on(tmp_path: Path) -> None:
    package = tmp_path / "torch" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "cpp_extension.py").write_text(
        "import sys\n"
        "print(\"No CUDA runtime is found, using CUDA_HOME='/x'\", file=sys.stderr)\n"
        "print('something else', file=sys.stderr)\n"
    )
    code = f"""
import spikingbrain_train, sys
sys.path.insert(0, {str(tmp_path)!r})
import torch.utils.cpp_extension
assert torch.utils.cpp_extension.sys is sys
"""
    assert stderr_of(code, tmp_path) == "something else\n"
